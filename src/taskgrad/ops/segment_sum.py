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

import torch
from torch import Tensor

from . import _native, _shared
from ._shared import stat_dtype as stat_dtype
from ._shared import triton_obstacle

MAX_SEGMENTS = 4096  # a program of the Triton kernel loads all offsets at once to find its first segment


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
        offsets: int64 or int32 [S + 1], rising from 0 to E. On the CPU for values on the CPU; on either for CUDA,
            where it is never read by the host if it is on the device.

    Returns:
        [S, d] ([S] for one number per entry), float64 for float64 and float32 otherwise; zeros for a segment without
        entries. NaN throughout where order or offsets on a GPU are malformed.

    Raises:
        TypeError: a dtype or a device that is not supported.
        ValueError: a shape that is not, or the values of order or offsets on a CPU.
    """
    _check(values, order, offsets, (1, 2, 3))
    _shared.check_real("values", values)
    _shared.check_values(order, offsets, values.shape[0])
    rows = values.detach()
    rows = rows[:, None, None] if rows.dim() == 1 else rows[:, None] if rows.dim() == 2 else rows
    out = torch.ops.taskgrad.segment_sum(rows, order, offsets)
    out = _shared.spoiled(out, _shared.fault_on_gpu(order, offsets, values.shape[0]))
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
    _check_norm(dy, x, mean, rstd, order, offsets)
    _shared.check_real("dy", dy)
    _shared.check_values(order, offsets, dy.shape[0])
    gamma, beta = torch.ops.taskgrad.norm_segment_sum(dy.detach(), x.detach(), mean, rstd, order, offsets)
    wrong = _shared.fault_on_gpu(order, offsets, dy.shape[0])
    return _shared.spoiled(gamma, wrong), _shared.spoiled(beta, wrong)


def _check(values: Tensor, order: Tensor | None, offsets: Tensor, dims: tuple[int, ...] = (3,)) -> None:
    _shared.check_operand("values", values)
    _shared.check_segments(order, offsets, "values", values)
    if values.dim() not in dims:
        raise ValueError(f"values must have shape [E], [E, d] or [E, M, d], got {list(values.shape)}")
    _shared.check_segment_shapes(order, offsets, values.shape[0])


def _check_norm(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> None:
    _shared.check_operand("dy", dy)
    _shared.check_like("x", x, "dy", dy)
    for name, stat in (("mean", mean), ("rstd", rstd)):
        if stat is not None or name == "rstd":
            _shared.check_like(name, stat, "dy", dy, stat_dtype(dy))  # type: ignore[arg-type]
    _shared.check_segments(order, offsets, "dy", dy)
    if dy.dim() != 3 or x.shape != dy.shape or any(t.shape != dy.shape[:2] for t in (mean, rstd) if t is not None):
        raise ValueError(
            f"dy and x must be [E, M, d], mean and rstd [E, M], got {list(dy.shape)}, {list(x.shape)}, "
            f"{None if mean is None else list(mean.shape)}, {list(rstd.shape)}"
        )
    _shared.check_segment_shapes(order, offsets, dy.shape[0])


def reference(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """``segment_sum`` of [E, M, d] in plain torch; without reading ``offsets`` on the host if it is on a device."""
    dtype = stat_dtype(values)
    if order is not None:
        values = values.index_select(0, _shared.within(order, values.shape[0]))
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


@torch.library.register_fake("taskgrad::segment_sum")  # type: ignore[untyped-decorator]
def _fake(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    _check(values, order, offsets)
    return values.new_empty(offsets.shape[0] - 1, values.shape[2], dtype=stat_dtype(values))


@torch.library.register_fake("taskgrad::norm_segment_sum")  # type: ignore[untyped-decorator]
def _norm_fake(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    _check_norm(dy, x, mean, rstd, order, offsets)
    return _fake(dy, order, offsets), _fake(dy, order, offsets)


@torch.library.impl("taskgrad::segment_sum", "CompositeExplicitAutograd")
def _without_kernel(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """What the dispatcher finds where no kernel is registered: on a CPU, until the native library is in."""
    _check(values, order, offsets)
    if _native.ready():
        return torch.ops.taskgrad.segment_sum(values, order, offsets)  # type: ignore[no-any-return]
    _shared.check_values(order, offsets, values.shape[0])
    return reference(values, order, offsets)


@torch.library.impl("taskgrad::norm_segment_sum", "CompositeExplicitAutograd")
def _norm_without_kernel(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    _check_norm(dy, x, mean, rstd, order, offsets)
    if _native.ready():
        gamma, beta = torch.ops.taskgrad.norm_segment_sum(dy, x, mean, rstd, order, offsets)
        return gamma, beta
    _shared.check_values(order, offsets, dy.shape[0])
    return norm_reference(dy, x, mean, rstd, order, offsets)


@torch.library.impl("taskgrad::segment_sum", "CUDA")
def _cuda(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    _check(values, order, offsets)
    _shared.check_values(None, offsets, values.shape[0])
    if not _fits(values, offsets):
        return reference(values, order, offsets)
    from .triton import segment_sum as kernel

    with torch.cuda.device(values.device):
        return kernel.launch(values, order, offsets.to(values.device, non_blocking=True))


@torch.library.impl("taskgrad::norm_segment_sum", "CUDA")
def _norm_cuda(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    _check_norm(dy, x, mean, rstd, order, offsets)
    _shared.check_values(None, offsets, dy.shape[0])
    if not _fits(dy, offsets):
        return norm_reference(dy, x, mean, rstd, order, offsets)
    from .triton import segment_sum as kernel

    with torch.cuda.device(dy.device):
        return kernel.launch_norm(dy, x, mean, rstd, order, offsets.to(dy.device, non_blocking=True))


def _fits(values: Tensor, offsets: Tensor) -> bool:
    fits = values.numel() > 0 and values.dtype != torch.float64 and 1 < offsets.shape[0] <= MAX_SEGMENTS
    return fits and triton_obstacle(values.device) is None
