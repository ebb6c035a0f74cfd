"""``memory_write``: a step enters the stored memory, in place and in one pass over it.

    predicted[t] = <ema[t] * correction[t], theta_after - theta_before>      [T], fp64, ema as it was
    where seen[t]:
        before[t], after[t] = theta_before, theta_after
        ema[t] = decay * ema[t] + (1 - decay) * mean[t]      where not left_out, mean = gradient[:T] * to_mean

``predicted`` is computed and added in fp64 in an order given by the shapes, the mean in fp64; the average is in its own
dtype, every product rounded to it (a GPU may add to one that is not: half a unit in the last place). What does not
enter may be NaN. Cost: ema read and written, gradient read, before and after written: 29 MB at T = 8 and K = 130,000.

The same stem is in ``csrc/ops/memory_write.cpp`` (CPU), ``triton`` and ``tests/ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._register import Triton, register
from .memory_read import COLUMNS, check_memory, check_shape


def memory_write(
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
    """Enter a step into the memory, and say what it did to every task by the memory as it was.

    Args:
        ema: [T, K], float32 or float64, on a CPU or a CUDA device; written, as are the next two; all of any strides.
        before: [T, K], float64, on the same device, as are all others.
        after: [T, K], float64.
        gradient: [T + 1, K], float32 or float64, of every task and of the rest, which does not enter.
        to_mean: [T], float64, what makes the gradient of a task its mean gradient.
        seen: [T], bool, the tasks that enter.
        left_out: [K], bool, columns whose average stays as it is; ``None`` for none.
        theta_before: [K], float64, the parameters before the step.
        theta_after: [K], float64, those after it.
        correction: [T, 1] or [T, K], float64, what makes the average, as it was, the memory.
        decay: in [0, 1].

    Returns:
        predicted [T] in float64, zeros where K is 0.

    Raises:
        TypeError: another dtype or kind of device, or not the same device for all.
        ValueError: shapes that do not fit, a decay outside of [0, 1], or a written tensor that overlaps itself.
    """
    out: Tensor = _OP(
        ema, before, after, gradient, to_mean, seen, left_out, theta_before, theta_after, correction, decay
    )
    return out


def _check_write(
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
) -> None:
    for name, x in {"seen": seen, **({} if left_out is None else {"left_out": left_out})}.items():
        _check.check_operand(name, x, (torch.bool,))
    if not isinstance(decay, (int, float)):
        raise TypeError(f"decay must be a number, got {type(decay).__name__}")
    check_memory(ema, before, after, gradient, to_mean, correction, theta_before=theta_before, theta_after=theta_after)
    _check.check_like("seen", seen, "ema", ema, torch.bool)
    check_shape("seen", seen, [ema.shape[0]])
    if left_out is not None:
        _check.check_like("left_out", left_out, "ema", ema, torch.bool)
        check_shape("left_out", left_out, [ema.shape[1]])
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    for name, x in (("ema", ema), ("before", before), ("after", after)):
        if _overlaps(x):
            raise ValueError(f"{name} must not overlap itself, got the strides {x.stride()}: clone it first")


def _overlaps(x: Tensor) -> bool:
    """Whether two elements of a matrix share their place in memory (or look as if they might)."""
    if x.numel() == 0:
        return False
    extents = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    reach = 1  # of what was looked at so far, from its first element to behind its last
    for stride, size in extents:
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def reference(
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
    """``memory_write`` in plain torch; by slices of columns, so that no fp64 copy of the memory is made."""
    T, K = ema.shape
    row, correction = seen[:, None], correction.expand(T, K)
    predicted = before.new_zeros(T)
    for start in range(0, K, COLUMNS):
        c = slice(start, min(start + COLUMNS, K))
        old = ema[:, c]
        predicted += (old.double() * correction[:, c]) @ (theta_after[c] - theta_before[c])
        mean = (gradient[:T, c].double() * to_mean[:, None]).to(ema.dtype)
        # where, not a product: what does not enter may be NaN
        enters = row if left_out is None else row & ~left_out[c]
        old.copy_(torch.where(enters, decay * old + (1 - decay) * mean, old))
        before[:, c] = torch.where(row, theta_before[c], before[:, c])
        after[:, c] = torch.where(row, theta_after[c], after[:, c])
    return predicted


def _fake(ema: Tensor, before: Tensor, *rest: Tensor | float | None) -> Tensor:
    return before.new_empty(ema.shape[0])


def _fits(ema: Tensor, before: Tensor, after: Tensor, gradient: Tensor, *rest: Tensor | float | None) -> bool:
    return ema.numel() > 0 and ema.dtype == gradient.dtype == torch.float32


_OP = register(
    "memory_write(Tensor(a!) ema, Tensor(b!) before, Tensor(c!) after, Tensor gradient, Tensor to_mean, Tensor seen,"
    " Tensor? left_out, Tensor theta_before, Tensor theta_after, Tensor correction, float decay) -> Tensor predicted",
    check=_check_write,
    fake=_fake,
    reference=reference,
    native=True,
    cuda=(Triton("memory_write", _fits, lambda kernel, *args: kernel.launch(*args)),),
)
