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
    "the sum over tasks is not param.grad: the weight is also used where no tracked module sees it (a functional call, a "
    "penalty on the weights, a forward outside of batch()), or gradients were changed one by one (clipping by value)"
)


def gradients_disagree(probes: Sequence[Probe], gradient: Tensor, total: Tensor, half: bool) -> list[tuple[Probe, str]]:
    """Probes with Σ_t S_t + S_rest ≠ c · S(param.grad), c one scalar for all (clipping, loss scale).

    Args:
        probes: those to check.
        gradient: G [T + 1, K].
        total: its column sums [K].
        half: some layer ran in half precision.
    """
    pairs = []
    for probe in probes:
        grad = probe.param.grad
        mine = total[probe.columns].double()
        if grad is None:
            theirs = torch.zeros_like(mine)
        else:
            theirs = probe.sketch(grad.detach().double()[None])[0]
        parts = gradient[:, probe.columns].double().norm()
        pairs.append((probe, mine, theirs, parts))
    scale = _common_scale([(mine, theirs) for _, mine, theirs, _ in pairs])
    whole = scale * torch.stack([mine.norm() for _, mine, _, _ in pairs]).norm()
    bad = []
    for probe, mine, theirs, parts in pairs:
        dtype = torch.float64 if probe.tap.dtype == torch.float64 else torch.float32
        low = half or probe.param.dtype in (torch.bfloat16, torch.float16)
        tolerance = HALF_TOLERANCE if low else TOLERANCE[dtype]
        allowed = tolerance * torch.maximum(theirs.norm(), scale * parts) + NEGLIGIBLE[dtype] * whole
        if bool((theirs - scale * mine).norm() > allowed):
            bad.append((probe, REASON))
    return bad


def _common_scale(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Median over parameters of the scale that fits best, weighted by the size of the gradient."""
    square = torch.stack([mine.square().sum() for mine, _ in pairs])
    fit = torch.stack([(mine * theirs).sum() for mine, theirs in pairs]) / square
    known = square > 0
    if not bool(known.any()):
        return torch.ones((), dtype=torch.float64, device=square.device)
    order = torch.argsort(fit[known])
    weight = square[known].sqrt()[order].cumsum(0)
    middle = int(torch.searchsorted(weight, weight[-1] / 2))
    return fit[known][order][min(middle, len(order) - 1)]
