"""``wgrad_sketch``: the weight gradient of a linear layer and, per task, its sketch, from one pair (dY, X).

With X_t, dY_t the rows of task t, the task's gradient is G_t = dY_tᵀ X_t and dW = Σ_t G_t. Its two-sided sketch is
Lᵀ G_t R = (dY_t L)ᵀ (X_t R): two skinny products of cost r/d of the dense one, whatever the number of tasks (LoGra,
arXiv 2405.13954). Without L and R the G_t themselves are the result, and dW is their sum: the split of the product by
task costs no extra multiplications.
"""

from __future__ import annotations

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
    u = dy.to(dtype) if left is None else dy.to(dtype) @ left.to(dtype)
    v = x.to(dtype) if right is None else x.to(dtype) @ right.to(dtype)
    stats = segment_products(u, v, order, offsets)
    if left is None and right is None:
        return stats.sum(0).to(dy.dtype), stats
    return dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]), stats


@wgrad_sketch.register_fake
def _(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    stats = dy.new_empty(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))
    return dy.new_empty(dy.shape[-1], x.shape[-1]), stats


def segment_products(u: Tensor, v: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """S_t = U_tᵀ V_t for u [E, M, r0], v [E, M, r1]: [T + 1, r0, r1], zero for empty tasks."""
    bounds = offsets.tolist()
    if order is not None:
        u, v = u.index_select(0, order), v.index_select(0, order)
    rows = u.shape[1]
    u, v = u.reshape(-1, u.shape[-1]), v.reshape(-1, v.shape[-1])
    out = u.new_zeros(len(bounds) - 1, u.shape[-1], v.shape[-1])
    for t, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if end > start:
            torch.mm(u[start * rows : end * rows].mT, v[start * rows : end * rows], out=out[t])
    return out
