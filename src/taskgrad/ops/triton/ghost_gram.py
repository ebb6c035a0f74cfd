"""The Triton kernel of ``ghost_gram``, see ``taskgrad/ops/ghost_gram.py``.

Blocks (i, j) of BLOCK x BLOCK pairs of rows, i <= j, a program takes every P-th of them:

    x, dy     [N, d_in], [N, d_out]   row n at base + n * stride
    segment   [N] int32               of every row, not falling
    pairs     [BLOCK, BLOCK]          (x_n · x_m) (dy_n · dy_m), fp32, in registers
    partials  [P, S, S_PAD]           fp64, row s of the program's Gram; added afterwards in a fixed order

A block of rows may hold any number of segments. It is walked through row segment by row segment (mostly there is one,
or two), and column segments are told apart by comparison, COLUMNS at a time.

With R = BLOCKS / 2 (BLOCKS rounded up to even) the triangle is a rectangle of R x (BLOCKS + 1): row r holds row r of
the triangle and, in the cells that leaves free, row BLOCKS - 1 - r, so every program gets its share of real work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ghost_gram import segment_of_rows
from ..tensor_cores import from_shared_memory


class Tile(NamedTuple):
    """Rows per block, columns per step of the products, launch shape."""

    block: int
    depth: int
    warps: int
    stages: int


def tile_config(dtype: torch.dtype, tf32: bool, major: int) -> Tile:
    """The largest block that spills no registers on this compute capability."""
    if dtype == torch.float32 and not tf32:  # on the FMA units
        return Tile(64, 32, 4, 3)
    if not from_shared_memory(major):
        return Tile(64, 32 if dtype == torch.float32 else 64, 4, 3)
    return Tile(128, 32 if dtype == torch.float32 else 64, 8, 3)


COLUMNS = 64  # column segments told apart at a time: [block, COLUMNS] is in registers
PARTIALS = 1 << 23  # numbers at most, 64 MiB


@triton.jit  # type: ignore[untyped-decorator]
def _row_products(rows, i, j, N, d, stride, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """rows[block i] rows[block j]ᵀ, [BLOCK, BLOCK] in fp32; 0 for rows from N on."""
    left = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    right = j.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, d, DEPTH):
        column = k + tl.arange(0, DEPTH)
        inside = (column < d)[None, :]
        a = tl.load(rows + left[:, None] * stride + column[None, :], (left < N)[:, None] & inside, other=0.0)
        b = tl.load(rows + right[:, None] * stride + column[None, :], (right < N)[:, None] & inside, other=0.0)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["N", "S"])  # type: ignore[untyped-decorator]
def ghost_gram_kernel(  # type: ignore[no-untyped-def]
    dy,  # [N, d_out]
    x,  # [N, d_in]
    segment,  # [N]
    partials,  # zeros
    N,
    S,
    d_out,
    d_in,
    dy_stride,
    x_stride,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    S_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,  # of S_PAD at a time
    PRECISION: tl.constexpr,
):
    half = tl.cdiv(tl.cdiv(N, BLOCK), 2)
    blocks = 2 * half
    own = partials + tl.program_id(0).to(tl.int64) * S * S_PAD
    some = tl.arange(0, COLUMNS)
    for cell in range(tl.program_id(0), half * (blocks + 1), tl.num_programs(0)):
        r, c = cell // (blocks + 1), cell % (blocks + 1)
        i = tl.where(c > r, r, blocks - 1 - r)
        j = tl.where(c > r, c - 1, blocks - 1 - c)
        pairs = _row_products(x, i, j, N, d_in, x_stride, BLOCK, DEPTH, PRECISION)
        pairs *= _row_products(dy, i, j, N, d_out, dy_stride, BLOCK, DEPTH, PRECISION)
        pairs *= tl.where(i == j, 0.5, 1.0)  # the block on the diagonal is there twice in gram + gram.mT

        left = i * BLOCK + tl.arange(0, BLOCK)
        right = j * BLOCK + tl.arange(0, BLOCK)
        of_left = tl.load(segment + left, left < N, other=-1)  # pairs are 0 there
        of_right = tl.load(segment + right, right < N, other=-1)
        first = tl.load(segment + tl.minimum(i * BLOCK, N - 1))
        last = tl.load(segment + tl.minimum(i * BLOCK + BLOCK, N) - 1)
        for s in range(first, last + 1):
            row = tl.sum(tl.where((of_left == s)[:, None], pairs, 0.0), axis=0)
            for column in range(0, S_PAD, COLUMNS):
                match = of_right[:, None] == (column + some)[None, :]
                at = own + s * S_PAD + column + some
                tl.store(at, tl.load(at) + tl.sum(tl.where(match, row[:, None], 0.0), axis=0).to(tl.float64))
            # The same sums may be another thread's next time: bar.sync orders memory for the threads of a block.
            tl.debug_barrier()


def launch(dy: Tensor, x: Tensor, offsets: Tensor, tile: Tile, programs: int, *, tf32: bool) -> Tensor:
    """Run the Triton kernel on non-empty tensors, not float64."""
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, segments = dy.shape[0], offsets.shape[0] - 1
    padded = triton.next_power_of_2(segments)
    half = triton.cdiv(triton.cdiv(rows, tile.block), 2)
    programs = max(1, min(programs, half * (2 * half + 1), PARTIALS // (segments * padded)))
    partials = torch.zeros(programs, segments, padded, dtype=torch.float64, device=dy.device)
    ghost_gram_kernel[(programs,)](
        dy,
        x,
        segment_of_rows(offsets, rows),
        partials,
        rows,
        segments,
        dy.shape[1],
        x.shape[1],
        dy.stride(0),
        x.stride(0),
        BLOCK=tile.block,
        DEPTH=tile.depth,
        S_PAD=padded,
        COLUMNS=min(padded, COLUMNS),
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    gram = partials.sum(0)[:, :segments]
    return gram + gram.mT
