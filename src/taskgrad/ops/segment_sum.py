"""``segment_sum``: sums of rows by task, the weight gradients of biases and norm layers split by task.

    values [E, M, d]  ->  out[s]   = Σ_{rows n of s} values[n]
    dy, x  [E, M, d]  ->  gamma[s] = Σ_{rows n of s} dy[n] · (x[n] − mean[n]) · rstd[n]
                          beta[s]  = Σ_{rows n of s} dy[n]

E entries carry a task id, each has M rows. Segment s owns the entries ``order[offsets[s]:offsets[s + 1]]``; the last
segment is "rest". x̂ = (x − mean) rstd is computed in registers, never written. Every element is read once, sums are in
fp32 (fp64 for float64), and partial sums are added in an order given by the shapes and offsets: same input, same bits.

Cost: E·M·d elements read (twice that for the norm), E·M/R · d partial sums written and read, R rows each.
On a GPU the kernels in CUDA C++ run where they were built, else those in Triton; in plain torch float64.

The same stem is in ``csrc/ops`` (CPU), ``csrc/cuda`` (CUDA C++), ``triton`` and ``tests/ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._register import Cpp, Triton, register
from .segments import segments_at, within

MAX_SEGMENTS = 4096  # a program of the Triton kernel loads all offsets at once to find its first segment


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics of ``x``: float64 stays, everything else is accumulated in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def segment_sum(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Sum rows by segment.

    Args:
        values: [E, M, d], or [E, d] for one row per entry, or [E] for one number (a loss); float32, float64, bfloat16
            or float16, of any strides.
        order: int64 [E], entries sorted by segment, on the device of ``values``; ``None`` if sorted already.
        offsets: int64 or int32 [S + 1], rising from 0 to E. On the CPU for values on the CPU; on either for CUDA,
            where it is never read by the host if it is on the device.

    Returns:
        [S, d] ([S] for one number per entry), float64 for float64 and float32 otherwise; zeros for a segment without
        entries. NaN throughout where order or offsets on a GPU are malformed.

    Raises:
        TypeError: a dtype or a device that is not supported.
        ValueError: a shape that is not, or the values of order or offsets on a CPU.
    """
    if not isinstance(values, Tensor) or values.dim() not in (1, 2):
        out: Tensor = _SUM(values, order, offsets)
        return out
    out = _SUM(values[:, None, None] if values.dim() == 1 else values[:, None], order, offsets)
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

    Raises:
        TypeError, ValueError: as ``segment_sum``.
    """
    gamma, beta = _NORM(dy, x, mean, rstd, order, offsets)
    return gamma, beta


def _check_sum(values: Tensor, order: Tensor | None, offsets: Tensor) -> None:
    _check.check_operand("values", values)
    _check.check_segments(order, offsets, "values", values)
    if values.dim() != 3:
        raise ValueError(f"values must have shape [E], [E, d] or [E, M, d], got {list(values.shape)}")
    _check.check_segment_shapes(order, offsets, values.shape[0])


def _check_norm(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> None:
    _check.check_operand("dy", dy)
    _check.check_like("x", x, "dy", dy)
    for name, stat in (("mean", mean), ("rstd", rstd)):
        if stat is not None or name == "rstd":
            _check.check_like(name, stat, "dy", dy, stat_dtype(dy))  # type: ignore[arg-type]
    _check.check_segments(order, offsets, "dy", dy)
    if dy.dim() != 3 or x.shape != dy.shape or any(t.shape != dy.shape[:2] for t in (mean, rstd) if t is not None):
        raise ValueError(
            f"dy and x must be [E, M, d], mean and rstd [E, M], got {list(dy.shape)}, {list(x.shape)}, "
            f"{None if mean is None else list(mean.shape)}, {list(rstd.shape)}"
        )
    _check.check_segment_shapes(order, offsets, dy.shape[0])


def reference(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """``segment_sum`` of [E, M, d] in plain torch; without reading ``offsets`` on the host if it is on a device."""
    dtype = stat_dtype(values)
    if order is not None:
        values = values.index_select(0, within(order, values.shape[0]))
    if offsets.device.type != "cpu":
        sums = values.sum(1, dtype=dtype)
        offsets = offsets.clamp(0, values.shape[0])  # segment_reduce believes them
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


def _empty(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, values.shape[2], dtype=stat_dtype(values))


def _fits(values: Tensor, offsets: Tensor) -> bool:
    return values.numel() > 0 and values.dtype != torch.float64 and offsets.shape[0] > 1


def _fits_triton(values: Tensor, offsets: Tensor) -> bool:
    return _fits(values, offsets) and offsets.shape[0] <= MAX_SEGMENTS


def _cpp(kernel: Callable[..., Any], *args: Any) -> Any:
    *rest, offsets = args
    return kernel(*rest, offsets.to(args[0].device, torch.int64, non_blocking=True))


def _triton(kernel: ModuleType, values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    out: Tensor = kernel.launch(values, order, offsets.to(values.device, non_blocking=True))
    return out


def _norm_triton(kernel: ModuleType, dy: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, offsets = args
    gamma, beta = kernel.launch_norm(dy, *rest, offsets.to(dy.device, non_blocking=True))
    return gamma, beta


_SUM = register(
    "segment_sum(Tensor values, Tensor? order, Tensor offsets) -> Tensor",
    check=_check_sum,
    values=segments_at(order=1, offsets=2),
    fake=lambda values, order, offsets: _empty(values, offsets),
    reference=reference,
    native=True,
    cuda=(
        Cpp("segment_sum", lambda values, order, offsets: _fits(values, offsets), _cpp),
        Triton("segment_sum", lambda values, order, offsets: _fits_triton(values, offsets), _triton),
    ),
)
_NORM = register(
    "norm_segment_sum(Tensor dy, Tensor x, Tensor? mean, Tensor rstd, Tensor? order, Tensor offsets)"
    " -> (Tensor gamma, Tensor beta)",
    check=_check_norm,
    values=segments_at(order=4, offsets=5),
    fake=lambda dy, *args: (_empty(dy, args[-1]), _empty(dy, args[-1])),
    reference=norm_reference,
    native=True,
    cuda=(
        Cpp("norm_segment_sum", lambda dy, *args: _fits(dy, args[-1]), _cpp),
        Triton("segment_sum", lambda dy, *args: _fits_triton(dy, args[-1]), _norm_triton),
    ),
)
