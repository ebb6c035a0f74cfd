"""``memory_read``: what a step's gradients say against the stored memory, in one pass over all of it.

    mean   = gradient[:T] * to_mean[:, None]    [T, K], fp64, never whole
    memory = ema * correction                   [T, K], fp64, never whole
    dots[t, s] = <memory[t], gradient[s]>       [T, T + 1], fp64
    sums       = <mean, mean>, <memory, mean>, <mean, after - before>, <mean, theta - after>,
                 <mean - memory, theta - before> / 2, each of its own task      [5, T], fp64

Everything is computed and added in fp64, in an order given by the shapes: same input, same bits. Cost: ema and gradient
read once, 2 T K + T numbers, and before and after, 2 T K of fp64: 25 MB at T = 8 and K = 130,000.

The same stem is in ``csrc/ops/memory_read.cpp`` (CPU), ``triton`` and ``tests/ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._register import Triton, register

DTYPES = (torch.float32, torch.float64)
COLUMNS = 1 << 14  # of the reference at a time, so that what is between two passes stays in the cache


def memory_read(
    ema: Tensor, before: Tensor, after: Tensor, gradient: Tensor, theta: Tensor, to_mean: Tensor, correction: Tensor
) -> tuple[Tensor, Tensor]:
    """Products of a step's gradients with the memory of every task and with the way since its last appearance.

    Args:
        ema: [T, K], float32 or float64, on a CPU or a CUDA device; all of any strides.
        before: [T, K], float64, on the same device, as are all others: the parameters before the task's last step.
        after: [T, K], float64, those after it.
        gradient: [T + 1, K], float32 or float64, of every task and of the rest.
        theta: [K], float64, the parameters now.
        to_mean: [T], float64, what makes the gradient of a task its mean gradient.
        correction: [T, 1] or [T, K], float64, what makes the average the memory.

    Returns:
        dots [T, T + 1] and sums [5, T], see above, in float64; zeros where K is 0.

    Raises:
        TypeError: another dtype or kind of device, or not the same device for all.
        ValueError: shapes that do not fit.
    """
    out: tuple[Tensor, Tensor] = _OP(ema, before, after, gradient, theta, to_mean, correction)
    return out


def check_memory(
    ema: Tensor, before: Tensor, after: Tensor, gradient: Tensor, to_mean: Tensor, correction: Tensor, **vectors: Tensor
) -> None:
    """Raise unless these are what both ops on the memory take, and ``vectors`` are [K] in float64."""
    _check.check_operand("ema", ema, DTYPES)
    _check.check_operand("gradient", gradient, DTYPES)
    _check.check_like("gradient", gradient, "ema", ema, gradient.dtype)
    doubles = {"before": before, "after": after, "to_mean": to_mean, "correction": correction, **vectors}
    for name, x in doubles.items():
        _check.check_like(name, x, "ema", ema, torch.float64)
    if ema.dim() != 2:
        raise ValueError(f"ema must have shape [T, K], got {list(ema.shape)}")
    T, K = ema.shape
    shapes = {"before": (before, [T, K]), "after": (after, [T, K]), "gradient": (gradient, [T + 1, K])}
    shapes |= {"to_mean": (to_mean, [T])} | {name: (x, [K]) for name, x in vectors.items()}
    for name, (x, shape) in shapes.items():
        check_shape(name, x, shape)
    if list(correction.shape) not in ([T, 1], [T, K]):
        raise ValueError(f"correction must have shape {[T, 1]} or {[T, K]}, got {list(correction.shape)}")


def check_shape(name: str, x: Tensor, shape: list[int]) -> None:
    if list(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")


def _check_read(
    ema: Tensor, before: Tensor, after: Tensor, gradient: Tensor, theta: Tensor, to_mean: Tensor, correction: Tensor
) -> None:
    check_memory(ema, before, after, gradient, to_mean, correction, theta=theta)


def reference(
    ema: Tensor, before: Tensor, after: Tensor, gradient: Tensor, theta: Tensor, to_mean: Tensor, correction: Tensor
) -> tuple[Tensor, Tensor]:
    """``memory_read`` in plain torch; by slices of columns, so that no fp64 copy of the memory is made."""
    T, K = ema.shape
    dots, sums = before.new_zeros(T, T + 1), before.new_zeros(5, T)
    correction = correction.expand(T, K)
    for start in range(0, K, COLUMNS):
        c = slice(start, min(start + COLUMNS, K))
        g, memory = gradient[:, c].double(), ema[:, c].double() * correction[:, c]
        mean = g[:T] * to_mean[:, None]
        dots.addmm_(memory, g.mT)
        sums += torch.stack(
            [
                mean.square().sum(1),
                (memory * mean).sum(1),
                (mean * (after[:, c] - before[:, c])).sum(1),
                (mean * (theta[c] - after[:, c])).sum(1),
                0.5 * ((mean - memory) * (theta[c] - before[:, c])).sum(1),
            ]
        )
    return dots, sums


def _fake(
    ema: Tensor, before: Tensor, after: Tensor, gradient: Tensor, theta: Tensor, to_mean: Tensor, correction: Tensor
) -> tuple[Tensor, Tensor]:
    T = ema.shape[0]
    return before.new_empty(T, T + 1), before.new_empty(5, T)


def _fits(ema: Tensor, before: Tensor, after: Tensor, gradient: Tensor, *rest: Tensor) -> bool:
    return ema.numel() > 0 and ema.dtype == gradient.dtype == torch.float32


_OP = register(
    "memory_read(Tensor ema, Tensor before, Tensor after, Tensor gradient, Tensor theta, Tensor to_mean,"
    " Tensor correction) -> (Tensor dots, Tensor sums)",
    check=_check_read,
    fake=_fake,
    reference=reference,
    native=True,
    cuda=(Triton("memory_read", _fits, lambda kernel, *args: kernel.launch(*args)),),
)
