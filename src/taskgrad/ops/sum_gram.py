"""``sum_gram``: the column sum and the Gram matrix of a block, in one pass over memory.

    block [T, M]  ->  sum[m]     = sum_t block[t, m]
                      gram[s, t] = <block[s], block[t]>

With one row per task, holding that task's part of a weight gradient, ``sum`` is the gradient itself and
``gram`` what conflicts are read from. A plain fp32 dot product over millions of columns loses three digits,
so the Gram is accumulated in fp64 (on a GPU: fp32 within a tile). The kernels add their partial sums in an
order given by the shape: same input, same bits, for any number of threads.

On a GPU the kernel in CUDA C++ runs where it was built, for up to 32 rows: two launches, where the one in Triton and
what it leaves to torch are six, and most blocks are small. Else the one in Triton up to 64 rows; else, and for float64,
plain torch.

The same stem is in ``csrc/ops`` (CPU), ``csrc/cuda`` (CUDA C++), ``triton``, ``tests/ops`` and ``benchmarks``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._register import Cpp, Triton, register

CPP_ROWS = 32  # at most, as kMaxRows in csrc/cuda/sum_gram.cuh: they lie in shared memory
MAX_ROWS = 64  # of the Triton kernel: the fp64 Gram of a program lives in registers


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
    total, gram = _OP(block)
    return total, gram


def _check_block(block: Tensor) -> None:
    _check.check_operand("block", block)
    if block.dim() != 2:
        raise ValueError(f"block must have shape [T, M], one row per task, got {list(block.shape)}: reshape it first")


def reference(block: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_gram`` in plain torch; by slices of columns, so that no fp64 copy of the whole block is made."""
    total = block.sum(0, dtype=torch.float64 if block.dtype == torch.float64 else torch.float32)
    gram = block.new_zeros(block.shape[0], block.shape[0], dtype=torch.float64)
    for part in block.split(1 << 16, dim=1):
        wide = part.double()
        gram.addmm_(wide, wide.mT)
    return total.to(block.dtype), (gram + gram.mT) / 2


def _fake(block: Tensor) -> tuple[Tensor, Tensor]:
    T, M = block.shape
    return block.new_empty(M), block.new_empty(T, T, dtype=torch.float64)


def _fits(block: Tensor, rows: int) -> bool:
    return block.numel() > 0 and block.shape[0] <= rows and block.dtype != torch.float64


_OP = register(
    "sum_gram(Tensor block) -> (Tensor sum, Tensor gram)",
    check=_check_block,
    fake=_fake,
    reference=reference,
    native=True,
    cuda=(
        Cpp("sum_gram", lambda block: _fits(block, CPP_ROWS), lambda kernel, block: kernel(block)),
        Triton("sum_gram", lambda block: _fits(block, MAX_ROWS), lambda kernel, block: kernel.launch(block)),
    ),
)
