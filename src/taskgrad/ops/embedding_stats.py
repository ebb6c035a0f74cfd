"""``embedding_stats``: the weight gradient of an embedding and, per task, its sketch, without a T×V×d block.

Row n adds dY_n to row index_n of the gradient: G_s = Σ_{n in s} e(index_n) dY_nᵀ, hence

    Lᵀ G_s R = Σ_{n in s} L[index_n] (dY_n R)ᵀ     [S, r0, r1], in O(N d) memory for N rows

``embedding_gram`` is the exact Gram of the G_s, from their non-zero rows alone: also O(N d) memory, never S×V×d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segment_sum import add_parts, rows_per_program, stat_dtype
from .sum_gram import triton_obstacle
from .wgrad_sketch import segment_products

try:
    import triton
    import triton.language as tl

    from .segment_sum import first_and_last_segment
except ImportError:  # no wheel for this platform: plain torch runs on its GPUs
    triton = None

torch.library.define(
    "taskgrad::embedding_stats",
    "(Tensor dy, Tensor index, Tensor? order, Tensor offsets, SymInt num_embeddings, int padding_idx, Tensor? left, "
    "Tensor? right) -> (Tensor dw, Tensor stats)",
)


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

    Raises:
        TypeError: ``index`` does not hold integers.
        ValueError: shapes that do not fit.
    """
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be int64 or int32, got {index.dtype}")
    if dy.dim() != 3 or index.shape != dy.shape[:2]:
        raise ValueError(f"dy must be [E, M, d] and index [E, M], got {list(dy.shape)} and {list(index.shape)}")
    for side, size, name in ((left, num_embeddings, "left"), (right, dy.shape[2], "right")):
        if side is not None and (side.dim() != 2 or side.shape[0] != size):
            raise ValueError(f"{name} must have shape [{size}, r], got {list(side.shape)}")
    dw, stats = torch.ops.taskgrad.embedding_stats(
        dy.detach(), index, order, offsets, num_embeddings, padding_idx, left, right
    )
    return dw, stats


def reference(
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
    stats = block.view(segments, num_embeddings, -1)
    stats = stats if left is None else left.to(stats.dtype).mT @ stats
    return stats if right is None else stats @ right.to(stats.dtype)


def segment_of_entries(order: Tensor | None, offsets: Tensor, entries: int) -> Tensor:
    """Segment of every entry [E], in the order in which they were given."""
    positions = torch.arange(entries, dtype=offsets.dtype, device=offsets.device)
    segment = torch.searchsorted(offsets[1:].contiguous(), positions, right=True)
    if order is None:
        return segment
    segment = segment.to(order.device, non_blocking=True)
    return torch.empty_like(segment).index_copy_(0, order, segment)


@torch.library.register_fake("taskgrad::embedding_stats")  # type: ignore[untyped-decorator]
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


@torch.library.impl("taskgrad::embedding_stats", "CPU")
def _cpu(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dw = torch.ops.aten.embedding_dense_backward(dy, index, num_embeddings, padding_idx, False)
    if left is None:
        return dw, reference(dy, index, order, offsets, num_embeddings, padding_idx, left, right)
    v = _projected(dy, index, padding_idx, right)
    return dw, segment_products(left.to(v.dtype)[index], v, order, offsets)


@torch.library.impl("taskgrad::embedding_stats", "CUDA")
def _cuda(
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    num_embeddings: int,
    padding_idx: int,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dw = torch.ops.aten.embedding_dense_backward(dy, index, num_embeddings, padding_idx, False)
    offsets = offsets.to(dy.device, non_blocking=True)
    fits = left is not None and dy.numel() > 0 and dy.dtype != torch.float64
    if not fits or triton_obstacle(dy.device) is not None:
        return dw, reference(dy, index, order, offsets, num_embeddings, padding_idx, left, right)
    assert left is not None
    with torch.cuda.device(dy.device):
        return dw, launch(_projected(dy, index, padding_idx, right), index, order, offsets, left)


def _projected(dy: Tensor, index: Tensor, padding_idx: int, right: Tensor | None) -> Tensor:
    """dY R, [E, M, r1], zero where the gradient is nobody's."""
    v = dy.to(stat_dtype(dy)) if right is None else dy.to(stat_dtype(dy)) @ right.to(stat_dtype(dy))
    return v if padding_idx < 0 else v.masked_fill((index == padding_idx)[..., None], 0)


@torch.library.custom_op("taskgrad::embedding_gram", mutates_args=())
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
    """
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


@embedding_gram.register_fake
def _fake_gram(
    dy: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, num_embeddings: int, padding_idx: int = -1
) -> Tensor:
    segments = offsets.shape[0] - 1
    return dy.new_empty(segments, segments, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------
# Triton. The rows are split over programs as in ``segment_sum``, whatever the segments are; a program multiplies the
# rows of L that its tokens name with its rows of dY R, segment by segment:
#
#     left      [V, r0]              rows gathered by token
#     v         [E, M, r1]  fp32     dY R
#     partials  [P + S, r0 · r1]     program p's part of segment s is row p + s; added in the order of p

BLOCK_N = 32


def rank_blocks(r0: int, r1: int) -> tuple[int, int]:
    """Columns of L and R at a time; a product needs 16."""
    block_0, block_1 = (min(32, max(16, int(triton.next_power_of_2(r)))) for r in (r0, r1))
    return block_0, block_1


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def embedding_sketch_kernel(  # type: ignore[no-untyped-def]
        left,
        v,
        index,  # [E, M]
        order,  # [E] int64 or None: sorted already
        offsets,  # [S + 1]
        partials,
        N,
        M,
        S,
        R,
        r0,
        r1,
        S_PAD: tl.constexpr,
        BLOCK_N: tl.constexpr,
        R0: tl.constexpr,
        R1: tl.constexpr,
    ):
        p = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * R0 + tl.arange(0, R0)
        j = tl.program_id(2) * R1 + tl.arange(0, R1)
        lo = p * R
        hi = tl.minimum(lo + R, N)
        first, last = first_and_last_segment(offsets, lo, hi, M, S, S_PAD)
        for s in range(first, last + 1):
            start = tl.maximum(tl.load(offsets + s).to(tl.int64) * M, lo)
            end = tl.minimum(tl.load(offsets + s + 1).to(tl.int64) * M, hi)
            sketch = tl.zeros((R0, R1), dtype=tl.float32)
            for n in range(start, end, BLOCK_N):
                rows = n + tl.arange(0, BLOCK_N)
                inside = rows < end
                entry = rows // M
                row = rows - entry * M
                if order is not None:
                    entry = tl.load(order + entry, mask=inside, other=0)
                at = entry * M + row
                token = tl.load(index + at, mask=inside, other=0).to(tl.int64)
                mask = inside[None, :] & (i < r0)[:, None]
                signs = tl.load(left + token[None, :] * r0 + i[:, None], mask=mask, other=0.0)
                mask = inside[:, None] & (j < r1)[None, :]
                values = tl.load(v + at[:, None] * r1 + j[None, :], mask=mask, other=0.0)
                # not rounded to tf32
                sketch += tl.dot(signs, values, input_precision="ieee")
            out = partials + ((p + s) * r0 + i)[:, None] * r1 + j[None, :]
            tl.store(out, sketch, mask=(i < r0)[:, None] & (j < r1)[None, :])


def launch(v: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor) -> Tensor:
    """Run the Triton kernel on v = dY R [E, M, r1] float32, not empty, and L [V, r0]: [S, r0, r1]."""
    E, M, r1 = v.shape
    S, r0 = offsets.shape[0] - 1, left.shape[1]
    v, index, left = v.contiguous(), index.contiguous(), left.to(torch.float32).contiguous()
    block_0, block_1 = rank_blocks(r0, r1)
    blocks = triton.cdiv(r0, block_0), triton.cdiv(r1, block_1)
    R = rows_per_program(E * M, blocks[0] * blocks[1], BLOCK_N, 1)
    P = triton.cdiv(E * M, R)
    partials = torch.empty(1, P + S, r0 * r1, dtype=torch.float32, device=v.device)
    grid = (P, *blocks)
    embedding_sketch_kernel[grid](
        left,
        v,
        index,
        order,
        offsets,
        partials,
        E * M,
        M,
        S,
        R,
        r0,
        r1,
        S_PAD=triton.next_power_of_2(S),
        BLOCK_N=BLOCK_N,
        R0=block_0,
        R1=block_1,
        num_warps=4,
    )
    return add_parts(partials, offsets, M, R).view(S, r0, r1)
