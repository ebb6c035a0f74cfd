"""``wgrad_stats``: the weight gradient of a linear layer, its sketch per segment and the exact Gram of its parts.

What ``wgrad_gram`` and ``wgrad_sketch`` give, with the weight-gradient product done once. The Gram is of this one use
of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._register import register
from .cost_model import cheapest, costs
from .segment_sum import stat_dtype
from .segments import segments_at, within
from .wgrad_sketch import sketch_of_rows


def wgrad_stats(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strategy: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight gradient, unscaled sketch and exact Gram per segment.

    Args:
        dy, x, order, offsets, left, right: as for ``wgrad_sketch``.
        strategy: how to take the Gram: "fused", in the kernel that gives the weight gradient; "ghost", from products of
            rows; "materialise", from all the parts at once. ``None``: what ``taskgrad.ops.cost_model`` finds cheaper of
            the first two, and the last where the parts are the result (no ``left``, no ``right``).

    Returns:
        dW and S [S, r0, r1] as from ``wgrad_sketch``, and the Gram [S, S] in float64.

    Raises:
        TypeError, ValueError: as ``wgrad_sketch``, or another ``strategy``.
    """
    dw, stats, gram = _OP(dy, x, order, offsets, left, right, strategy)
    return dw, stats, gram


def _check_arguments(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strategy: str | None = None,
) -> None:
    _check.check_entries(dy, x, order, offsets, left, right)
    if strategy not in (None, "fused", "ghost", "materialise"):
        raise ValueError(f'strategy must be "fused", "ghost", "materialise" or None, got {strategy!r}')


def gram_strategy(dy: Tensor, x: Tensor, offsets: Tensor, left: Tensor | None, right: Tensor | None) -> str:
    """How the Gram is taken where nobody says how; by shapes, dtype and device alone."""
    if left is None and right is None:
        return "materialise"
    rows = dy.shape[0] * dy.shape[1]
    return cheapest(costs(rows, x.shape[2], dy.shape[2], offsets.shape[0] - 1, dy.dtype, dy.device)[1])


def _stats(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strategy: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    ops = torch.ops.taskgrad
    if strategy is None:
        strategy = gram_strategy(dy, x, offsets, left, right)
    if strategy == "materialise":
        dw, parts = ops.wgrad_sketch(dy, x, order, offsets, None, None)
        gram = ops.sum_gram(parts.flatten(1))[1]
        parts = parts if left is None else left.to(parts.dtype).mT @ parts
        return dw, parts if right is None else parts @ right.to(parts.dtype), gram
    stats = sketch_of_rows(dy, x, order, offsets, left, right)
    if order is not None:
        order = within(order, dy.shape[0])
        dy, x = dy.index_select(0, order), x.index_select(0, order)
    rows = offsets.long() * dy.shape[1]
    dy, x = dy.flatten(0, 1), x.flatten(0, 1)
    if strategy == "ghost":
        return dy.mT @ x, stats, ops.ghost_gram(dy, x, rows)
    dw, gram = ops.wgrad_gram(dy, x, rows)
    return dw, stats, gram


def _fake(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strategy: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = offsets.shape[0] - 1
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    return (
        dy.new_empty(dy.shape[-1], x.shape[-1]),
        dy.new_empty(segments, r0, r1, dtype=stat_dtype(dy)),
        dy.new_empty(segments, segments, dtype=torch.float64),
    )


_OP = register(
    "wgrad_stats(Tensor dy, Tensor x, Tensor? order, Tensor offsets, Tensor? left, Tensor? right, str? strategy=None)"
    " -> (Tensor dw, Tensor stats, Tensor gram)",
    check=_check_arguments,
    values=segments_at(order=2, offsets=3),
    fake=_fake,
    reference=_stats,
)
