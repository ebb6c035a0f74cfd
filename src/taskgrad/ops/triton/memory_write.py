"""The Triton kernel of ``memory_write``, see ``taskgrad/ops/memory_write.py``.

A program takes neighbouring tiles of columns and a block of rows, and reads and writes each element once:

    ema, before, after   [T, K]   BLOCK_T rows, written where the task is seen
    partials             [P, T]   fp64, of the predictions; added afterwards in a fixed order, no atomics
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8  # rows
TILE = 128  # columns
PROGRAMS = 512


@triton.jit(do_not_specialize=["T", "tiles_per_program"])  # type: ignore[untyped-decorator]
def memory_write_kernel(  # type: ignore[no-untyped-def]
    ema,
    before,
    after,
    gradient,
    to_mean,
    seen,
    left_out,
    theta_before,
    theta_after,
    correction,
    partials,
    old_part,
    new_part,
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
    COLUMNS: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0).to(tl.int64) * tiles_per_program * COLUMNS
    factor = tl.load(to_mean + t, mask=t < T, other=0.0)[:, None]
    enters = tl.load(seen + t, mask=t < T, other=0)[:, None] != 0
    predicted = tl.zeros((BLOCK_T,), dtype=tl.float64)
    for i in range(tiles_per_program):
        k = first + i * COLUMNS + tl.arange(0, COLUMNS)
        inside = (t < T)[:, None] & (k < K)[None, :]
        to_ema = ema + t[:, None] * ema_stride + k[None, :]
        old = tl.load(to_ema, mask=inside, other=0.0)
        memory = old.to(tl.float64)
        if ONE:
            memory *= tl.load(correction + t * correction_stride, mask=t < T, other=0.0)[:, None]
        else:
            memory *= tl.load(correction + t[:, None] * correction_stride + k[None, :], mask=inside, other=0.0)
        start = tl.load(theta_before + k, mask=k < K, other=0.0)
        end = tl.load(theta_after + k, mask=k < K, other=0.0)
        predicted += tl.sum(memory * (end - start)[None, :], axis=1)
        written = inside & enters
        shape: tl.constexpr = (BLOCK_T, COLUMNS)
        tl.store(before + t[:, None] * before_stride + k[None, :], tl.broadcast_to(start[None, :], shape), mask=written)
        tl.store(after + t[:, None] * after_stride + k[None, :], tl.broadcast_to(end[None, :], shape), mask=written)
        if left_out is not None:
            written &= tl.load(left_out + k, mask=k < K, other=1)[None, :] == 0
        g = tl.load(gradient + t[:, None] * gradient_stride + k[None, :], mask=written, other=0.0)
        mean = (g.to(tl.float64) * factor).to(tl.float32)
        tl.store(to_ema, old_part * old + new_part * mean, mask=written)
    tl.store(partials + tl.program_id(0).to(tl.int64) * T + t, predicted, mask=t < T)


def launch(
    ema: Tensor,
    before: Tensor,
    after: Tensor,
    gradient: Tensor,
    to_mean: Tensor,
    seen: Tensor,
    left_out: Tensor | None,
    theta_before: Tensor,
    theta_after: Tensor,
    correction: Tensor,
    decay: float,
) -> Tensor:
    """Run the Triton kernel on a memory that is not empty and, as the gradients, float32."""
    T, K = ema.shape
    written = [(x, rows(x)) for x in (ema, before, after)]
    gradient, correction = rows(gradient), rows(correction)
    tiles = triton.cdiv(K, TILE)
    tiles_per_program = triton.cdiv(tiles, PROGRAMS)
    programs = triton.cdiv(tiles, tiles_per_program)
    partials = before.new_empty(programs, T)
    memory_write_kernel[(programs, triton.cdiv(T, BLOCK))](
        *(x for _, x in written),
        gradient,
        to_mean.contiguous(),
        seen.contiguous().view(torch.uint8),
        None if left_out is None else left_out.contiguous().view(torch.uint8),
        theta_before.contiguous(),
        theta_after.contiguous(),
        correction,
        partials,
        float(decay),
        1 - decay,
        T,
        K,
        *(x.stride(0) for _, x in written),
        gradient.stride(0),
        correction.stride(0),
        tiles_per_program,
        ONE=correction.shape[1] == 1,
        BLOCK_T=BLOCK,
        COLUMNS=TILE,
        num_warps=4,
    )
    for to, x in written:
        if to is not x:
            to.copy_(x)
    return partials.sum(0)


def rows(x: Tensor) -> Tensor:
    """A matrix whose rows lie side by side each."""
    return x if x.stride(1) == 1 else x.contiguous()
