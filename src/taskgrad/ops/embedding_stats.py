"""``embedding_stats``: the weight gradient of an embedding and, per task, its sketch, without a T×V×d block.

Row n adds dY_n to row index_n of the gradient: G_t = Σ_{n in t} e(index_n) dY_nᵀ, hence Lᵀ G_t R = Σ_n L[index_n]
(dY_n R)ᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segment_sum import stat_dtype
from .wgrad_sketch import segment_products


@torch.library.custom_op("taskgrad::embedding_stats", mutates_args=())
def embedding_stats(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Embedding gradient and its unscaled sketch per task.

    Args:
        dy: [E, M, d], gradient of the output: E entries with a task id each, M rows per entry.
        index: int64 or int32 [E, M], in [0, num_embeddings).
        order, offsets: the entries sorted by task, see ``wgrad_sketch``.
        num_embeddings: V.
        padding_idx: the index whose row gets no gradient; -1 for none.
        left: [V, r0] or ``None`` for the identity: only then is a block of T·V rows made.
        right: [d, r1] or ``None`` for the identity.

    Returns:
        dW [V, d] in the dtype of ``dy`` and S [T + 1, r0, r1], float64 for float64 and float32 otherwise.
    """
    dtype = stat_dtype(dy)
    dw = torch.ops.aten.embedding_dense_backward(dy, index, num_embeddings, padding_idx, False)
    v = dy.to(dtype) if right is None else dy.to(dtype) @ right.to(dtype)
    if padding_idx >= 0:
        v = v.masked_fill((index == padding_idx)[..., None], 0)
    if left is not None:
        return dw, segment_products(left.to(dtype)[index], v, order, offsets)
    tasks = offsets.shape[0] - 1
    segment = torch.repeat_interleave(torch.arange(tasks), offsets.diff()).to(index.device, non_blocking=True)
    if order is not None:
        v, index = v.index_select(0, order), index.index_select(0, order)
    stats = v.new_zeros(tasks * num_embeddings, v.shape[-1])
    rows = segment[:, None] * num_embeddings + index
    stats.index_add_(0, rows.reshape(-1), v.reshape(-1, v.shape[-1]))
    return dw, stats.view(tasks, num_embeddings, -1)


@embedding_stats.register_fake
def _(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r0 = num_embeddings if left is None else left.shape[1]
    r1 = dy.shape[-1] if right is None else right.shape[1]
    stats = dy.new_empty(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))
    return dy.new_empty(num_embeddings, dy.shape[-1]), stats
