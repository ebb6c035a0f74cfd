"""The Triton kernel of ``embedding_stats``, see ``taskgrad/ops/embedding_stats.py``.

The rows are split over programs as in ``segment_sum``, whatever the segments are; a program multiplies the
rows of L that its tokens name with its rows of dY R, segment by segment:

    left      [V, r0]              rows gathered by token
    v         [E, M, r1]  fp32     dY R
    partials  [P + S, r0 · r1]     program p's part of segment s is row p + s; added in the order of p
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum import add_parts, first_and_last_segment, nth_entry, rows_per_program

BLOCK_N = 32


def rank_blocks(r0: int, r1: int) -> tuple[int, int]:
    """Columns of L and R at a time; a product needs 16."""
    block_0, block_1 = (min(32, max(16, int(triton.next_power_of_2(r)))) for r in (r0, r1))
    return block_0, block_1


@triton.jit(do_not_specialize=["N", "M", "S", "R"])  # type: ignore[untyped-decorator]
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
                entry = nth_entry(order, entry, inside, N // M)
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
    return add_parts(partials, offsets, E * M, M, R).view(S, r0, r1)
