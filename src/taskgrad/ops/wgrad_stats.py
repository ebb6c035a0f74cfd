"""``wgrad_stats``: the weight gradient of a linear layer, its sketch per segment and the exact Gram of its parts.

What ``wgrad_gram`` and ``wgrad_sketch`` give, with the weight-gradient product done once. The Gram is of this one use
of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _shared
from ._shared import stat_dtype
from .cost_model import GRAM, cheapest, costs
from .wgrad_sketch import check_entries, sketch_of_rows


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
    _check(dy, x, order, offsets, left, right, strategy)
    _shared.check_real("dy", dy)
    maps = (None if side is None else side.detach() for side in (left, right))
    dw, stats, gram = torch.ops.taskgrad.wgrad_stats(dy.detach(), x.detach(), order, offsets, *maps, strategy)
    wrong = _shared.fault_on_gpu(order, offsets, dy.shape[0])
    return _shared.spoiled(dw, wrong), _shared.spoiled(stats, wrong), _shared.spoiled(gram, wrong)


def _check(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strategy: str | None,
) -> None:
    check_entries(dy, x, order, offsets, left, right)
    if strategy not in (None, "fused", "ghost", "materialise"):
        raise ValueError(f'strategy must be "fused", "ghost", "materialise" or None, got {strategy!r}')


@torch.library.custom_op("taskgrad::wgrad_stats", mutates_args=())
def _op(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strategy: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(dy, x, order, offsets, left, right, strategy)
    _shared.check_values(order, offsets, dy.shape[0])
    ops = torch.ops.taskgrad
    if strategy == "materialise" or (strategy is None and left is None and right is None):
        dw, parts = ops.wgrad_sketch(dy, x, order, offsets, None, None)
        gram = ops.sum_gram(parts.flatten(1))[1]
        parts = parts if left is None else left.to(parts.dtype).mT @ parts
        return dw, parts if right is None else parts @ right.to(parts.dtype), gram
    stats = sketch_of_rows(dy, x, order, offsets, left, right)
    if order is not None:
        order = _shared.within(order, dy.shape[0])
        dy, x = dy.index_select(0, order), x.index_select(0, order)
    rows = offsets.long() * dy.shape[1]
    dy, x = dy.flatten(0, 1), x.flatten(0, 1)
    if strategy is None:
        _, found = costs(dy.shape[0], x.shape[1], dy.shape[1], len(offsets) - 1, dy.dtype, dy.device)
        strategy = cheapest(found, GRAM)
    if strategy == "ghost":
        return dy.mT @ x, stats, ops.ghost_gram(dy, x, rows, False)
    dw, gram = ops.wgrad_gram(dy, x, rows, False)
    return dw, stats, gram


@_op.register_fake
def _fake(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strategy: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(dy, x, order, offsets, left, right, strategy)
    segments = offsets.shape[0] - 1
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    return (
        dy.new_empty(dy.shape[-1], x.shape[-1]),
        dy.new_empty(segments, r0, r1, dtype=stat_dtype(dy)),
        dy.new_empty(segments, segments, dtype=torch.float64),
    )
