"""The Triton kernel of ``memory_dot``, see ``taskgrad/ops/memory_dot.py``.

A program takes neighbouring tiles of columns, and one block of rows of either operand:

    memory    [T, K]     BLOCK_T rows, padded with zeros
    stats     [S, K]     BLOCK_S rows, padded with zeros
    partials  [P, T, S]  fp64, one block per program; added afterwards in a fixed order, no atomics
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 32  # the fp64 products of a block live in registers


def tile_config(block_t: int, block_s: int) -> tuple[int, int]:
    """Columns per tile and warps per program: fp32 products run on the FMA units, where every thread holds whole rows
    of a tile."""
    return 1024 // max(block_t, block_s), 4


@triton.jit(do_not_specialize=["T", "S", "tiles_per_program"])  # type: ignore[untyped-decorator]
def memory_dot_kernel(  # type: ignore[no-untyped-def]
    memory,
    stats,
    partials,
    T,
    S,
    K,
    memory_stride,
    stats_stride,
    tiles_per_program,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.program_id(2).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    first = tl.program_id(0).to(tl.int64) * tiles_per_program * TILE
    dots = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float64)
    for i in range(tiles_per_program):
        k = first + i * TILE + tl.arange(0, TILE)
        left = memory + t[:, None] * memory_stride + k[None, :]
        right = stats + s[:, None] * stats_stride + k[None, :]
        a = tl.load(left, mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(right, mask=(s < S)[:, None] & (k < K)[None, :], other=0.0)
        # not rounded to tf32
        dots += tl.dot(a, tl.trans(b), input_precision="ieee").to(tl.float64)
    out = partials + (tl.program_id(0).to(tl.int64) * T + t)[:, None] * S + s[None, :]
    tl.store(out, dots, mask=(t < T)[:, None] & (s < S)[None, :])


def launch(memory: Tensor, stats: Tensor) -> Tensor:
    """Run the Triton kernel on matrices that are not empty and not float64."""
    memory = memory if memory.stride(1) == 1 else memory.contiguous()
    stats = stats if stats.stride(1) == 1 else stats.contiguous()
    (T, K), S = memory.shape, stats.shape[0]
    block_t, block_s = (min(MAX_BLOCK, max(16, int(triton.next_power_of_2(n)))) for n in (T, S))  # tl.dot needs 16
    tile, warps = tile_config(block_t, block_s)
    tiles = triton.cdiv(K, tile)
    tiles_per_program = triton.cdiv(tiles, min(1024, max(1, (1 << 20) // (T * S))))  # about 8 MiB of partials
    programs = triton.cdiv(tiles, tiles_per_program)
    partials = torch.empty(programs, T, S, dtype=torch.float64, device=memory.device)
    memory_dot_kernel[(programs, triton.cdiv(T, block_t), triton.cdiv(S, block_s))](
        memory,
        stats,
        partials,
        T,
        S,
        K,
        memory.stride(0),
        stats.stride(0),
        tiles_per_program,
        BLOCK_T=block_t,
        BLOCK_S=block_s,
        TILE=tile,
        num_warps=warps,
    )
    return partials.sum(0)
