"""The Triton kernel of ``wgrad_sketch``, see ``taskgrad/ops/wgrad_sketch.py``.

A product per segment with K of any length, which cuBLAS only does if the host knows the lengths.

    u, v      [E * M, r0], [E * M, r1]   as in memory; row i of the sorted ones is order[i // M] * M + i % M, and
                                         segment s has the rows offsets[s] * M <= i < offsets[s + 1] * M
    partials  [S, splits, r0, r1]        fp32; split k of a segment has the k-th of `splits` runs of its rows, so that
                                         a few tiles fill the GPU; added afterwards in a fixed order, no atomics

Program: (tile of r0 x r1, segment, split).

Why two skinny products and no kernel that sketches inside the dense product. On an H100 at 600 TFLOP/s and 3 TB/s the
dense product of N = 8192 rows, d = 4096, bfloat16, takes 458 us; U and V read dY and X once more, 134 MB or 45 us,
whatever S. The fused way ("prefix": never reset the accumulator C, write L_tileᵀ C R_tile at every end of a segment,
take differences afterwards) was compiled and left out:
- it writes S r0 r1 numbers for each of 1024 tiles, 151 MB at S = 9 and r0 = r1 = 64, and reads them to add them up;
- its products take the tensor cores 2 S (128 * 128 r0 + 128 r0 r1) operations a tile at TF32's half rate, a fifth of
  the dense product's own time, and its dense part would have to be as fast as cuBLAS;
- TF32 rounds the sum of all tasks so far, which drowns a rare one. In three TF32 products (tf32x3) it spills 1.5 to
  2.4 KB a thread at 128 x 128 (r = 16, 32, 64; sm_90, Triton 3.7.1), and 0.5 to 1.9 KB at 64 x 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segment_sum import nth_entry


class Tile(NamedTuple):
    """Tile of r0 x r1, rows per step, launch shape."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int


def tile_config(dtype: torch.dtype, r0: int, r1: int, major: int) -> Tile:
    """The largest tile that spills no registers on this compute capability; fp32 is multiplied on the FMA units."""
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 3) if max(r0, r1) <= 32 else Tile(64, 64, 32, 4, 3)
    if min(r0, r1) > 64:
        return Tile(128, 128, 64, 8, 3)
    return Tile(64, 64, 32 if major == 12 else 64, 4, 3)


SPLIT_ROWS = 256  # per segment and program at least, on average
PARTIALS = 1 << 24  # numbers at most


@triton.jit(do_not_specialize=["N", "M"])  # type: ignore[untyped-decorator]
def segment_products_kernel(  # type: ignore[no-untyped-def]
    u,  # [E * M, r0]
    v,  # [E * M, r1]
    order,  # [E], not read if not ORDERED
    offsets,  # [S + 1]
    partials,
    N,  # E * M
    M,
    r0,
    r1,
    u_stride,
    v_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ORDERED: tl.constexpr,
):
    across = tl.cdiv(r1, WIDTH)
    a_column = (tl.program_id(0) // across) * HEIGHT + tl.arange(0, HEIGHT)
    b_column = (tl.program_id(0) % across) * WIDTH + tl.arange(0, WIDTH)
    segment, split = tl.program_id(1), tl.program_id(2)
    start = tl.maximum(tl.load(offsets + segment).to(tl.int64) * M, 0)
    end = tl.minimum(tl.load(offsets + segment + 1).to(tl.int64) * M, N)
    steps = tl.cdiv(tl.cdiv(end - start, DEPTH), tl.num_programs(2))
    start += split * steps * DEPTH
    end = tl.minimum(end, start + steps * DEPTH)
    product = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for i in range(tl.cdiv(tl.maximum(end - start, 0), DEPTH).to(tl.int32)):
        row = start + i * DEPTH + tl.arange(0, DEPTH)
        inside = row < end
        if ORDERED:
            row = nth_entry(order, row // M, inside, N // M) * M + row % M
        a_inside = inside[:, None] & (a_column < r0)[None, :]
        b_inside = inside[:, None] & (b_column < r1)[None, :]
        a = tl.load(u + row[:, None] * u_stride + a_column[None, :], a_inside, other=0.0)
        b = tl.load(v + row[:, None] * v_stride + b_column[None, :], b_inside, other=0.0)
        product = tl.dot(tl.trans(a), b, product, input_precision="ieee")
    slot = segment.to(tl.int64) * tl.num_programs(2) + split
    out = partials + (slot * r0 + a_column[:, None]) * r1 + b_column[None, :]
    tl.store(out, product, mask=(a_column < r0)[:, None] & (b_column < r1)[None, :])


def launch(
    u: Tensor, v: Tensor, rows: int, order: Tensor | None, offsets: Tensor, processors: int, major: int
) -> Tensor:
    """Run the Triton kernel on non-empty u [E * M, r0], v [E * M, r1] with M = ``rows``: [S, r0, r1] in float32."""
    u = u if u.stride(1) == 1 else u.contiguous()
    v = v if v.stride(1) == 1 else v.contiguous()
    (count, r0), r1, segments = u.shape, v.shape[1], offsets.shape[0] - 1
    if u.dtype != v.dtype:  # one side is sketched, the other is the identity
        u, v = u.float(), v.float()
    tile = tile_config(u.dtype, r0, r1, major)
    tiles = triton.cdiv(r0, tile.height) * triton.cdiv(r1, tile.width)
    splits = min(2 * processors // tiles, triton.cdiv(count, SPLIT_ROWS), PARTIALS // (segments * r0 * r1))
    splits = max(1, splits)
    partials = torch.empty(segments, splits, r0, r1, dtype=torch.float32, device=u.device)
    segment_products_kernel[(tiles, segments, splits)](
        u,
        v,
        offsets if order is None else order,
        offsets,
        partials,
        count,
        rows,
        r0,
        r1,
        u.stride(0),
        v.stride(0),
        HEIGHT=tile.height,
        WIDTH=tile.width,
        DEPTH=tile.depth,
        ORDERED=order is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partials.sum(1) if splits > 1 else partials.squeeze(1)
