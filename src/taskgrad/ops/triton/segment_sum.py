"""The Triton kernel of ``segment_sum``, see ``taskgrad/ops/segment_sum.py``.

N = E · M rows in sorted order, R of them to each of P programs, whatever the segments are: the grid depends
on shapes alone. A program finds the segments its rows touch and writes one partial sum for each:

    offsets   [S + 1]       in entries, on the device
    partials  [P + S, d]    fp32; program p's part of segment s is row p + s. Along the sorted rows p and s never
                            fall and one of them always rises, so no two parts share a row
    row n     entry order[n // M], row n % M of it

A second kernel adds the parts of each segment in the order of p. No atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# of an entry it is a multiple of M; whether all are multiples of 16 is told by ALIGNED
STRIDES = ("dy_entry_stride", "dy_row_stride", "x_entry_stride", "x_row_stride")


def tile_config(d: int, norm: bool) -> tuple[int, int]:
    """Rows and columns of a tile: 32 (norm: 16, of two operands) elements in each of 128 threads, so that whole
    16-byte vectors are loaded and two tiles fit the registers."""
    columns = min(128, int(triton.next_power_of_2(d)))
    return min(1024, (2048 if norm else 4096) // columns), columns


def rows_per_program(rows: int, d: int, block: int, columns: int) -> int:
    """R: about 1024 programs in all (8 for every SM of an H100), but no less than two tiles for each."""
    wanted = triton.cdiv(rows * triton.cdiv(d, columns), 1024)
    return max(2, int(triton.cdiv(wanted, block))) * block


@triton.jit  # type: ignore[untyped-decorator]
def first_and_last_segment(offsets, lo, hi, M, S, S_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The segments of rows lo and hi - 1."""
    s = tl.arange(0, S_PAD)
    ends = tl.load(offsets + 1 + s, mask=s < S, other=0).to(tl.int64) * M
    first = tl.sum(((ends <= lo) & (s < S)).to(tl.int32))
    last = tl.sum(((ends < hi) & (s < S)).to(tl.int32))
    return first, tl.minimum(last, S - 1)  # S where offsets do not end at the number of entries


@triton.jit
def nth_entry(order, n, inside, E):  # type: ignore[no-untyped-def]
    """order[n], one of the E entries whatever it holds."""
    entry = tl.load(order + n, mask=inside, other=0)
    return tl.minimum(tl.maximum(entry, 0), E - 1)


@triton.jit(do_not_specialize=["N", "M", "S", "R", "slots", *STRIDES])  # type: ignore[untyped-decorator]
def segment_sum_kernel(  # type: ignore[no-untyped-def]
    dy,  # [E, M, d]
    x,  # [E, M, d] or None: plain sums
    mean,  # [E, M] or None: 0
    rstd,  # [E, M] or None with x
    order,  # [E] int64 or None: sorted already
    offsets,  # [S + 1]
    partials,  # [1 or 2, P + S, d]: of dy, and of dy · x̂
    N,
    M,
    d,
    S,
    R,
    slots,  # P + S
    dy_entry_stride,
    dy_row_stride,
    x_entry_stride,
    x_row_stride,
    S_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether strides are multiples of 16: loads vectorise then
):
    if ALIGNED:
        dy_entry_stride = dy_entry_stride // 16 * 16
        dy_row_stride = dy_row_stride // 16 * 16
        x_entry_stride = x_entry_stride // 16 * 16
        x_row_stride = x_row_stride // 16 * 16
    p = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lo = p * R
    hi = tl.minimum(lo + R, N)
    first, last = first_and_last_segment(offsets, lo, hi, M, S, S_PAD)
    for s in range(first, last + 1):
        start = tl.maximum(tl.load(offsets + s).to(tl.int64) * M, lo)
        end = tl.minimum(tl.load(offsets + s + 1).to(tl.int64) * M, hi)
        beta = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        gamma = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for n in range(start, end, BLOCK_N):
            rows = n + tl.arange(0, BLOCK_N)
            inside = rows < end
            entry = rows // M
            row = rows - entry * M
            if order is not None:
                entry = nth_entry(order, entry, inside, N // M)
            mask = inside[:, None] & (columns < d)[None, :]
            at = entry * dy_entry_stride + row * dy_row_stride
            y = tl.load(dy + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            beta += y
            if x is not None:
                at = entry * x_entry_stride + row * x_row_stride
                xhat = tl.load(x + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
                if mean is not None:
                    xhat -= tl.load(mean + entry * M + row, mask=inside, other=0.0)[:, None]
                xhat *= tl.load(rstd + entry * M + row, mask=inside, other=0.0)[:, None]
                gamma += y * xhat
        out = partials + (p + s) * d + columns
        tl.store(out, tl.sum(beta, axis=0), mask=columns < d)
        if x is not None:
            tl.store(out + slots.to(tl.int64) * d, tl.sum(gamma, axis=0), mask=columns < d)


@triton.jit(do_not_specialize=["N", "M", "S", "R", "slots"])  # type: ignore[untyped-decorator]
def segment_parts_kernel(  # type: ignore[no-untyped-def]
    partials,  # [kinds, slots, d] fp32
    offsets,  # [S + 1]
    out,  # [kinds, S, d] fp32
    N,
    M,
    d,
    S,
    R,
    slots,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    kind = tl.program_id(2)
    start = tl.minimum(tl.maximum(tl.load(offsets + s).to(tl.int64) * M, 0), N)
    end = tl.minimum(tl.maximum(tl.load(offsets + s + 1).to(tl.int64) * M, 0), N)
    first = start // R
    parts = tl.where(end > start, (end - 1) // R - first + 1, 0)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for i in range(0, parts, BLOCK_P):
        p = i + tl.arange(0, BLOCK_P)
        at = (kind * slots + s + first + p) * d
        mask = (p < parts)[:, None] & (columns < d)[None, :]
        total += tl.load(partials + at[:, None] + columns[None, :], mask=mask, other=0.0)
    tl.store(out + (kind * S + s) * d + columns, tl.sum(total, axis=0), mask=columns < d)


def add_parts(partials: Tensor, offsets: Tensor, rows: int, rows_per_entry: int, R: int) -> Tensor:
    """[kinds, P + S, d] partial sums, laid out as above, to [kinds, S, d]."""
    kinds, slots, d = partials.shape
    S = offsets.shape[0] - 1
    out = partials.new_empty(kinds, S, d)
    block = min(128, triton.next_power_of_2(d))
    grid = (S, triton.cdiv(d, block), kinds)
    segment_parts_kernel[grid](
        partials, offsets, out, rows, rows_per_entry, d, S, R, slots, BLOCK_P=16, BLOCK_D=block, num_warps=4
    )
    return out


def _launch(dy: Tensor, x: Tensor | None, mean: Any, rstd: Any, order: Any, offsets: Tensor) -> Tensor:
    E, M, d = dy.shape
    S = offsets.shape[0] - 1
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    if x is not None:
        x = x if x.stride(2) == 1 else x.contiguous()
        mean, rstd = None if mean is None else mean.contiguous(), rstd.contiguous()
    block_n, block_d = tile_config(d, x is not None)
    R = rows_per_program(E * M, d, block_n, block_d)
    P = triton.cdiv(E * M, R)
    partials = torch.empty(1 if x is None else 2, P + S, d, dtype=torch.float32, device=dy.device)
    strides = (*dy.stride()[:2], *((0, 0) if x is None else x.stride()[:2]))
    segment_sum_kernel[(P, triton.cdiv(d, block_d))](
        dy,
        x,
        mean,
        rstd,
        order,
        offsets,
        partials,
        E * M,
        M,
        d,
        S,
        R,
        P + S,
        *strides,
        S_PAD=triton.next_power_of_2(S),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        ALIGNED=all(stride % 16 == 0 for stride in strides),
        num_warps=4,
    )
    return add_parts(partials, offsets, E * M, M, R)


def launch(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Run the Triton kernel of ``segment_sum`` on [E, M, d], not empty, not float64; ``offsets`` on its device."""
    return _launch(values, None, None, None, order, offsets)[0]


def launch_norm(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel of ``norm_segment_sum``."""
    beta, gamma = _launch(dy, x, mean, rstd, order, offsets)
    return gamma, beta
