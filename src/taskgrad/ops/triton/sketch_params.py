"""The Triton kernel of ``sketch_params``, see ``taskgrad/ops/sketch_params.py``.

The sketch is linear, so that of a matrix is the sum of those of its blocks: a program takes BLOCK_0 rows and
a stripe of columns, multiplies with R tile by tile, then with L, and writes one [r0, r1] partial sum:

    theta     [d0, d1]        read once (once for every 32 columns of R); tiles [BLOCK_0, BLOCK_1]
    left      [d0, r0]        BLOCK_0 rows, 32 columns at a time
    right     [d1, r1]        read by every program of a stripe: from L2
    partials  [P, r0, r1]     fp64, P row blocks times stripes; added afterwards in a fixed order, no atomics

fp64 products are on the tensor cores of sm_80 and sm_90. No side of 64 may come first in a product: Triton (3.7)
takes it for one of sm_100's tensor cores, which have no fp64, and aborts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # about 8 for each SM of an H100


R = 32  # columns of either map at a time: less would spare work at small ranks, but spills on sm_90


def tile_config(dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a tile that spill no registers."""
    return (32, 32) if dtype == torch.float32 else (16, 64)


@triton.jit(do_not_specialize=["d0", "tiles_per_stripe"])  # type: ignore[untyped-decorator]
def sketch_params_kernel(  # type: ignore[no-untyped-def]
    theta,
    left,
    right,
    partials,
    d0,
    d1,
    r0,
    r1,
    row_stride,
    tiles_per_stripe,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    RANK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_0 + tl.arange(0, BLOCK_0)
    first = tl.program_id(1).to(tl.int64) * tiles_per_stripe * BLOCK_1
    j = tl.program_id(2) * RANK + tl.arange(0, RANK)
    product = tl.zeros((BLOCK_0, RANK), dtype=tl.float64)
    for tile in range(tiles_per_stripe):
        columns = first + tile * BLOCK_1 + tl.arange(0, BLOCK_1)
        inside = (rows < d0)[:, None] & (columns < d1)[None, :]
        a = tl.load(theta + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
        inside = (columns < d1)[:, None] & (j < r1)[None, :]
        b = tl.load(right + columns[:, None] * r1 + j[None, :], mask=inside, other=0.0)
        a = a.to(tl.float64)
        if theta.dtype.element_ty.primitive_bitwidth == 16:
            # a sum of one: else Triton (3.7) sees through the cast, plans for a 16-bit product and aborts
            a = tl.sum(a[:, :, None], axis=2)
        product += tl.dot(a, b.to(tl.float64), out_dtype=tl.float64)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    for start in range(0, r0, RANK):
        i = start + tl.arange(0, RANK)
        inside = (rows < d0)[None, :] & (i < r0)[:, None]
        signs = tl.load(left + rows[None, :] * r0 + i[:, None], mask=inside, other=0.0)
        sketch = tl.dot(signs.to(tl.float64), product, out_dtype=tl.float64)
        out = partials + (program * r0 + i)[:, None] * r1 + j[None, :]
        tl.store(out, sketch, mask=(i < r0)[:, None] & (j < r1)[None, :])


def launch(theta: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Run the Triton kernel on a matrix that is not empty and not float64, sketched on both sides."""
    theta = theta if theta.stride(1) == 1 else theta.contiguous()
    left, right = left.contiguous(), right.contiguous()
    (d0, d1), r0, r1 = theta.shape, left.shape[1], right.shape[1]
    block_0, block_1 = tile_config(theta.dtype)
    row_blocks, tiles = triton.cdiv(d0, block_0), triton.cdiv(d1, block_1)
    tiles_per_stripe = triton.cdiv(tiles, max(1, PROGRAMS // row_blocks))
    stripes = triton.cdiv(tiles, tiles_per_stripe)
    partials = torch.empty(row_blocks * stripes, r0, r1, dtype=torch.float64, device=theta.device)
    sketch_params_kernel[(row_blocks, stripes, triton.cdiv(r1, R))](
        theta,
        left,
        right,
        partials,
        d0,
        d1,
        r0,
        r1,
        theta.stride(0),
        tiles_per_stripe,
        BLOCK_0=block_0,
        BLOCK_1=block_1,
        RANK=R,
        num_warps=4,
    )
    return partials.sum(0)
