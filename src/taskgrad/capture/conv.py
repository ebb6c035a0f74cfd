"""``nn.Conv1d`` and ``nn.Conv2d``, with groups, stride, dilation and every padding mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.segment_sum import stat_dtype
from .base import Capture, Probe, Unattributed, register_capture, rows_of, shape_text
from .function import keep, kept, operands, pack
from .task_rows import Rows


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...], *packed: Any
    ) -> Tensor:
        keep(ctx, packed, x, weight)
        ctx.options = stride, padding, dilation, groups = options
        zeros = [0] * len(stride)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, zeros, groups).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (x, weight), (of_weight, of_bias) = saved.tensors, saved.parts
        stride, padding, dilation, groups = ctx.options
        tracked = of_weight.gram is not None
        dx = dw = db = w_stats = b_stats = None
        plain = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not tracked, False]
        if any(plain):
            zeros = [0] * len(stride)
            dx, dw, _ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, dilation, False, zeros, groups, plain
            )
        if tracked:
            dw, w_stats = of_weight.convolution(dy, x, weight, ctx.options)
        if ctx.needs_input_grad[2]:
            db, b_stats = of_bias.sums(dy.flatten(2).sum(2, dtype=stat_dtype(dy))[:, None], dy.dtype)
        return saved.gradients((dx, dw, db, None), w_stats, b_stats)


def check_rows(module: nn.Module, rows: Rows, x: Tensor) -> None:
    """Raise Unattributed unless every entry of ``x`` is an example with one id."""
    if x.dim() != len(module.kernel_size) + 2 or len(rows.shape) != 1:  # type: ignore[arg-type]
        raise Unattributed(
            f"a convolution needs a batched input and one id per example, got an input of {shape_text(x)} "
            f"and ids of shape {rows.shape}"
        )
    rows_of(rows, x)


@register_capture(nn.Conv1d)
@register_capture(nn.Conv2d)
class ConvCapture(Capture):
    def forward(self, module: nn.Module, rows: Rows, probes: Mapping[str, Probe], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        x = args[0] if args else kwargs["input"]
        check_rows(module, rows, x)
        padding = module.padding
        if module.padding_mode != "zeros":
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * len(module.kernel_size)
        elif isinstance(padding, str):
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice)
            padding = (0,) * len(module.kernel_size)
        tensors = operands(rows, x, module.weight, module.bias)
        options = list(module.stride), list(padding), list(module.dilation), module.groups
        packed = pack(rows, probes.get("weight"), probes.get("bias"), offsets=rows.ids_offsets)
        return _Conv.apply(*tensors, options, *packed)  # type: ignore[no-any-return]
