"""``memory_dot``: all inner products of the stored memory with a step's gradients, in one pass over both.

    memory [T, K], stats [S, K]  ->  dots[t, s] = <memory[t], stats[s]>   [T, S], fp64

Products are accumulated in fp64 (on a GPU: fp32 within a tile, fp64 over tiles), in an order given by the shapes: same
input, same bits. Cost: (T + S) K elements read, T S K multiplications; memory is the limit below about 64 tasks.

The same stem is in ``csrc/ops/memory_dot.cpp`` (CPU) and ``tests/ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native, _shared
from ._shared import triton_obstacle

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
    _check(memory, stats)
    _shared.check_real("memory", memory)
    dots: Tensor = torch.ops.taskgrad.memory_dot(memory.detach(), stats.detach())
    return dots


def _check(memory: Tensor, stats: Tensor) -> None:
    _shared.check_operand("memory", memory, DTYPES)
    _shared.check_like("stats", stats, "memory", memory)
    if memory.dim() != 2 or stats.dim() != 2 or memory.shape[1] != stats.shape[1]:
        raise ValueError(f"memory must be [T, K] and stats [S, K], got {list(memory.shape)} and {list(stats.shape)}")


def reference(memory: Tensor, stats: Tensor) -> Tensor:
    """``memory_dot`` in plain torch; by slices of columns, so that no fp64 copy of either is made."""
    dots = memory.new_zeros(memory.shape[0], stats.shape[0], dtype=torch.float64)
    for left, right in zip(memory.split(1 << 14, dim=1), stats.split(1 << 14, dim=1), strict=True):
        dots.addmm_(left.double(), right.double().mT)
    return dots


@torch.library.register_fake("taskgrad::memory_dot")  # type: ignore[untyped-decorator]
def _fake(memory: Tensor, stats: Tensor) -> Tensor:
    _check(memory, stats)
    return memory.new_empty(memory.shape[0], stats.shape[0], dtype=torch.float64)


@torch.library.impl("taskgrad::memory_dot", "CompositeExplicitAutograd")
def _without_kernel(memory: Tensor, stats: Tensor) -> Tensor:
    """What the dispatcher finds where no kernel is registered: on a CPU, until the native library is in."""
    _check(memory, stats)
    if _native.ready():
        return torch.ops.taskgrad.memory_dot(memory, stats)  # type: ignore[no-any-return]
    return reference(memory, stats)


@torch.library.impl("taskgrad::memory_dot", "CUDA")
def _cuda(memory: Tensor, stats: Tensor) -> Tensor:
    _check(memory, stats)
    fits = memory.numel() > 0 and stats.numel() > 0 and memory.dtype != torch.float64
    if not fits or triton_obstacle(memory.device) is not None:
        return reference(memory, stats)
    from .triton import memory_dot as kernel

    with torch.cuda.device(memory.device):
        return kernel.launch(memory, stats)
