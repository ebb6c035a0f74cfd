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

from . import _native, _shared
from ._shared import triton_obstacle

MAX_ROWS = 64  # of the Triton kernel: the fp64 Gram of a program lives in registers


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
    _check(block)
    _shared.check_real("block", block)
    total, gram = torch.ops.taskgrad.sum_gram(block.detach())
    return total, gram


def _check(block: Tensor) -> None:
    _shared.check_operand("block", block)
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


@torch.library.register_fake("taskgrad::sum_gram")  # type: ignore[untyped-decorator]
def _fake(block: Tensor) -> tuple[Tensor, Tensor]:
    _check(block)
    T, M = block.shape
    return block.new_empty(M), block.new_empty(T, T, dtype=torch.float64)


@torch.library.impl("taskgrad::sum_gram", "CompositeExplicitAutograd")
def _without_kernel(block: Tensor) -> tuple[Tensor, Tensor]:
    """What the dispatcher finds where no kernel is registered: on a CPU, until the native library is in."""
    _check(block)
    if _native.ready():
        total, gram = torch.ops.taskgrad.sum_gram(block)
        return total, gram
    return reference(block)


@torch.library.impl("taskgrad::sum_gram", "CUDA")
def _cuda(block: Tensor) -> tuple[Tensor, Tensor]:
    _check(block)
    fits = block.numel() > 0 and block.shape[0] <= MAX_ROWS and block.dtype != torch.float64
    if not fits or triton_obstacle(block.device) is not None:
        return reference(block)
    from .triton import sum_gram as kernel

    with torch.cuda.device(block.device):
        return kernel.launch(block)
