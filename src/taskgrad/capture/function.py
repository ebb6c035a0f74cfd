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
from .base import Probe
from .sketch import scaled
from .tap import Keeps, tap_grad, tap_grad_of
from .task_rows import Rows

Packed = tuple[Any, ...]
Split = tuple[Tensor, Tensor | None]  # the gradient of a parameter, and of its tap

HEAD = 4  # entries of what is packed before those of the parameters


def pack(rows: Rows, *probes: Probe | None, offsets: Tensor | None = None) -> Packed:
    """The last arguments of a Function: what it has to know of the batch and of its parameters, in their order;
    ``None`` for one that is not split. ``offsets``: those of ``rows``, unless others are given."""
    keeps = tuple(None if p is None else p.layout.keeps for p in probes)
    tensors = (t for p in probes for t in ((None, None, None) if p is None else p.tensors))
    return keeps, rows.order, rows.offsets if offsets is None else offsets, rows.receipt, *tensors


def keep(ctx: Any, packed: Packed, *tensors: Tensor | None) -> None:
    """Save for the backward pass what was packed, and ``tensors`` (through ``save_for_backward``, which keeps the
    memory saving of activation checkpointing)."""
    ctx.keeps, order, offsets, receipt = packed[:HEAD]
    maps = [side for i in range(HEAD, len(packed), 3) for side in packed[i + 1 : i + 3]]
    ctx.save_for_backward(order, offsets, receipt, *maps, *tensors)


class Part(NamedTuple):
    """How the gradient of one parameter is split.

    Attributes:
        keeps: what its tap keeps; ``None``: the parameter is not split.
        left, right: its sketch.
        order, offsets: of the rows.
    """

    keeps: Keeps | None
    left: Tensor | None
    right: Tensor | None
    order: Tensor | None
    offsets: Tensor

    def of_tasks(self, grads: Tensor, shape: torch.Size, dtype: torch.dtype) -> Split:
        """From the tasks' gradients themselves, [T + 1, numel], for a parameter of ``shape`` and ``dtype``."""
        return self._of_shaped(grads.view(-1, *shape), dtype)

    def _of_shaped(self, grads: Tensor, dtype: torch.dtype) -> Split:
        stats = None if self.keeps is None else tap_grad_of(grads, self.keeps, self.left, self.right)
        return grads.sum(0).to(dtype), stats

    def stats(self, values: Tensor, gram: Tensor | None = None) -> Tensor:
        """The gradient of the tap, from what the ops made of the maps, not divided by sqrt(r0 r1) yet."""
        assert self.keeps is not None
        return tap_grad(scaled(values, self.left, self.right), self.keeps, gram)

    def segments(self, values: Tensor) -> Tensor:
        """Sums of ``values`` [E, M, features] over each task's rows, [T + 1, features]."""
        out: Tensor = torch.ops.taskgrad.segment_sum(values, self.order, self.offsets)
        return out

    def sums(self, values: Tensor, dtype: torch.dtype) -> Split:
        """Of a vector: the sums of ``values`` [E, M, features] over all rows."""
        if self.keeps is None:
            return values.sum((0, 1), dtype=stat_dtype(values)).to(dtype), None
        return self._of_shaped(self.segments(values), dtype)

    def product(self, first: Tensor, second: Tensor) -> Split:
        """Of a matrix: Σ_{rows} first ⊗ second, from [E, M, d0] and [E, M, d1]."""
        if self.keeps is None:
            return first.flatten(0, 1).mT @ second.flatten(0, 1), None
        where = (first, second, self.order, self.offsets, self.left, self.right)
        if self.keeps == "gram":
            grad, stats, gram = torch.ops.taskgrad.wgrad_stats(*where)
            return grad, self.stats(stats, gram)
        grad, stats = torch.ops.taskgrad.wgrad_sketch(*where)
        return grad, self.stats(stats)

    def convolution(self, dy: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Split:
        """Of the weight of a convolution from ``x`` to ``dy``; ``options``: stride, padding, dilation, groups."""
        # a Gram needs all the tasks' gradients of this layer at once
        maps = (None, None) if self.keeps == "gram" else (self.left, self.right)
        grad, stats = torch.ops.taskgrad.conv_sketch(dy, x, weight, *options, self.order, self.offsets, *maps)
        if self.keeps == "gram":
            return grad, tap_grad_of(stats, self.keeps, self.left, self.right)
        return grad, self.stats(stats)


class Kept(NamedTuple):
    """What ``keep`` saved: the ``parts`` of the parameters, in their order, and the ``tensors``."""

    parts: tuple[Part, ...]
    tensors: tuple[Any, ...]
    receipt: Tensor

    def gradients(self, own: tuple[Tensor | None, ...], *stats: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the backward pass returns: of the Function's ``own`` arguments, and of every parameter's tap."""
        taps = (t for part in stats for t in (part, None, None))
        return *own, None, None, None, torch.ones_like(self.receipt), *taps


def kept(ctx: Any) -> Kept:
    """To be called first in the backward pass. Raises RuntimeError where that is to be differentiated itself."""
    refuse_double_backward()
    order, offsets, receipt, *rest = ctx.saved_tensors
    keeps = ctx.keeps
    parts = [Part(what, rest[2 * i], rest[2 * i + 1], order, offsets) for i, what in enumerate(keeps)]
    return Kept(tuple(parts), tuple(rest[2 * len(keeps) :]), receipt)


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
