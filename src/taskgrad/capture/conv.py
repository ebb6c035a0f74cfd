"""``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` with groups, stride, dilation and every padding mode, and their
``nn.ConvTranspose``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.segment_sum import stat_dtype
from .base import Capture, Probe, Unattributed, register_capture, rows_of, shape_text
from .function import keep, kept, operands, pack
from .task_rows import Rows


class _Conv(torch.autograd.Function):
    """``options`` as ``torch.convolution`` takes them: stride, padding, dilation, transposed, output padding, groups. A
    transposed one is a convolution from y to x run backward: its weight's gradient is that of the other, with x in the
    place of dY and dY in the place of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...], *packed: Any
    ) -> Tensor:
        keep(ctx, packed, x, weight)
        ctx.options = options
        return torch.convolution(x, weight, bias, *options).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (x, weight), (of_weight, of_bias) = saved.tensors, saved.parts
        stride, padding, dilation, transposed, _, groups = ctx.options
        tracked = of_weight.keeps is not None
        dx = dw = db = w_stats = b_stats = None
        plain = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not tracked, False]
        if any(plain):
            dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *ctx.options, plain)
        if tracked:
            out, inputs = (x, dy) if transposed else (dy, x)
            dw, w_stats = of_weight.convolution(out, inputs, weight, (stride, padding, dilation, groups))
        if ctx.needs_input_grad[2]:
            db, b_stats = of_bias.sums(dy.flatten(2).sum(2, dtype=stat_dtype(dy))[:, None], dy.dtype)
        return saved.gradients((dx, dw, db, None), w_stats, b_stats)


class _AnyConv(Capture):
    """What convolutions and transposed ones share."""

    def run(
        self,
        module: Any,
        rows: Rows,
        probes: Mapping[str, Probe],
        x: Tensor,
        padding: Sequence[int],
        transposed: bool,
        output_padding: list[int],
    ) -> Tensor:
        """The module on ``x``, with its own stride, dilation and groups."""
        tensors = operands(rows, x, module.weight, module.bias)
        options = list(module.stride), list(padding), list(module.dilation), transposed, output_padding, module.groups
        # the tasks are gone through on the host
        packed = pack(rows, probes.get("weight"), probes.get("bias"), offsets=rows.ids_offsets)
        return _Conv.apply(*tensors, options, *packed)  # type: ignore[no-any-return]

    def check(self, module: Any, rows: Rows, x: Tensor) -> None:
        """Raise Unattributed unless every entry of ``x`` is an example with one id."""
        if x.dim() != len(module.kernel_size) + 2 or len(rows.shape) != 1:
            raise Unattributed(
                f"a convolution needs a batched input and one id per example, got an input of {shape_text(x)} "
                f"and ids of shape {rows.shape}"
            )
        rows_of(rows, x)


@register_capture(nn.Conv1d)
@register_capture(nn.Conv2d)
@register_capture(nn.Conv3d)
class ConvCapture(_AnyConv):
    def forward(self, module: nn.Module, rows: Rows, probes: Mapping[str, Probe], *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        x = args[0] if args else kwargs["input"]
        self.check(module, rows, x)
        padding, zeros = module.padding, [0] * len(module.kernel_size)
        if module.padding_mode != "zeros":
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = tuple(zeros)
        elif isinstance(padding, str):
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice)
            padding = tuple(zeros)
        return self.run(module, rows, probes, x, padding, False, zeros)


@register_capture(nn.ConvTranspose1d)
@register_capture(nn.ConvTranspose2d)
@register_capture(nn.ConvTranspose3d)
class ConvTransposeCapture(_AnyConv):
    def forward(
        self,
        module: nn.Module,
        rows: Rows,
        probes: Mapping[str, Probe],
        input: Tensor,
        output_size: list[int] | None = None,
    ) -> Tensor:
        assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        self.check(module, rows, input)
        stride, padding, kernel, dilation = module.stride, module.padding, module.kernel_size, module.dilation
        assert not isinstance(padding, str)  # only the type of its base class allows that
        sizes: Any = (input, output_size, stride, padding, kernel, len(kernel), dilation)
        extra = module._output_padding(*sizes)
        if any(e >= s for e, s in zip(extra, stride, strict=True)):
            raise Unattributed(
                f"an output_padding of {tuple(extra)} with a stride of {tuple(stride)} leaves outputs that no "
                "convolution back to the input passes"
            )
        return self.run(module, rows, probes, input, padding, True, list(extra))
