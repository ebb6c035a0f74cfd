"""``embedding_stats``: the weight gradient of an embedding and, per task, its sketch, without a T×V×d block.

Row n adds dY_n to row index_n of the gradient: G_s = Σ_{n in s} e(index_n) dY_nᵀ, hence

    Lᵀ G_s R = Σ_{n in s} L[index_n] (dY_n R)ᵀ     [S, r0, r1], in O(N d) memory for N rows

``embedding_gram`` is the exact Gram of the G_s, from their non-zero rows alone: also O(N d) memory, never S×V×d.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._register import Triton, Values, register
from .segment_sum import stat_dtype
from .segments import fault_on_gpu, segment_of_entries, within
from .wgrad_sketch import sketch_of_rows


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
    """Embedding gradient and its unscaled sketch per segment.

    Args:
        dy: [E, M, d], gradient of the output: E entries with a task id each, M rows per entry.
        index: int64 or int32 [E, M], in [0, num_embeddings).
        order, offsets: the entries sorted by segment, see ``segment_sum``.
        num_embeddings: V.
        padding_idx: the index whose row gets no gradient; -1 for none.
        left: [V, r0] or ``None`` for the identity: only then is a block of S·V rows made.
        right: [d, r1] or ``None`` for the identity.

    Returns:
        dW [V, d] in the dtype of ``dy`` and S [S, r0, r1], float64 for float64 and float32 otherwise.
        NaN throughout where values of index, order or offsets on a GPU are malformed.

    Raises:
        TypeError: a dtype or a device that is not supported.
        ValueError: shapes that do not fit, or the values of index, order or offsets on a CPU.
    """
    dw, stats = _STATS(dy, index, order, offsets, num_embeddings, padding_idx, left, right)
    return dw, stats


def _check_rows(
    dy: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, num_embeddings: int, padding_idx: int = -1
) -> None:
    _check.check_operand("dy", dy)
    _check.check_operand("index", index, (torch.int64, torch.int32))
    if _check.apart(index, dy):
        raise TypeError(f"index must be on {dy.device} as dy is, got {index.device}: use index.to(dy.device)")
    _check.check_segments(order, offsets, "dy", dy)
    if dy.dim() != 3 or index.shape != dy.shape[:2]:
        raise ValueError(f"dy must be [E, M, d] and index [E, M], got {list(dy.shape)} and {list(index.shape)}")
    _check.check_segment_shapes(order, offsets, dy.shape[0])
    if not 0 <= num_embeddings * offsets.shape[0] < 1 << 62:  # pairs of a row and a segment are numbered
        raise ValueError(f"num_embeddings must not be negative, nor beyond 2**62 / (S + 1), got {num_embeddings}")
    if not -1 <= padding_idx < max(num_embeddings, 1):
        raise ValueError(f"padding_idx must lie in [-1, {num_embeddings}), -1 for none, got {padding_idx}")


def _check_stats(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> None:
    _check_rows(dy, index, order, offsets, num_embeddings, padding_idx)
    _check.check_map("left", left, "dy", dy)
    _check.check_map("right", right, "dy", dy)
    _check.check_map_shape("left", left, num_embeddings)
    _check.check_map_shape("right", right, dy.shape[2])


def _check_values(
    dy: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, num_embeddings: int, *rest: Any
) -> None:
    _check.check_index("index", index, num_embeddings)
    _check.check_values(order, offsets, index.shape[0])


def _fault_on_gpu(
    dy: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, num_embeddings: int, *rest: Any
) -> Tensor | None:
    if index.is_cpu:
        return None
    wrong = ((index < 0) | (index >= num_embeddings)).any()
    segments = fault_on_gpu(order, offsets, index.shape[0])
    return wrong if segments is None else wrong | segments


def stats_reference(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> Tensor:
    """The stats of ``embedding_stats`` in plain torch, by the S·V×d block; no value of ``offsets`` is looked at."""
    index = index.long()
    wide = dy.to(stat_dtype(dy)).masked_fill((index == padding_idx)[..., None], 0)
    segments = offsets.shape[0] - 1
    rows = segment_of_entries(order, offsets, dy.shape[0])[:, None] * num_embeddings + index
    block = wide.new_zeros(segments * num_embeddings, dy.shape[2])
    # not index_add, which on a GPU adds in any order
    block.index_put_((rows.flatten(),), wide.flatten(0, 1), accumulate=True)
    stats = block.view(segments, num_embeddings, dy.shape[2])
    stats = stats if left is None else left.to(stats.dtype).mT @ stats
    return stats if right is None else stats @ right.to(stats.dtype)


def _fake(
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


def _on_cpu(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dw = _dense(dy, index, num_embeddings, padding_idx)
    if left is None:
        return dw, stats_reference(dy, index, order, offsets, num_embeddings, padding_idx, left, right)
    rows = dy if padding_idx < 0 else dy.masked_fill((index == padding_idx)[..., None], 0)
    return dw, sketch_of_rows(left.to(dy.dtype)[index], rows, order, offsets, None, right)


def reference(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``embedding_stats`` in plain torch."""
    index = within(index, num_embeddings)
    offsets = offsets.to(dy.device, non_blocking=True)
    stats = stats_reference(dy, index, order, offsets, num_embeddings, padding_idx, left, right)
    return _dense(dy, index, num_embeddings, padding_idx), stats


def _fits(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> bool:
    return left is not None and dy.numel() > 0 and dy.dtype != torch.float64 and offsets.shape[0] > 1


def _launch(
    kernel: ModuleType,
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    index = within(index, num_embeddings)
    offsets = offsets.to(dy.device, non_blocking=True)
    stats = kernel.launch(_projected(dy, index, padding_idx, right), index, order, offsets, left)
    return _dense(dy, index, num_embeddings, padding_idx), stats


def _dense(dy: Tensor, index: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    if dy.numel() == 0:
        return dy.new_zeros(num_embeddings, dy.shape[2])
    dw: Tensor = torch.ops.aten.embedding_dense_backward(dy, index, num_embeddings, padding_idx, False)
    return dw


def _projected(dy: Tensor, index: Tensor, padding_idx: int, right: Tensor | None) -> Tensor:
    """dY R, [E, M, r1], zero where the gradient is nobody's."""
    v = dy.to(stat_dtype(dy)) if right is None else dy.to(stat_dtype(dy)) @ right.to(stat_dtype(dy))
    return v if padding_idx < 0 else v.masked_fill((index == padding_idx)[..., None], 0)


def embedding_gram(
    dy: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, num_embeddings: int, padding_idx: int = -1
) -> Tensor:
    """Exact Gram of the per-segment gradients of an embedding, [S, S] float64, symmetric to the bit.

    The rows are sorted by (token, segment) and summed, which leaves at most N rows that are not zero; row (v, s) finds
    row (v, t) by bisection. S passes over N×d numbers, in O(N d) memory. Plain torch on every device: the passes are
    bound by memory, and a kernel would save the gathered copies only, at most a third of the bytes. Nothing is read on
    the host.

    Args:
        dy, index, order, offsets, num_embeddings, padding_idx: as for ``embedding_stats``.

    Raises:
        TypeError, ValueError: as ``embedding_stats``.
    """
    gram: Tensor = _GRAM(dy, index, order, offsets, num_embeddings, padding_idx)
    return gram


def _gram(
    dy: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, num_embeddings: int, padding_idx: int = -1
) -> Tensor:
    index = within(index, num_embeddings)
    segments = offsets.shape[0] - 1
    offsets = offsets.to(dy.device, non_blocking=True)
    segment = segment_of_entries(order, offsets, dy.shape[0])
    key = (index.long() * segments + segment[:, None]).flatten()
    # padding goes behind every token, and its rows are zero
    key = torch.where(index.flatten() == padding_idx, num_embeddings * segments, key)
    key, by_key = torch.sort(key, stable=True)
    rows = _projected(dy, index, padding_idx, None).flatten(0, 1)[by_key]
    gram = rows.new_zeros(segments, segments, dtype=torch.float64)
    if rows.numel() == 0:
        return gram
    is_new = torch.ones_like(key, dtype=torch.bool)
    torch.ne(key[1:], key[:-1], out=is_new[1:])
    group = is_new.long().cumsum(0) - 1  # its rows are those of one (token, segment)
    sums = torch.zeros_like(rows).index_put_((group,), rows, accumulate=True)
    keys = torch.full_like(key, num_embeddings * segments).index_copy_(0, group, key)  # the same for a whole group
    owner = keys % segments
    for t in range(segments):
        wanted = keys - owner + t
        at = torch.searchsorted(keys, wanted).clamp_(max=keys.shape[0] - 1)
        found = (keys[at] == wanted) & (keys < num_embeddings * segments)
        products = torch.where(found, (sums * sums[at]).sum(1, dtype=torch.float64), 0)
        gram[t].index_put_((owner,), products, accumulate=True)
    return (gram + gram.mT) / 2


def _fake_gram(
    dy: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, num_embeddings: int, padding_idx: int = -1
) -> Tensor:
    segments = offsets.shape[0] - 1
    return dy.new_empty(segments, segments, dtype=torch.float64)


_VALUES = Values(_check_values, _fault_on_gpu)
_STATS = register(
    "embedding_stats(Tensor dy, Tensor index, Tensor? order, Tensor offsets, SymInt num_embeddings, int padding_idx,"
    " Tensor? left, Tensor? right) -> (Tensor dw, Tensor stats)",
    check=_check_stats,
    values=_VALUES,
    fake=_fake,
    reference=reference,
    cpu=_on_cpu,
    cuda=(Triton("embedding_stats", _fits, _launch),),
)
_GRAM = register(
    "embedding_gram(Tensor dy, Tensor index, Tensor? order, Tensor offsets, SymInt num_embeddings,"
    " SymInt padding_idx=-1) -> Tensor",
    check=_check_rows,
    values=_VALUES,
    fake=_fake_gram,
    reference=_gram,
)
