"""What the autograd Functions of fused layers have in common: their arguments, packed once.

A Function is applied to the layer's tensors and options, then ``*pack(rows, ...)``. Its forward calls ``keep``, its
backward ``kept``, whose ``gradients`` is what it returns. Between the two it says what is its own: the layer's output,
dX, and how each parameter's gradient falls into the tasks' parts, with a ``Part`` for each parameter. Plain functions
and arguments, no base class: that is what torch.compile traces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.segment_sum import stat_dtype
from .base import Gauge
from .sketch import scaled
from .tap import tap_grad, tap_grad_of
from .task_rows import Rows

Packed = tuple[Any, ...]
Split = tuple[Tensor, Tensor | None]  # the gradient of a parameter, and of its tap

NOTHING = (None,) * 4  # for a parameter that is not split


def pack(rows: Rows, *gauges: Gauge | None, offsets: Tensor | None = None) -> Packed:
    """The last arguments of a Function: what it has to know of the batch, then four for each of its parameters, in
    their order; ``None`` for one that is not split. ``offsets``: those of ``rows``, unless others are given."""
    packed: Packed = rows.order, rows.offsets if offsets is None else offsets, rows.receipt
    for gauge in gauges:
        packed += NOTHING if gauge is None else gauge.packed
    return packed


def keep(ctx: Any, packed: Packed, *tensors: Tensor | None) -> None:
    """Save for the backward pass what was packed, and ``tensors`` (through ``save_for_backward``, which keeps the
    memory saving of activation checkpointing)."""
    ctx.grams = packed[3::4]
    ctx.save_for_backward(*packed[:3], *packed[5::4], *packed[6::4], *tensors)


class Part(NamedTuple):
    """How the gradient of one parameter is split.

    Attributes:
        gram: whether its tap wants the Gram too; ``None``: the parameter is not split.
        left, right: its sketch.
        order, offsets: of the rows.
    """

    gram: bool | None
    left: Tensor | None
    right: Tensor | None
    order: Tensor | None
    offsets: Tensor

    def of_tasks(self, grads: Tensor, shape: torch.Size, dtype: torch.dtype) -> Split:
        """From the tasks' gradients themselves, [T + 1, numel], for a parameter of ``shape`` and ``dtype``."""
        grads = grads.view(-1, *shape)
        stats = None if self.gram is None else tap_grad_of(grads, self.gram, self.left, self.right)
        return grads.sum(0).to(dtype), stats

    def segments(self, values: Tensor) -> Tensor:
        """Sums of ``values`` [E, M, features] over each task's rows, [T + 1, features]."""
        out: Tensor = torch.ops.taskgrad.segment_sum(values, self.order, self.offsets)
        return out

    def sums(self, values: Tensor, dtype: torch.dtype) -> Split:
        """Of a vector: the sums of ``values`` [E, M, features] over all rows."""
        if self.gram is None:
            return values.sum((0, 1), dtype=stat_dtype(values)).to(dtype), None
        grads = self.segments(values)
        return grads.sum(0).to(dtype), tap_grad_of(grads, self.gram, self.left, self.right)

    def product(self, first: Tensor, second: Tensor) -> Split:
        """Of a matrix: Σ_{rows} first ⊗ second, from [E, M, d0] and [E, M, d1]."""
        if self.gram is None:
            return first.flatten(0, 1).mT @ second.flatten(0, 1), None
        where = (first, second, self.order, self.offsets, self.left, self.right)
        if self.gram:
            grad, stats, gram = torch.ops.taskgrad.wgrad_stats(*where)
            return grad, tap_grad(scaled(stats, self.left, self.right), gram)
        grad, stats = torch.ops.taskgrad.wgrad_sketch(*where)
        return grad, scaled(stats, self.left, self.right)

    def convolution(self, dy: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Split:
        """Of the weight of a convolution from ``x`` to ``dy``; ``options``: stride, padding, dilation, groups."""
        # a Gram needs all the tasks' gradients of this layer at once
        maps = (None, None) if self.gram else (self.left, self.right)
        grad, stats = torch.ops.taskgrad.conv_sketch(dy, x, weight, *options, self.order, self.offsets, *maps)
        if self.gram:
            return grad, tap_grad_of(stats, True, self.left, self.right)
        return grad, scaled(stats, self.left, self.right)


class Kept(NamedTuple):
    """What ``keep`` saved: the ``parts`` of the parameters, in their order, and the ``tensors``."""

    parts: list[Part]
    tensors: list[Any]
    receipt: Tensor

    def gradients(self, own: tuple[Tensor | None, ...], *stats: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the backward pass returns: of the Function's ``own`` arguments, and of every parameter's tap."""
        packed: tuple[Tensor | None, ...] = None, None, torch.ones_like(self.receipt)
        for tap in stats:
            packed += None, tap, None, None
        return own + packed


def kept(ctx: Any) -> Kept:
    """To be called first in the backward pass. Raises RuntimeError where that is to be differentiated itself."""
    refuse_double_backward()
    order, offsets, receipt, *rest = ctx.saved_tensors
    n = len(ctx.grams)
    parts = [Part(*split, order, offsets) for split in zip(ctx.grams, rest[:n], rest[n:], strict=False)]
    return Kept(parts, rest[2 * n :], receipt)


def refuse_double_backward() -> None:
    """``create_graph=True`` would need gradients of the statistics."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "taskgrad does not support create_graph=True (a backward pass through the backward pass); "
            "run that forward outside of tracker.batch()"
        )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast casts a product's operands to, or ``None`` where it does not act on ``x``."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def operands(rows: Rows, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a product, as autocast would cast them outside of a custom Function; the gradient of the cast returns to
    ``param.grad``."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows.half |= x.dtype in (torch.bfloat16, torch.float16)
    return x, weight, bias
