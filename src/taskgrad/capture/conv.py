"""``nn.Conv1d`` and ``nn.Conv2d``, with groups, stride, dilation and every padding mode."""

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
    receipt_grad,
    refuse_double_backward,
    register_capture,
    rows_of,
    shape_text,
)
from .sketch import scaled
from .tap import tap_grad_of, wants_gram
from .task_rows import Rows


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
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
        ctx.save_for_backward(x, weight, order, offsets, receipt, w_left, w_right, b_left, b_right)
        ctx.options = stride, padding, dilation, groups
        ctx.track_weight, ctx.track_bias = w_tap is not None, b_tap is not None
        ctx.w_gram = wants_gram(w_tap, weight, w_left, w_right)
        ctx.b_gram = wants_gram(b_tap, bias, b_left, b_right)
        zeros = [0] * len(stride)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, zeros, groups).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        x, weight, order, offsets, receipt, w_left, w_right, b_left, b_right = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        dx = dw = db = w_stats = b_stats = None
        plain = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not ctx.track_weight, False]
        if any(plain):
            zeros = [0] * len(stride)
            dx, dw, _ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, dilation, False, zeros, groups, plain
            )
        if ctx.track_weight:
            # a Gram needs all the tasks' gradients of this layer at once
            maps = (None, None) if ctx.w_gram else (w_left, w_right)
            dw, stats = torch.ops.taskgrad.conv_sketch(
                dy, x, weight, stride, padding, dilation, groups, order, offsets, *maps
            )
            w_stats = tap_grad_of(stats, True, w_left, w_right) if ctx.w_gram else scaled(stats, w_left, w_right)
        if ctx.needs_input_grad[2]:
            values = dy.flatten(2).sum(2, dtype=stat_dtype(dy))
            if ctx.track_bias:
                sums = torch.ops.taskgrad.segment_sum(values[:, None], order, offsets)
                db, b_stats = sums.sum(0).to(dy.dtype), tap_grad_of(sums, ctx.b_gram, b_left, b_right)
            else:
                db = values.sum(0).to(dy.dtype)
        none = (None,) * 6
        return dx, dw, db, *none, receipt_grad(receipt), w_stats, None, None, b_stats, None, None


@register_capture(nn.Conv1d)
@register_capture(nn.Conv2d)
class ConvCapture(Capture):
    def forward(self, module: nn.Module, rows: Rows, probes: Mapping[str, Probe], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        x = args[0] if args else kwargs["input"]
        if x.dim() != len(module.kernel_size) + 2 or len(rows.shape) != 1:
            raise Unattributed(
                f"a convolution needs a batched input and one id per example, got an input of {shape_text(x)} "
                f"and ids of shape {rows.shape}"
            )
        rows_of(rows, x)
        padding = module.padding
        if module.padding_mode != "zeros":
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * len(module.kernel_size)
        elif isinstance(padding, str):
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice)
            padding = (0,) * len(module.kernel_size)
        weight, bias = module.weight, module.bias
        dtype = autocast_dtype(x)
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        rows.half |= x.dtype in (torch.bfloat16, torch.float16)
        w_probe, b_probe = probes.get("weight"), probes.get("bias")
        out = _Conv.apply(
            x,
            weight,
            bias,
            list(module.stride),
            list(padding),
            list(module.dilation),
            module.groups,
            rows.order,
            rows.ids_offsets,
            rows.receipt,
            *(NOTHING if w_probe is None else w_probe.tensors),
            *(NOTHING if b_probe is None else b_probe.tensors),
        )
        return out  # type: ignore[no-any-return]
