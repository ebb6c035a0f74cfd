"""``sum_gram``: the column sum and the Gram matrix of a block, in one pass over memory.

    block [T, M]  ->  sum[m]     = sum_t block[t, m]
                      gram[s, t] = <block[s], block[t]>

With one row per task, holding that task's part of a weight gradient, ``sum`` is the gradient itself and
``gram`` what conflicts are read from. A plain fp32 dot product over millions of columns loses three digits,
so the Gram is accumulated in fp64 (on a GPU: fp32 within a tile). The kernels add their partial sums in an
order given by the shape: same input, same bits, for any number of threads.

On a GPU the Triton kernel runs (``launch``), for float64 and for more than ``MAX_ROWS`` rows the reference. The CUDA
C++ kernel is ``torch.ops.taskgrad.sum_gram_cuda``, there where it was built ahead of time, for at most 32 rows; nothing
but benchmarks and tests calls it until measurements say which of the two is faster.

The same stem is in ``csrc/ops`` (CPU), ``csrc/cuda`` (CUDA C++), ``tests/ops`` and ``benchmarks``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference runs on its GPUs
    triton = None

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

torch.library.define("taskgrad::sum_gram", "(Tensor block) -> (Tensor sum, Tensor gram)")


def sum_gram(block: Tensor) -> tuple[Tensor, Tensor]:
    """Sum a block over its rows and take all inner products of its rows, reading it once.

    Args:
        block: [T, M], float32, float64, bfloat16 or float16, on a CPU or a CUDA device, of any strides (it is
            copied if its columns are not adjacent in memory).

    Returns:
        ``sum`` [M] in the dtype of ``block``, accumulated in fp32 (fp64 for float64 input), and ``gram``
        [T, T] in float64, symmetric to the bit. Zeros where T or M is 0. Neither carries a gradient.

    Raises:
        TypeError: ``block`` is of another dtype, or on a device of another kind.
        ValueError: ``block`` is not 2-dimensional.
    """
    if block.dtype not in DTYPES:
        raise TypeError(f"block must be float32, float64, bfloat16 or float16, got {block.dtype}: convert it first")
    if block.device.type not in ("cpu", "cuda"):
        raise TypeError(f"block must be on a cpu or cuda device, got {block.device}: move it with .to() first")
    if block.dim() != 2:
        raise ValueError(f"block must have shape [T, M], one row per task, got {list(block.shape)}: reshape it first")
    total, gram = torch.ops.taskgrad.sum_gram(block.detach())
    return total, gram


def reference(block: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_gram`` in plain torch; by slices of columns, so that no fp64 copy of the whole block is made."""
    total = block.sum(0, dtype=torch.float64 if block.dtype == torch.float64 else torch.float32)
    gram = block.new_zeros(block.shape[0], block.shape[0], dtype=torch.float64)
    for part in block.split(1 << 16, dim=1):
        wide = part.double()
        gram.addmm_(wide, wide.mT)
    return total.to(block.dtype), (gram + gram.mT) / 2


@torch.library.register_fake("taskgrad::sum_gram")  # type: ignore[untyped-decorator]
def _fake(block: Tensor) -> tuple[Tensor, Tensor]:
    T, M = block.shape
    return block.new_empty(M), block.new_empty(T, T, dtype=torch.float64)


@torch.library.impl("taskgrad::sum_gram", "CompositeExplicitAutograd")
def _without_kernel(block: Tensor) -> tuple[Tensor, Tensor]:
    """What the dispatcher finds where no kernel is registered: on a CPU, until the native library is in."""
    if block.device.type == "cpu" and _native.status().kind != "reference":
        total, gram = torch.ops.taskgrad.sum_gram(block)
        return total, gram
    return reference(block)


@torch.library.impl("taskgrad::sum_gram", "CUDA")
def _cuda(block: Tensor) -> tuple[Tensor, Tensor]:
    fits = block.numel() > 0 and block.shape[0] <= MAX_ROWS and block.dtype != torch.float64
    if not fits or triton_obstacle(block.device) is not None:
        return reference(block)
    with torch.cuda.device(block.device):
        return launch(block)


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernel cannot run on this CUDA device; None if it can."""
    if triton is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


# ----------------------------------------------------------------------------------------------------------
# Triton. Column tiles of the block, one program to several neighbouring tiles:
#
#     block    [T, M]      row t, column m at block + t * row_stride + m; rows padded to T_PAD with zeros
#     total    [M]         written once by the program that owns the tile
#     partials [P, T_PAD, T_PAD] fp64, one Gram per program; added afterwards in a fixed order, no atomics
#
# Inside a tile dot products are in fp32 (TILE terms), over tiles in fp64.

MAX_ROWS = 64  # the fp64 Gram of a program lives in registers


def tile_config(dtype: torch.dtype, padded_rows: int) -> tuple[int, int]:
    """Columns per tile and warps per program: the widest that spill no registers on sm_80 and sm_90.

    fp32 products run on the FMA units, where every thread holds whole rows of the tile.
    """
    if dtype == torch.float32:
        return min(64, 2048 // padded_rows), 8
    return 128, 4


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
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
