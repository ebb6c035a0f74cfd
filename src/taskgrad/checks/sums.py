"""Do the tasks' gradients add up to the gradient? All in sketches, on the device, in float64; nothing waits.

Two questions. Of a parameter, in a backward pass: does what arrives at it equal the sum of what arrives at its tap? If
not, the parameter is also used where no tracked module sees it. Of a step, where gradients were written after the last
pass: is ``param.grad`` one common factor (clipping by norm, loss scale, averaging over ranks) times that sum?
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2
NEGLIGIBLE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the whole gradient: rounding of a vanishing one


def tolerances(dtypes: list[torch.dtype], half: bool, device: torch.device) -> Tensor:
    """[P] float64, relative; ``half``: some layer ran in half precision."""
    low = (torch.bfloat16, torch.float16)
    limit = [HALF_TOLERANCE if half or d in low else TOLERANCE.get(d, TOLERANCE[torch.float32]) for d in dtypes]
    return torch.tensor(limit, dtype=torch.float64, device="cpu").to(device, non_blocking=True)


def differing(squares: Tensor, limit: Tensor, dtype: torch.dtype) -> Tensor:
    """Parameters at which something else arrived than the sum of what arrived at their taps: bool [P].

    Args:
        squares: [P, 3], squared norms of the difference, of the tap's parts and of the parameter's gradient.
        limit: [P], relative tolerance.
        dtype: of the taps.
    """
    difference, parts, whole = squares.sqrt().unbind(1)
    negligible = NEGLIGIBLE.get(dtype, NEGLIGIBLE[torch.float32]) * squares[:, 2].sum().sqrt()
    apart = difference > limit * torch.maximum(parts, whole) + negligible
    return apart & torch.isfinite(squares).all(1)  # what is not finite is said of the step


def unlike(gradient: Tensor, written: Tensor, widths: Tensor, limit: Tensor) -> Tensor:
    """Parameters whose ``param.grad`` is not c times the sum over tasks, c the factor that fits most of them: bool [P].

    Args:
        gradient: G [T + 1, K], the columns of all parameters side by side.
        written: [K] float64, the sketch of ``param.grad``.
        widths: int64 [P], columns of each.
        limit: [P], relative tolerance.
    """
    dtype = gradient.dtype
    gradient = gradient.double()
    total = gradient.sum(0)

    def by_parameter(columns: Tensor) -> Tensor:
        return torch.segment_reduce(columns, "sum", lengths=widths, axis=0, unsafe=True)

    own, other, product = by_parameter(torch.stack([total * total, written * written, total * written], 1)).unbind(1)
    size = by_parameter(gradient.square().sum(0)).sqrt()
    rounding = NEGLIGIBLE.get(dtype, NEGLIGIBLE[torch.float32]) * own.sum().sqrt()

    def allowed(factor: Tensor) -> Tensor:
        return limit * torch.maximum(other.sqrt(), factor.abs() * size) + rounding * factor.abs()

    # of factors that fit equally many, the one nearest to 1
    fits = torch.where(own > 0, product / own.clamp(min=1e-300), 1.0)
    candidates = torch.cat([torch.ones_like(fits[:1]), fits])
    candidates = candidates[torch.argsort((candidates - 1).abs())][:, None]
    square = other - 2 * candidates * product + candidates.square() * own
    counts = (square.clamp(min=0).sqrt() <= allowed(candidates)).sum(1)
    best = candidates[counts.argmax()]  # the first of the largest
    error = by_parameter((written - best * total).square()).sqrt()
    return error > allowed(best)
