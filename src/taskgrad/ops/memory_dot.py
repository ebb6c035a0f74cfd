"""``memory_dot``: all inner products of the stored memory with a step's gradients, in one pass over both.

    memory [T, K], stats [S, K]  ->  dots[t, s] = <memory[t], stats[s]>   [T, S], fp64

Products are accumulated in fp64 (on a GPU: fp32 within a tile, fp64 over tiles), in an order given by the shapes: same
input, same bits. Cost: (T + S) K elements read, T S K multiplications; memory is the limit below about 64 tasks.

The same stem is in ``csrc/ops/memory_dot.cpp`` (CPU), ``triton`` and ``tests/ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._register import Triton, register

DTYPES = (torch.float32, torch.float64)


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
    dots: Tensor = _OP(memory, stats)
    return dots


def _check_matrices(memory: Tensor, stats: Tensor) -> None:
    _check.check_operand("memory", memory, DTYPES)
    _check.check_like("stats", stats, "memory", memory)
    if memory.dim() != 2 or stats.dim() != 2 or memory.shape[1] != stats.shape[1]:
        raise ValueError(f"memory must be [T, K] and stats [S, K], got {list(memory.shape)} and {list(stats.shape)}")


def reference(memory: Tensor, stats: Tensor) -> Tensor:
    """``memory_dot`` in plain torch; by slices of columns, so that no fp64 copy of either is made."""
    dots = memory.new_zeros(memory.shape[0], stats.shape[0], dtype=torch.float64)
    for left, right in zip(memory.split(1 << 14, dim=1), stats.split(1 << 14, dim=1), strict=True):
        dots.addmm_(left.double(), right.double().mT)
    return dots


def _fake(memory: Tensor, stats: Tensor) -> Tensor:
    return memory.new_empty(memory.shape[0], stats.shape[0], dtype=torch.float64)


def _fits(memory: Tensor, stats: Tensor) -> bool:
    return memory.numel() > 0 and stats.numel() > 0 and memory.dtype != torch.float64


_OP = register(
    "memory_dot(Tensor memory, Tensor stats) -> Tensor",
    check=_check_matrices,
    fake=_fake,
    reference=reference,
    native=True,
    cuda=(Triton("memory_dot", _fits, lambda kernel, memory, stats: kernel.launch(memory, stats)),),
)
