"""Do the tasks' gradients add up to ``param.grad``? The check that catches uses of a weight that no module sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .capture import Probe

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2
NEGLIGIBLE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the whole gradient: rounding of a vanishing one

REASON = (
    "the sum over tasks is not param.grad: the weight is also used where no tracked module sees it (a functional call, "
    "a penalty on the weights, a forward outside of batch()), or gradients were changed one by one (clipping by value)"
)


def gradients_disagree(probes: Sequence[Probe], gradient: Tensor, total: Tensor, half: bool) -> list[Probe]:
    """Probes with Σ_t S_t + S_rest ≠ c · S(param.grad), c one scalar for all (clipping, loss scale, averaging over
    ranks).

    Args:
        probes: those to check.
        gradient: G [T + 1, K].
        total: its column sums [K].
        half: some layer ran in half precision.
    """
    mine, theirs, parts, tolerance = [], [], [], []
    for probe in probes:
        ours = total[probe.columns].double()
        grad = probe.param.grad
        mine.append(ours)
        theirs.append(torch.zeros_like(ours) if grad is None else probe.sketch(grad.detach().double()[None])[0])
        parts.append(gradient[:, probe.columns].double().norm())
        low = half or probe.param.dtype in (torch.bfloat16, torch.float16)
        tolerance.append(HALF_TOLERANCE if low else TOLERANCE[probe.tap.dtype])
    size = torch.stack(parts)
    own = torch.stack([m.norm() for m in mine])
    other = torch.stack([t.norm() for t in theirs])
    limit = torch.tensor(tolerance, dtype=torch.float64, device=own.device)
    negligible = NEGLIGIBLE[probes[0].tap.dtype]

    def allowed(scale: Tensor) -> Tensor:
        bound: Tensor = limit * torch.maximum(other, scale.abs() * size) + negligible * scale.abs() * own.norm()
        return bound

    def agreeing(scale: Tensor) -> Tensor:
        error = torch.stack([(t - scale * m).norm() for m, t in zip(mine, theirs, strict=True)])
        return error <= allowed(scale)

    # the scale on which most parameters agree; of equals the one nearest to 1
    product = torch.stack([(m * t).sum() for m, t in zip(mine, theirs, strict=True)])
    fits = torch.where(own > 0, product / own.square().clamp(min=1e-300), 1.0)
    candidates = torch.cat([torch.ones(1, dtype=torch.float64, device=own.device), fits]).unique()
    candidates = candidates[torch.argsort((candidates - 1).abs())]
    square = other.square() - 2 * candidates[:, None] * product + candidates[:, None].square() * own.square()
    counts = (square.clamp(min=0).sqrt() <= torch.stack([allowed(c) for c in candidates])).sum(1)
    good = agreeing(candidates[int(counts.argmax())])
    return [p for p, ok in zip(probes, good.tolist(), strict=True) if not ok]
