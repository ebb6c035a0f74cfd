"""``nn.LayerNorm``, ``nn.RMSNorm`` and ``nn.GroupNorm``.

With x̂ the normalised input, y = γ x̂ + β: the task's gradients are the sums of dY x̂ and of dY over its rows. x̂ is
computed again in the backward pass from the input and the saved statistics, so nothing is kept that the plain layer
would not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.segment_sum import stat_dtype
from .base import Capture, Gauge, Unattributed, by_entry, register_capture, rows_of
from .function import autocast_dtype, keep, kept, pack
from .task_rows import Rows


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: list[int],
        eps: float,
        entries: int,
        *packed: Any,
    ) -> Tensor:
        out, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, weight, bias, eps)
        keep(ctx, packed, x, weight, bias, mean, rstd)
        ctx.shape, ctx.entries = shape, entries
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (x, weight, bias, mean, rstd), (of_weight, of_bias) = saved.tensors, saved.parts
        dx = dw = db = w_stats = b_stats = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            dx = torch.ops.aten.native_layer_norm_backward(dy, x, ctx.shape, mean, rstd, weight, bias, mask)[0]
        rows = by_entry(x, ctx.entries, len(ctx.shape))
        mean, rstd = (t.reshape(rows[:2]).to(stat_dtype(x)) for t in (mean, rstd))
        gamma, beta = torch.ops.taskgrad.norm_segment_sum(
            dy.reshape(rows), x.reshape(rows), mean, rstd, of_weight.order, of_weight.offsets
        )
        if ctx.needs_input_grad[1]:
            dw, w_stats = of_weight.of_tasks(gamma, weight.shape, weight.dtype)
        if ctx.needs_input_grad[2]:
            db, b_stats = of_bias.of_tasks(beta, weight.shape, weight.dtype)
        return saved.gradients((dx, dw, db, None, None, None), w_stats, b_stats)


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", key)


FUSED = frozenset(d for d in ("cpu", "cuda") if _has_kernel("_fused_rms_norm_backward", d.upper()))
WIDE = _has_kernel("rms_norm", "AutocastCUDA")  # some version on, autocast runs it in float32 on a GPU


def _fused(x: Tensor, weight: Tensor) -> bool:
    """Whether ``F.rms_norm`` runs torch's fused kernels: on devices that have some (a CPU has none), for equal dtypes,
    not channels last."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    by_rows = x.is_contiguous() or channels_last is None or not x.is_contiguous(memory_format=channels_last)
    return x.device.type in FUSED and x.dtype == weight.dtype and by_rows


def _widened(x: Tensor) -> Tensor:
    """What autocast to float32 makes of it."""
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    """y = γ x̂ with x̂ = x / rms(x); dX = (γ dY − x̂ mean(γ dY x̂)) / rms(x), by torch's fused kernel or else in float32
    or float64."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dims: list[int], eps: float | None, entries: int, wide: bool, *packed: Any
    ) -> Tensor:
        gamma = _widened(weight) if wide else weight
        ctx.fused = _fused(x, gamma)
        norm = torch.ops.aten._fused_rms_norm.default
        # the op takes the fused kernel of the device whatever the dtypes; what is compiled is taken apart anyway
        by_parts = x.device.type in FUSED and not ctx.fused and not torch.compiler.is_compiling()
        out, rstd = (norm.decompose if by_parts else norm)(x, weight.shape, gamma, eps)
        # what is not needed is not kept: it may be written to before the backward pass, as without tracking
        if not ctx.needs_input_grad[0]:
            x, rstd = x.to(rstd.dtype) * rstd, torch.ones_like(rstd)
        keep(ctx, packed, x, weight if ctx.needs_input_grad[0] else None, rstd)
        ctx.dims, ctx.entries, ctx.shape, ctx.dtype = dims, entries, weight.shape, weight.dtype
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (x, weight, rstd), (part,) = saved.tensors, saved.parts
        dx = None
        if ctx.needs_input_grad[0] and ctx.fused and dy.dtype == x.dtype:
            fused = torch.ops.aten._fused_rms_norm_backward
            dx = fused(dy, x, ctx.shape, rstd, weight.to(x.dtype), [True, False])[0]
        elif ctx.needs_input_grad[0]:
            xhat, scaled = x.to(rstd.dtype) * rstd, dy.to(rstd.dtype) * weight
            dx = ((scaled - xhat * (scaled * xhat).mean(ctx.dims, keepdim=True)) * rstd).to(x.dtype)
        rows = by_entry(x, ctx.entries, len(ctx.shape))
        rstd = rstd.reshape(rows[:2])
        dy = dy.to(torch.promote_types(dy.dtype, x.dtype))
        gamma, _ = torch.ops.taskgrad.norm_segment_sum(
            dy.reshape(rows), x.reshape(rows).to(dy.dtype), None, rstd, part.order, part.offsets
        )
        dw, stats = part.of_tasks(gamma, ctx.shape, ctx.dtype)
        return saved.gradients((dx, dw, None, None, None, None), stats)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, *packed: Any
    ) -> Tensor:
        n, channels = x.shape[:2]
        size = x[0, 0].numel()
        if not (x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()  # as torch does
        out, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, n, channels, size, groups, eps)
        keep(ctx, packed, x, weight, mean, rstd)
        ctx.groups = groups
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (x, weight, mean, rstd), (of_weight, of_bias) = saved.tensors, saved.parts
        x, dy = x.contiguous(), dy.contiguous()
        n, channels = x.shape[:2]
        dx = dw = db = w_stats = b_stats = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.native_group_norm_backward(
                dy, x, mean, rstd, weight, n, channels, x[0, 0].numel(), ctx.groups, [True, False, False]
            )[0]
        flat = dy.reshape(n, channels, -1)
        if ctx.needs_input_grad[1]:
            grouped = x.reshape(n, ctx.groups, -1)
            xhat = (grouped - mean.view(n, ctx.groups, 1)) * rstd.view(n, ctx.groups, 1)
            values = (flat * xhat.view(n, channels, -1)).sum(2, dtype=stat_dtype(dy))
            dw, w_stats = of_weight.of_tasks(of_weight.segments(values[:, None]), weight.shape, weight.dtype)
        if ctx.needs_input_grad[2]:
            beta = of_bias.segments(flat.sum(2, dtype=stat_dtype(dy))[:, None])
            db, b_stats = of_bias.of_tasks(beta, weight.shape, weight.dtype)
        return saved.gradients((dx, dw, db, None, None), w_stats, b_stats)


def _wide(module: nn.Module, x: Tensor) -> tuple[Tensor, torch.dtype]:
    """``x`` in the dtype the norm computes in, and the dtype of its output.

    Autocast runs norms in float32 on a GPU and keeps the input's dtype on a CPU, where weight and input may differ.
    """
    assert isinstance(module.weight, Tensor)
    out = torch.float32 if autocast_dtype(x) is not None and x.device.type == "cuda" else x.dtype
    return x.to(torch.promote_types(out, module.weight.dtype)), out


@register_capture(nn.LayerNorm)
class LayerNormCapture(Capture):
    def forward(self, module: nn.Module, rows: Rows, gauges: Mapping[str, Gauge], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        shape = list(module.normalized_shape)
        x = args[0] if args else kwargs["input"]
        entries = rows_of(rows, x, len(shape))
        wide, dtype = _wide(module, x)
        packed = pack(rows, gauges.get("weight"), gauges.get("bias"))
        out = _LayerNorm.apply(wide, module.weight, module.bias, shape, module.eps, entries, *packed)
        return out.to(dtype)  # type: ignore[no-any-return]


@register_capture(nn.RMSNorm)
class RMSNormCapture(Capture):
    params = ("weight",)

    def forward(self, module: nn.Module, rows: Rows, gauges: Mapping[str, Gauge], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        x = args[0] if args else kwargs["x"]
        dims = list(range(-len(module.normalized_shape), 0))
        entries = rows_of(rows, x, len(dims))
        packed = pack(rows, gauges["weight"])
        wide = WIDE and x.device.type == "cuda" and autocast_dtype(x) is not None
        if wide:
            x = _widened(x)
        return _RMSNorm.apply(x, module.weight, dims, module.eps, entries, wide, *packed)  # type: ignore[no-any-return]


@register_capture(nn.GroupNorm)
class GroupNormCapture(Capture):
    def forward(self, module: nn.Module, rows: Rows, gauges: Mapping[str, Gauge], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        x = args[0] if args else kwargs["input"]
        if len(rows.shape) != 1:
            raise Unattributed(f"a group norm needs one id per example, got ids of shape {rows.shape}")
        rows_of(rows, x)
        wide, dtype = _wide(module, x)
        packed = pack(rows, gauges.get("weight"), gauges.get("bias"))
        out = _GroupNorm.apply(wide, module.weight, module.bias, module.num_groups, module.eps, *packed)
        return out.to(dtype)  # type: ignore[no-any-return]
