"""The Triton kernels of ``memory_read``, see ``taskgrad/ops/memory_read.py``.

A program takes neighbouring tiles of columns, a block of the memory's rows and one of the gradient's:

    ema, before, after   [T, K]          BLOCK_T rows, padded with zeros
    gradient             [T + 1, K]      BLOCK_S rows, and the BLOCK_T of the memory's tasks
    partials             [P, T, T + 6]   fp64: a row has the task's dots, then its sums; added afterwards in a fixed
                                         order by the second kernel, no atomics

Products are in fp64, on the tensor cores of sm_80 and sm_90.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16  # rows of either operand: the least that tl.dot takes
TILE = 32  # columns
PROGRAMS = 512  # about 4 for each SM of an H100
ADDED = (32, 64)  # partials and results of the second kernel's tile


@triton.jit(do_not_specialize=["T", "tiles_per_program"])  # type: ignore[untyped-decorator]
def memory_read_kernel(  # type: ignore[no-untyped-def]
    ema,
    before,
    after,
    gradient,
    theta,
    to_mean,
    correction,
    partials,
    T,
    K,
    ema_stride,
    before_stride,
    after_stride,
    gradient_stride,
    correction_stride,
    tiles_per_program,
    ONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.program_id(2).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    first = tl.program_id(0).to(tl.int64) * tiles_per_program * COLUMNS
    factor = tl.load(to_mean + t, mask=t < T, other=0.0)[:, None]
    dots = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float64)
    square = tl.zeros((BLOCK_T,), dtype=tl.float64)
    signal = tl.zeros((BLOCK_T,), dtype=tl.float64)
    own = tl.zeros((BLOCK_T,), dtype=tl.float64)
    others = tl.zeros((BLOCK_T,), dtype=tl.float64)
    bend = tl.zeros((BLOCK_T,), dtype=tl.float64)
    for i in range(tiles_per_program):
        k = first + i * COLUMNS + tl.arange(0, COLUMNS)
        inside = (t < T)[:, None] & (k < K)[None, :]
        memory = tl.load(ema + t[:, None] * ema_stride + k[None, :], mask=inside, other=0.0).to(tl.float64)
        if ONE:
            memory *= tl.load(correction + t * correction_stride, mask=t < T, other=0.0)[:, None]
        else:
            memory *= tl.load(correction + t[:, None] * correction_stride + k[None, :], mask=inside, other=0.0)
        to_s = gradient + s[:, None] * gradient_stride + k[None, :]
        g = tl.load(to_s, mask=(s <= T)[:, None] & (k < K)[None, :], other=0.0).to(tl.float64)
        dots += tl.dot(memory, tl.trans(g), out_dtype=tl.float64)
        if tl.program_id(2) == 0:
            mean = tl.load(gradient + t[:, None] * gradient_stride + k[None, :], mask=inside, other=0.0)
            mean = mean.to(tl.float64) * factor
            start = tl.load(before + t[:, None] * before_stride + k[None, :], mask=inside, other=0.0)
            end = tl.load(after + t[:, None] * after_stride + k[None, :], mask=inside, other=0.0)
            here = tl.load(theta + k, mask=k < K, other=0.0)[None, :]
            square += tl.sum(mean * mean, axis=1)
            signal += tl.sum(memory * mean, axis=1)
            own += tl.sum(mean * (end - start), axis=1)
            others += tl.sum(mean * (here - end), axis=1)
            bend += tl.sum(0.5 * ((mean - memory) * (here - start)), axis=1)
    row = partials + (tl.program_id(0).to(tl.int64) * T + t) * (T + 6)
    tl.store(row[:, None] + s[None, :], dots, mask=(t < T)[:, None] & (s <= T)[None, :])
    if tl.program_id(2) == 0:
        tl.store(row + T + 1, square, mask=t < T)
        tl.store(row + T + 2, signal, mask=t < T)
        tl.store(row + T + 3, own, mask=t < T)
        tl.store(row + T + 4, others, mask=t < T)
        tl.store(row + T + 5, bend, mask=t < T)


@triton.jit(do_not_specialize=["T", "programs"])  # type: ignore[untyped-decorator]
def memory_added_kernel(  # type: ignore[no-untyped-def]
    partials,
    dots,
    sums,
    T,
    programs,
    BLOCK_P: tl.constexpr,
    RESULTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * RESULTS + tl.arange(0, RESULTS)
    size = T.to(tl.int64) * (T + 6)
    total = tl.zeros((RESULTS,), dtype=tl.float64)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = (p < programs)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(partials + p[:, None] * size + at[None, :], mask=inside, other=0.0), axis=0)
    t, column = at // (T + 6), at % (T + 6)
    tl.store(dots + t * (T + 1) + column, total, mask=(at < size) & (column <= T))
    tl.store(sums + (column - T - 1) * T + t, total, mask=(at < size) & (column > T))


def launch(
    ema: Tensor, before: Tensor, after: Tensor, gradient: Tensor, theta: Tensor, to_mean: Tensor, correction: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernels on a memory that is not empty and, as the gradients, float32."""
    T, K = ema.shape
    ema, before, after, gradient, correction = (rows(x) for x in (ema, before, after, gradient, correction))
    tiles = triton.cdiv(K, TILE)
    tiles_per_program = triton.cdiv(tiles, min(PROGRAMS, max(1, (1 << 20) // (T * (T + 6)))))  # about 8 MiB of partials
    programs = triton.cdiv(tiles, tiles_per_program)
    partials = ema.new_empty(programs, T, T + 6, dtype=torch.float64)
    dots, sums = before.new_empty(T, T + 1), before.new_empty(5, T)
    memory_read_kernel[(programs, triton.cdiv(T, BLOCK), triton.cdiv(T + 1, BLOCK))](
        ema,
        before,
        after,
        gradient,
        theta.contiguous(),
        to_mean.contiguous(),
        correction,
        partials,
        T,
        K,
        ema.stride(0),
        before.stride(0),
        after.stride(0),
        gradient.stride(0),
        correction.stride(0),
        tiles_per_program,
        ONE=correction.shape[1] == 1,
        BLOCK_T=BLOCK,
        BLOCK_S=BLOCK,
        COLUMNS=TILE,
        num_warps=4,
    )
    block, results = ADDED
    memory_added_kernel[(triton.cdiv(T * (T + 6), results),)](
        partials, dots, sums, T, programs, BLOCK_P=block, RESULTS=results, num_warps=4
    )
    return dots, sums


def rows(x: Tensor) -> Tensor:
    """A matrix whose rows lie side by side each."""
    return x if x.stride(1) == 1 else x.contiguous()
