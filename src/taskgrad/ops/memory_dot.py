"""``memory_dot``: all inner products of the stored memory with a step's gradients, in one pass over both.

    memory [T, K], stats [S, K]  ->  dots[t, s] = <memory[t], stats[s]>   [T, S], fp64

Products are accumulated in fp64 (on a GPU: fp32 within a tile, fp64 over tiles), in an order given by the shapes: same
input, same bits. Cost: (T + S) K elements read, T S K multiplications; memory is the limit below about 64 tasks.

The same stem is in ``csrc/ops/memory_dot.cpp`` (CPU) and ``tests/ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from .sum_gram import triton_obstacle

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference runs on its GPUs
    triton = None

DTYPES = (torch.float32, torch.float64)

torch.library.define("taskgrad::memory_dot", "(Tensor memory, Tensor stats) -> Tensor")


def memory_dot(memory: Tensor, stats: Tensor) -> Tensor:
    """Multiply the memory with a step's gradients.

    Args:
        memory: [T, K], float32 or float64, on a CPU or a CUDA device, of any strides.
        stats: [S, K], of the same dtype, on the same device.

    Returns:
        [T, S] in float64, zeros where K is 0.

    Raises:
        TypeError: another dtype or kind of device, or not the same for both.
        ValueError: not two matrices with the same number of columns.
    """
    if memory.dtype not in DTYPES or stats.dtype != memory.dtype:
        raise TypeError(f"memory and stats must both be float32 or float64, got {memory.dtype} and {stats.dtype}")
    if memory.device.type not in ("cpu", "cuda") or stats.device != memory.device:
        raise TypeError(f"memory and stats must be on one cpu or cuda device, got {memory.device} and {stats.device}")
    if memory.dim() != 2 or stats.dim() != 2 or memory.shape[1] != stats.shape[1]:
        raise ValueError(f"memory must be [T, K] and stats [S, K], got {list(memory.shape)} and {list(stats.shape)}")
    dots: Tensor = torch.ops.taskgrad.memory_dot(memory.detach(), stats.detach())
    return dots


def reference(memory: Tensor, stats: Tensor) -> Tensor:
    """``memory_dot`` in plain torch; by slices of columns, so that no fp64 copy of either is made."""
    dots = memory.new_zeros(memory.shape[0], stats.shape[0], dtype=torch.float64)
    for left, right in zip(memory.split(1 << 14, dim=1), stats.split(1 << 14, dim=1), strict=True):
        dots.addmm_(left.double(), right.double().mT)
    return dots


@torch.library.register_fake("taskgrad::memory_dot")  # type: ignore[untyped-decorator]
def _fake(memory: Tensor, stats: Tensor) -> Tensor:
    return memory.new_empty(memory.shape[0], stats.shape[0], dtype=torch.float64)


@torch.library.impl("taskgrad::memory_dot", "CompositeExplicitAutograd")
def _without_kernel(memory: Tensor, stats: Tensor) -> Tensor:
    """What the dispatcher finds where no kernel is registered: on a CPU, until the native library is in."""
    if memory.device.type == "cpu" and _native.status().kind != "reference":
        return torch.ops.taskgrad.memory_dot(memory, stats)  # type: ignore[no-any-return]
    return reference(memory, stats)


@torch.library.impl("taskgrad::memory_dot", "CUDA")
def _cuda(memory: Tensor, stats: Tensor) -> Tensor:
    fits = memory.numel() > 0 and stats.numel() > 0 and memory.dtype != torch.float64
    if not fits or triton_obstacle(memory.device) is not None:
        return reference(memory, stats)
    with torch.cuda.device(memory.device):
        return launch(memory, stats)


# ----------------------------------------------------------------------------------------------------------
# Triton. A program takes neighbouring tiles of columns, and one block of rows of either operand:
#
#     memory    [T, K]     BLOCK_T rows, padded with zeros
#     stats     [S, K]     BLOCK_S rows, padded with zeros
#     partials  [P, T, S]  fp64, one block per program; added afterwards in a fixed order, no atomics

MAX_BLOCK = 32  # the fp64 products of a block live in registers


def tile_config(block_t: int, block_s: int) -> tuple[int, int]:
    """Columns per tile and warps per program: fp32 products run on the FMA units, where every thread holds whole rows
    of a tile."""
    return 1024 // max(block_t, block_s), 4


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
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
