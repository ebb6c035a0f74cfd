"""The Triton kernel of ``sum_gram``, see ``taskgrad/ops/sum_gram.py``.

Column tiles of the block, one program to several neighbouring tiles:

    block    [T, M]      row t, column m at block + t * row_stride + m; rows padded to T_PAD with zeros
    total    [M]         written once by the program that owns the tile
    partials [P, T_PAD, T_PAD] fp64, one Gram per program; added afterwards in a fixed order, no atomics

Inside a tile dot products are in fp32 (TILE terms), over tiles in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def tile_config(dtype: torch.dtype, padded_rows: int) -> tuple[int, int]:
    """Columns per tile and warps per program: the widest that spill no registers on sm_80 and sm_90.

    fp32 products run on the FMA units, where every thread holds whole rows of the tile.
    """
    if dtype == torch.float32:
        return min(64, 2048 // padded_rows), 8
    return 128, 4


@triton.jit(do_not_specialize=["T", "tiles_per_program"])  # type: ignore[untyped-decorator]
def sum_gram_kernel(  # type: ignore[no-untyped-def]
    block, total, partials, T, M, row_stride, tiles_per_program, T_PAD: tl.constexpr, TILE: tl.constexpr
):
    rows = tl.arange(0, T_PAD).to(tl.int64)  # T * row_stride may exceed 2^31
    first = tl.program_id(0).to(tl.int64) * tiles_per_program * TILE
    gram = tl.zeros((T_PAD, T_PAD), dtype=tl.float64)
    for i in range(tiles_per_program):
        columns = first + i * TILE + tl.arange(0, TILE)
        inside = (rows < T)[:, None] & (columns < M)[None, :]
        tile = tl.load(block + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
        tl.store(total + columns, tl.sum(tile.to(tl.float32), axis=0), mask=columns < M)
        # 16-bit products are exact on tensor cores; fp32 must not be rounded to tf32
        gram += tl.dot(tile, tl.trans(tile), input_precision="ieee").to(tl.float64)
    out = partials + tl.program_id(0).to(tl.int64) * T_PAD * T_PAD
    tl.store(out + rows[:, None] * T_PAD + rows[None, :], gram)


def launch(block: Tensor) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel on a non-empty block of at most ``MAX_ROWS`` rows, not float64."""
    if block.stride(1) != 1:
        block = block.contiguous()
    T, M = block.shape
    padded = max(16, triton.next_power_of_2(T))  # tl.dot needs 16
    tile, warps = tile_config(block.dtype, padded)
    tiles = triton.cdiv(M, tile)
    tiles_per_program = triton.cdiv(tiles, min(1024, (1 << 20) // padded**2))  # at most 8 MiB of partials
    programs = triton.cdiv(tiles, tiles_per_program)
    total = torch.empty(M, dtype=block.dtype, device=block.device)
    partials = torch.empty(programs, padded, padded, dtype=torch.float64, device=block.device)
    sum_gram_kernel[(programs,)](
        block,
        total,
        partials,
        T,
        M,
        block.stride(0),
        tiles_per_program,
        T_PAD=padded,
        TILE=tile,
        num_warps=warps,
    )
    gram = partials.sum(0)[:T, :T]
    return total, gram.triu() + gram.triu(1).mT
