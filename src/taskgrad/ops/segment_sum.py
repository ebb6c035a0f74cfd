"""``segment_sum``: sums of rows by task, the weight gradients of biases and norm layers split by task.

    values [E, M, d]  ->  out[s]   = Σ_{rows n of s} values[n]
    dy, x  [E, M, d]  ->  gamma[s] = Σ_{rows n of s} dy[n] · (x[n] − mean[n]) · rstd[n]
                          beta[s]  = Σ_{rows n of s} dy[n]

E entries carry a task id, each has M rows. Segment s owns the entries ``order[offsets[s]:offsets[s + 1]]``; the last
segment is "rest". x̂ = (x − mean) rstd is computed in registers, never written. Every element is read once, sums are in
fp32 (fp64 for float64), and partial sums are added in an order given by the shapes and offsets: same input, same bits.

Cost: E·M·d elements read (twice that for the norm), E·M/R · d partial sums written and read, R rows each.
On a GPU the Triton kernels run; those in CUDA C++ are ``torch.ops.taskgrad.segment_sum_cuda`` and
``norm_segment_sum_cuda``, see ``sum_gram``. The same stem is in ``csrc/ops`` (CPU), ``csrc/cuda`` and ``tests/ops``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import _native
from .sum_gram import DTYPES, triton_obstacle

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference runs on its GPUs
    triton = None

torch.library.define("taskgrad::segment_sum", "(Tensor values, Tensor? order, Tensor offsets) -> Tensor")
torch.library.define(
    "taskgrad::norm_segment_sum",
    "(Tensor dy, Tensor x, Tensor? mean, Tensor rstd, Tensor? order, Tensor offsets) -> (Tensor gamma, Tensor beta)",
)


def segment_sum(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Sum rows by segment.

    Args:
        values: [E, M, d], or [E, d] for one row per entry, or [E] for one number (a loss); float32, float64, bfloat16
            or float16, of any strides.
        order: int64 [E], entries sorted by segment, on the device of ``values``; ``None`` if sorted already.
        offsets: int64 (on CUDA also int32) [S + 1], from 0 to E. On the CPU for values on the CPU; on either for CUDA,
            where it is never read by the host if it is on the device.

    Returns:
        [S, d] ([S] for one number per entry), float64 for float64 and float32 otherwise.

    Raises:
        TypeError: a dtype or a device that is not supported.
        ValueError: a shape that is not.
    """
    _check(values, order, offsets, "values")
    if values.dim() not in (1, 2, 3):
        raise ValueError(f"values must have shape [E], [E, d] or [E, M, d], got {list(values.shape)}")
    rows = values.detach()
    rows = rows[:, None, None] if rows.dim() == 1 else rows[:, None] if rows.dim() == 2 else rows
    out: Tensor = torch.ops.taskgrad.segment_sum(rows, order, offsets)
    return out[:, 0] if values.dim() == 1 else out


def norm_segment_sum(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias gradients of a LayerNorm, or (``mean=None``) the weight gradient of an RMSNorm, by segment.

    Args:
        dy: [E, M, d], gradient of the output.
        x: [E, M, d], input, in the dtype of ``dy``.
        mean, rstd: [E, M], float64 for float64 and float32 otherwise; a mean of ``None`` is 0.
        order, offsets: see ``segment_sum``.

    Returns:
        ``gamma`` and ``beta`` [S, d], float64 for float64 and float32 otherwise.
    """
    _check(dy, order, offsets, "dy")
    if x.dtype != dy.dtype or any(t.dtype != stat_dtype(dy) for t in (mean, rstd) if t is not None):
        raise TypeError(f"x must be {dy.dtype} as dy is, mean and rstd {stat_dtype(dy)}, got {x.dtype}, {rstd.dtype}")
    if dy.dim() != 3 or x.shape != dy.shape or any(t.shape != dy.shape[:2] for t in (mean, rstd) if t is not None):
        raise ValueError(f"dy and x must be [E, M, d], mean and rstd [E, M], got {list(dy.shape)}, {list(rstd.shape)}")
    gamma, beta = torch.ops.taskgrad.norm_segment_sum(dy.detach(), x.detach(), mean, rstd, order, offsets)
    return gamma, beta


def reference(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """``segment_sum`` of [E, M, d] in plain torch; without reading ``offsets`` on the host if it is on a device."""
    dtype = stat_dtype(values)
    if order is not None:
        values = values.index_select(0, order)
    if offsets.device.type != "cpu":
        sums = values.sum(1, dtype=dtype)
        return torch.segment_reduce(sums, "sum", offsets=offsets, axis=0, initial=0, unsafe=True)
    out = values.new_zeros(offsets.shape[0] - 1, values.shape[2], dtype=dtype)
    for s, (start, end) in enumerate(pairwise(offsets.tolist())):
        torch.sum(values[start:end], (0, 1), dtype=dtype, out=out[s])
    return out


def norm_reference(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """``norm_segment_sum`` in plain torch."""
    xhat = x.to(rstd.dtype) if mean is None else x.to(rstd.dtype) - mean[..., None]
    return reference(dy * (xhat * rstd[..., None]), order, offsets), reference(dy, order, offsets)


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics of ``x``: float64 stays, everything else is accumulated in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(values: Tensor, order: Tensor | None, offsets: Tensor, name: str) -> None:
    if values.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {values.dtype}: convert it first")
    if values.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} must be on a cpu or cuda device, got {values.device}: move it with .to() first")
    if offsets.dtype not in (torch.int64, torch.int32) or (order is not None and order.dtype != torch.int64):
        raise TypeError(f"order must be int64 and offsets int64 or int32, got offsets of {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 2 or values.dim() == 0:
        raise ValueError(f"offsets must have shape [S + 1], S at least 1, got {list(offsets.shape)}")
    if order is not None and order.shape != values.shape[:1]:
        raise ValueError(f"order must have shape [{values.shape[0]}], one number per entry, got {list(order.shape)}")


@torch.library.register_fake("taskgrad::segment_sum")  # type: ignore[untyped-decorator]
def _fake(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, values.shape[2], dtype=stat_dtype(values))


@torch.library.register_fake("taskgrad::norm_segment_sum")  # type: ignore[untyped-decorator]
def _norm_fake(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return _fake(dy, order, offsets), _fake(dy, order, offsets)


@torch.library.impl("taskgrad::segment_sum", "CompositeExplicitAutograd")
def _without_kernel(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """What the dispatcher finds where no kernel is registered: on a CPU, until the native library is in."""
    if values.device.type == "cpu" and _native.status().kind != "reference":
        return torch.ops.taskgrad.segment_sum(values, order, offsets)  # type: ignore[no-any-return]
    return reference(values, order, offsets)


@torch.library.impl("taskgrad::norm_segment_sum", "CompositeExplicitAutograd")
def _norm_without_kernel(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    if dy.device.type == "cpu" and _native.status().kind != "reference":
        gamma, beta = torch.ops.taskgrad.norm_segment_sum(dy, x, mean, rstd, order, offsets)
        return gamma, beta
    return norm_reference(dy, x, mean, rstd, order, offsets)


@torch.library.impl("taskgrad::segment_sum", "CUDA")
def _cuda(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    if not _fits(values, offsets):
        return reference(values, order, offsets)
    with torch.cuda.device(values.device):
        return launch(values, order, offsets.to(values.device, non_blocking=True))


@torch.library.impl("taskgrad::norm_segment_sum", "CUDA")
def _norm_cuda(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    if not _fits(dy, offsets):
        return norm_reference(dy, x, mean, rstd, order, offsets)
    with torch.cuda.device(dy.device):
        return launch_norm(dy, x, mean, rstd, order, offsets.to(dy.device, non_blocking=True))


def _fits(values: Tensor, offsets: Tensor) -> bool:
    fits = values.numel() > 0 and values.dtype != torch.float64 and offsets.shape[0] <= MAX_SEGMENTS
    return fits and triton_obstacle(values.device) is None


# ----------------------------------------------------------------------------------------------------------
# Triton. N = E · M rows in sorted order, R of them to each of P programs, whatever the segments are: the grid depends
# on shapes alone. A program finds the segments its rows touch and writes one partial sum for each:
#
#     offsets   [S + 1]       in entries, on the device
#     partials  [P + S, d]    fp32; program p's part of segment s is row p + s. Along the sorted rows p and s never
#                             fall and one of them always rises, so no two parts share a row
#     row n     entry order[n // M], row n % M of it
#
# A second kernel adds the parts of each segment in the order of p. No atomics.

MAX_SEGMENTS = 4096  # a program loads all offsets at once to find its first segment


def tile_config(d: int, norm: bool) -> tuple[int, int]:
    """Rows and columns of a tile: 32 (norm: 16, of two operands) elements in each of 128 threads, so that whole
    16-byte vectors are loaded and two tiles fit the registers."""
    columns = min(128, int(triton.next_power_of_2(d)))
    return min(1024, (2048 if norm else 4096) // columns), columns


def rows_per_program(rows: int, d: int, block: int, columns: int) -> int:
    """R: about 1024 programs in all (8 for every SM of an H100), but no less than two tiles for each."""
    wanted = triton.cdiv(rows * triton.cdiv(d, columns), 1024)
    return max(2, int(triton.cdiv(wanted, block))) * block


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def first_and_last_segment(offsets, lo, hi, M, S, S_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
        """The segments of rows lo and hi - 1."""
        s = tl.arange(0, S_PAD)
        ends = tl.load(offsets + 1 + s, mask=s < S, other=0).to(tl.int64) * M
        first = tl.sum(((ends <= lo) & (s < S)).to(tl.int32))
        last = tl.sum(((ends < hi) & (s < S)).to(tl.int32))
        return first, last

    @triton.jit  # type: ignore[untyped-decorator]
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
    ):
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
                    entry = tl.load(order + entry, mask=inside, other=0)
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

    @triton.jit  # type: ignore[untyped-decorator]
    def segment_parts_kernel(  # type: ignore[no-untyped-def]
        partials,  # [kinds, slots, d] fp32
        offsets,  # [S + 1]
        out,  # [kinds, S, d] fp32
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
        start = tl.load(offsets + s).to(tl.int64) * M
        end = tl.load(offsets + s + 1).to(tl.int64) * M
        first = start // R
        parts = tl.where(end > start, (end - 1) // R - first + 1, 0)
        total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
        for i in range(0, parts, BLOCK_P):
            p = i + tl.arange(0, BLOCK_P)
            at = (kind * slots + s + first + p) * d
            mask = (p < parts)[:, None] & (columns < d)[None, :]
            total += tl.load(partials + at[:, None] + columns[None, :], mask=mask, other=0.0)
        tl.store(out + (kind * S + s) * d + columns, tl.sum(total, axis=0), mask=columns < d)


def add_parts(partials: Tensor, offsets: Tensor, rows_per_entry: int, R: int) -> Tensor:
    """[kinds, P + S, d] partial sums, laid out as above, to [kinds, S, d]."""
    kinds, slots, d = partials.shape
    S = offsets.shape[0] - 1
    out = partials.new_empty(kinds, S, d)
    block = min(128, triton.next_power_of_2(d))
    grid = (S, triton.cdiv(d, block), kinds)
    segment_parts_kernel[grid](
        partials, offsets, out, rows_per_entry, d, S, R, slots, BLOCK_P=16, BLOCK_D=block, num_warps=4
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
        dy.stride(0),
        dy.stride(1),
        0 if x is None else x.stride(0),
        0 if x is None else x.stride(1),
        S_PAD=triton.next_power_of_2(S),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return add_parts(partials, offsets, M, R)


def launch(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Run the Triton kernel of ``segment_sum`` on [E, M, d], not empty, not float64; ``offsets`` on its device."""
    return _launch(values, None, None, None, order, offsets)[0]


def launch_norm(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel of ``norm_segment_sum``."""
    beta, gamma = _launch(dy, x, mean, rstd, order, offsets)
    return gamma, beta
