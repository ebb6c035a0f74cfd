"""``wgrad_sketch``: the weight gradient of a linear layer and, per task, its sketch, from one pair (dY, X).

With X_t, dY_t the rows of task t, the task's gradient is G_t = dY_tᵀ X_t and dW = Σ_t G_t. Its two-sided sketch is
Lᵀ G_t R = (dY_t L)ᵀ (X_t R): two skinny products of cost r/d of the dense one, whatever the number of tasks (LoGra,
arXiv 2405.13954). Where the G_t are small (or wanted: without L and R) they are formed instead, and dW is their sum:
splitting the product by task costs no extra multiplications.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .segment_sum import stat_dtype


@torch.library.custom_op("taskgrad::wgrad_sketch", mutates_args=())
def wgrad_sketch(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight gradient and its unscaled sketch per task.

    Args:
        dy: [E, M, d_out], gradient of the output: E entries with a task id each, M rows per entry.
        x: [E, M, d_in], input, same dtype as ``dy``.
        order: int64 [E], entries sorted by task; ``None`` if sorted already.
        offsets: int64 [T + 2] on the CPU; task t owns entries ``order[offsets[t]:offsets[t + 1]]``.
        left: [d_out, r0] or ``None`` for the identity.
        right: [d_in, r1] or ``None`` for the identity.

    Returns:
        dW [d_out, d_in] in the dtype of ``dy`` and S [T + 1, r0, r1] with S_t = leftᵀ G_t right, float64 for float64
        and float32 otherwise.
    """
    dtype = stat_dtype(dy)
    wide_dy, wide_x = dy.to(dtype), x.to(dtype)
    if splitting_is_cheaper(dy, x, offsets, left, right):
        grads = segment_products(wide_dy, wide_x, order, offsets)
        stats = grads if left is None else left.to(dtype).mT @ grads
        stats = stats if right is None else stats @ right.to(dtype)
        return grads.sum(0).to(dy.dtype), stats
    u = wide_dy if left is None else wide_dy @ left.to(dtype)
    v = wide_x if right is None else wide_x @ right.to(dtype)
    stats = segment_products(u, v, order, offsets)
    return dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]), stats


@wgrad_sketch.register_fake
def _(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    stats = dy.new_empty(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))
    return dy.new_empty(dy.shape[-1], x.shape[-1]), stats


def splitting_is_cheaper(dy: Tensor, x: Tensor, offsets: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    """Whether to form the G_t and sketch them rather than to sketch dY and X: multiplications beyond those of dW.

    Where it is, the G_t together are smaller than the activations. Without sketch there is nothing else to do.
    """
    if left is None and right is None:
        return True
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    rows = dy.shape[0] * dy.shape[1]
    activations = rows * r0 * r1
    activations += 0 if left is None else rows * dy.shape[-1] * r0
    activations += 0 if right is None else rows * x.shape[-1] * r1
    per_task = 0 if left is None else dy.shape[-1] * x.shape[-1] * r0
    per_task += 0 if right is None else r0 * x.shape[-1] * r1
    return (offsets.shape[0] - 1) * per_task < activations


def segment_products(u: Tensor, v: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """S_t = U_tᵀ V_t for u [E, M, r0], v [E, M, r1]: [T + 1, r0, r1], zero for empty tasks."""
    bounds = offsets.tolist()
    if order is not None:
        u, v = u.index_select(0, order), v.index_select(0, order)
    rows = u.shape[1]
    u, v = u.reshape(-1, u.shape[-1]), v.reshape(-1, v.shape[-1])
    out = u.new_zeros(len(bounds) - 1, u.shape[-1], v.shape[-1])
    for t, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(u[start * rows : end * rows].mT, v[start * rows : end * rows], out=out[t])
    return out
