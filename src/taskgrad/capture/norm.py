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
from .base import (
    NOTHING,
    Capture,
    Probe,
    Unattributed,
    autocast_dtype,
    by_entry,
    receipt_grad,
    refuse_double_backward,
    register_capture,
    rows_of,
)
from .tap import tap_grad_of, wants_gram
from .task_rows import Rows


def _grad_and_stats(
    sums: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    tracked: bool,
    gram: bool,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """From the per-task gradients [T + 1, numel] of a parameter of ``shape`` and ``dtype``: its gradient and its
    sketches."""
    sums = sums.view(-1, *shape)
    return sums.sum(0).to(dtype), tap_grad_of(sums, gram, left, right) if tracked else None


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
        order: Tensor | None,
        offsets: Tensor,
        receipt: Tensor,
        w_tap: Tensor | None,
        w_left: Tensor | None,
        w_right: Tensor | None,
        b_tap: Tensor | None,
        b_left: Tensor | None,
        b_right: Tensor | None,
    ) -> Tensor:
        out, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd, order, offsets, receipt, w_left, w_right, b_left, b_right)
        ctx.shape, ctx.entries = shape, entries
        ctx.track_weight, ctx.track_bias = w_tap is not None, b_tap is not None
        ctx.w_gram = wants_gram(w_tap, weight, w_left, w_right)
        ctx.b_gram = wants_gram(b_tap, bias, b_left, b_right)
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        x, weight, bias, mean, rstd, order, offsets, receipt, *maps = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            dx = torch.ops.aten.native_layer_norm_backward(dy, x, ctx.shape, mean, rstd, weight, bias, mask)[0]
        rows = by_entry(x, ctx.entries, len(ctx.shape))
        mean, rstd = (t.reshape(rows[:2]).to(stat_dtype(x)) for t in (mean, rstd))
        gamma, beta = torch.ops.taskgrad.norm_segment_sum(dy.reshape(rows), x.reshape(rows), mean, rstd, order, offsets)
        dw = db = w_stats = b_stats = None
        like = (weight.shape, weight.dtype)
        if ctx.needs_input_grad[1]:
            dw, w_stats = _grad_and_stats(gamma, *like, ctx.track_weight, ctx.w_gram, *maps[:2])
        if ctx.needs_input_grad[2]:
            db, b_stats = _grad_and_stats(beta, *like, ctx.track_bias, ctx.b_gram, *maps[2:])
        none = (None,) * 5
        return dx, dw, db, *none, receipt_grad(receipt), w_stats, None, None, b_stats, None, None


class _RMSNorm(torch.autograd.Function):
    """y = γ x̂ with x̂ = x / rms(x); dX = (γ dY − x̂ mean(γ dY x̂)) / rms(x), in float32 or float64."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        dims: list[int],
        eps: float | None,
        entries: int,
        order: Tensor | None,
        offsets: Tensor,
        receipt: Tensor,
        tap: Tensor,
        left: Tensor | None,
        right: Tensor | None,
    ) -> Tensor:
        out, rstd = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        # what is not needed is not kept: it may be written to before the backward pass, as without tracking
        if not ctx.needs_input_grad[0]:
            x, rstd = x.to(rstd.dtype) * rstd, torch.ones_like(rstd)
        ctx.save_for_backward(
            x, weight if ctx.needs_input_grad[0] else None, rstd, order, offsets, receipt, left, right
        )
        ctx.dims, ctx.entries, ctx.shape, ctx.dtype = dims, entries, weight.shape, weight.dtype
        ctx.gram = wants_gram(tap, weight, left, right)
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        x, weight, rstd, order, offsets, receipt, left, right = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            xhat, scaled = x.to(rstd.dtype) * rstd, dy.to(rstd.dtype) * weight
            dx = ((scaled - xhat * (scaled * xhat).mean(ctx.dims, keepdim=True)) * rstd).to(x.dtype)
        rows = by_entry(x, ctx.entries, len(ctx.shape))
        rstd = rstd.reshape(rows[:2])
        dy = dy.to(torch.promote_types(dy.dtype, x.dtype))
        gamma, _ = torch.ops.taskgrad.norm_segment_sum(
            dy.reshape(rows), x.reshape(rows).to(dy.dtype), None, rstd, order, offsets
        )
        dw, stats = _grad_and_stats(gamma, ctx.shape, ctx.dtype, True, ctx.gram, left, right)
        none = (None,) * 5
        return dx, dw, *none, receipt_grad(receipt), stats, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        eps: float,
        order: Tensor | None,
        offsets: Tensor,
        receipt: Tensor,
        w_tap: Tensor | None,
        w_left: Tensor | None,
        w_right: Tensor | None,
        b_tap: Tensor | None,
        b_left: Tensor | None,
        b_right: Tensor | None,
    ) -> Tensor:
        n, channels = x.shape[:2]
        size = x[0, 0].numel()
        if not (x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()  # as torch does
        out, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, n, channels, size, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd, order, offsets, receipt, w_left, w_right, b_left, b_right)
        ctx.groups = groups
        ctx.track_weight, ctx.track_bias = w_tap is not None, b_tap is not None
        ctx.w_gram = wants_gram(w_tap, weight, w_left, w_right)
        ctx.b_gram = wants_gram(b_tap, bias, b_left, b_right)
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        x, weight, mean, rstd, order, offsets, receipt, *maps = ctx.saved_tensors
        x, dy = x.contiguous(), dy.contiguous()
        n, channels = x.shape[:2]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.native_group_norm_backward(
                dy, x, mean, rstd, weight, n, channels, x[0, 0].numel(), ctx.groups, [True, False, False]
            )[0]
        flat = dy.reshape(n, channels, -1)
        dw = db = w_stats = b_stats = None
        if ctx.needs_input_grad[1]:
            grouped = x.reshape(n, ctx.groups, -1)
            xhat = (grouped - mean.view(n, ctx.groups, 1)) * rstd.view(n, ctx.groups, 1)
            values = (flat * xhat.view(n, channels, -1)).sum(2, dtype=stat_dtype(dy))
            gamma = torch.ops.taskgrad.segment_sum(values[:, None], order, offsets)
            dw, w_stats = _grad_and_stats(gamma, weight.shape, weight.dtype, ctx.track_weight, ctx.w_gram, *maps[:2])
        if ctx.needs_input_grad[2]:
            beta = torch.ops.taskgrad.segment_sum(flat.sum(2, dtype=stat_dtype(dy))[:, None], order, offsets)
            db, b_stats = _grad_and_stats(beta, weight.shape, weight.dtype, ctx.track_bias, ctx.b_gram, *maps[2:])
        none = (None,) * 4
        return dx, dw, db, *none, receipt_grad(receipt), w_stats, None, None, b_stats, None, None


def _wide(module: nn.Module, x: Tensor) -> tuple[Tensor, torch.dtype]:
    """``x`` in the dtype the norm computes in, and the dtype of its output.

    Autocast runs norms in float32 on a GPU and keeps the input's dtype on a CPU, where weight and input may differ.
    """
    assert isinstance(module.weight, Tensor)
    out = torch.float32 if autocast_dtype(x) is not None and x.device.type == "cuda" else x.dtype
    return x.to(torch.promote_types(out, module.weight.dtype)), out


def _tensors(probes: Mapping[str, Probe]) -> tuple[Tensor | None, ...]:
    both = (probes.get("weight"), probes.get("bias"))
    return tuple(t for probe in both for t in (NOTHING if probe is None else probe.tensors))


@register_capture(nn.LayerNorm)
class LayerNormCapture(Capture):
    def forward(self, module: nn.Module, rows: Rows, probes: Mapping[str, Probe], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        shape = list(module.normalized_shape)
        x = args[0] if args else kwargs["input"]
        entries = rows_of(rows, x, len(shape))
        wide, dtype = _wide(module, x)
        out = _LayerNorm.apply(
            wide,
            module.weight,
            module.bias,
            shape,
            module.eps,
            entries,
            rows.order,
            rows.offsets,
            rows.receipt,
            *_tensors(probes),
        )
        return out.to(dtype)  # type: ignore[no-any-return]


@register_capture(nn.RMSNorm)
class RMSNormCapture(Capture):
    params = ("weight",)

    def forward(self, module: nn.Module, rows: Rows, probes: Mapping[str, Probe], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        x = args[0] if args else kwargs["x"]
        dims = list(range(-len(module.normalized_shape), 0))
        entries = rows_of(rows, x, len(dims))
        out = _RMSNorm.apply(
            x,
            module.weight,
            dims,
            module.eps,
            entries,
            rows.order,
            rows.offsets,
            rows.receipt,
            *probes["weight"].tensors,
        )
        return out  # type: ignore[no-any-return]


@register_capture(nn.GroupNorm)
class GroupNormCapture(Capture):
    def forward(self, module: nn.Module, rows: Rows, probes: Mapping[str, Probe], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        x = args[0] if args else kwargs["input"]
        if len(rows.shape) != 1:
            raise Unattributed(f"a group norm needs one id per example, got ids of shape {rows.shape}")
        rows_of(rows, x)
        wide, dtype = _wide(module, x)
        out = _GroupNorm.apply(
            wide,
            module.weight,
            module.bias,
            module.num_groups,
            module.eps,
            rows.order,
            rows.offsets,
            rows.receipt,
            *_tensors(probes),
        )
        return out.to(dtype)  # type: ignore[no-any-return]
