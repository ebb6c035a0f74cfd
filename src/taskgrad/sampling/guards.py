"""The safety chain between what a policy asks for and what enters the ledger.

Every link may undo what an earlier one wanted, so the later ones are the stronger ones:

    policy -> pinned tasks and budget mix -> max_change -> budget -> min_weight, max_weight

The index engine adds the two that need the stream itself, probe_every and, strongest, max_epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .arrays import BoolArray, FloatArray, ReadOnlyArrays

_TINY = 1e-12


@dataclass(frozen=True)
class Guards(ReadOnlyArrays):
    """The guards of a sampler over T tasks; the defaults let every mix pass.

    ``budget``: the largest share of a batch that may be diverted from the natural mix, in (0, 1]; ``min_weight`` and
    ``max_weight``: float64 [T]; ``max_change``: largest factor, above 1, between a weight and its predecessor;
    ``pinned``: bool [T], tasks that no policy can raise. Raises ValueError where these cannot be met.
    """

    natural: FloatArray
    budget: float | None
    min_weight: FloatArray
    max_weight: FloatArray
    max_change: float | None
    pinned: BoolArray

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget must be a share in (0, 1], got {self.budget}")
        if self.max_change is not None and not self.max_change > 1:
            raise ValueError(f"max_change is a factor between successive weights, above 1, got {self.max_change}")
        for name, bounds in (("min_weight", self.min_weight), ("max_weight", self.max_weight)):
            if not ((bounds >= 0) & (bounds <= 1)).all():
                raise ValueError(f"{name} must hold probabilities in [0, 1], got {bounds.tolist()}")
        if self.min_weight.sum() > 1 + _TINY:
            raise ValueError(
                f"min_weight sums to {self.min_weight.sum():.4g} over {len(self.min_weight)} tasks, above 1: lower it"
            )
        if self.max_weight.sum() < 1 - _TINY:
            raise ValueError(
                f"max_weight sums to {self.max_weight.sum():.4g} over {len(self.max_weight)} tasks, below 1: raise it"
            )
        if (self.min_weight > self.max_weight).any():
            raise ValueError("min_weight is above max_weight for some task")
        self._check_budget()
        if self.pinned.all():
            raise ValueError("all tasks are pinned: nothing is left for the policy; use policies.Proportional instead")

    def _check_budget(self) -> None:
        """Floors above, and ceilings below, the natural shares divert from the natural mix by themselves."""
        floors = float(np.maximum(self.min_weight - self.natural, 0.0).sum())
        ceilings = float(np.maximum(self.natural - self.max_weight, 0.0).sum())
        for name, needed, remedy in (("min_weight", floors, "lower"), ("max_weight", ceilings, "raise")):
            if self.budget is not None and needed > self.budget + 1e-9:
                raise ValueError(
                    f"{name} diverts {needed:.4g} of every batch from the natural mix, more than "
                    f"budget={self.budget:g} allows: {remedy} {name}, or pass budget={_rounded_up(needed):g} or more"
                )

    def apply(self, wanted: FloatArray, previous: FloatArray | None) -> tuple[FloatArray, tuple[str, ...]]:
        """Weights [T] summing to 1, and the names of the guards that changed something.

        ``wanted``: what the policy asked for, checked by ``check_weights``; ``previous``: the weights before this
        change, or None for the first.
        """
        bound: list[str] = []
        weights = self._mix(wanted, bound)
        if self.max_change is not None and previous is not None:
            # A task below its natural share may return to it at once; a weight of 0 could never rise otherwise.
            high = self.max_change * np.maximum(previous, self.natural / self.max_change)
            weights = self._clip(weights, previous / self.max_change, high, "max_change", bound)
        if self.budget is not None:
            diverted = 0.5 * float(np.abs(weights - self.natural).sum())
            if diverted > self.budget + _TINY:
                weights = self.natural + (weights - self.natural) * (self.budget / diverted)
                bound.append("budget")
        if self.min_weight.any():
            weights = self._clip(weights, self.min_weight, np.ones_like(weights), "min_weight", bound)
        if (self.max_weight < 1).any():
            weights = self._clip(weights, self.min_weight, self.max_weight, "max_weight", bound)
        weights = np.maximum(weights, 0.0)
        return weights / weights.sum(), tuple(dict.fromkeys(bound))

    def _mix(self, wanted: FloatArray, bound: list[str]) -> FloatArray:
        total = min(float(wanted.sum()), 1.0)
        if self.pinned.any():
            free = np.where(self.pinned, 0.0, wanted)
            if (wanted[self.pinned] > 0).any():
                bound.append("pinned")
            if free.sum() > 0:
                wanted = free * (total / free.sum())
            else:
                wanted, total = free, 0.0
        if self.budget is not None:
            mix = wanted + (1.0 - total) * self.natural
            if 0.5 * float(np.abs(mix - self.natural).sum()) > self.budget + _TINY:
                bound.append("budget")
            return (1.0 - self.budget * total) * self.natural + self.budget * wanted
        if not self.pinned.any():
            return wanted + (1.0 - total) * self.natural
        kept = np.where(self.pinned, self.natural, 0.0)
        others = self.natural - kept
        open_share = float(others.sum())
        return kept + open_share * wanted + (1.0 - total) * others

    def _clip(self, weights: FloatArray, low: FloatArray, high: FloatArray, name: str, bound: list[str]) -> FloatArray:
        held_low = np.where(self.pinned, np.clip(weights, low, high), low)
        held_high = np.where(self.pinned, held_low, high)
        if held_low.sum() > 1 or held_high.sum() < 1:  # the unpinned tasks cannot make room
            held_low, held_high = low, high
        out = fit(weights, held_low, held_high)
        if np.abs(out - weights).max() > 1e-9:
            bound.append(name)
        return out


def _rounded_up(share: float) -> float:
    """The next multiple of 0.001, at most 1."""
    return min(math.ceil(share * 1000 - 1e-6) / 1000, 1.0)


def fit(weights: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """clip(c x weights, low, high) [T] with the factor c for which it sums to 1 (water-filling).

    Needs sum(low) <= 1 <= sum(high). The sum grows with c and is linear between the points where a task meets a
    bound, so the right stretch is found by bisection over those points.
    """
    if ((weights >= low) & (weights <= high)).all() and abs(weights.sum() - 1) < 1e-12:
        return weights
    base = np.maximum(weights, _TINY)
    knots = np.unique(np.concatenate([low / base, high / base]))
    left, right = 0, len(knots) - 1
    while right - left > 1:
        middle = (left + right) // 2
        if np.clip(knots[middle] * base, low, high).sum() <= 1:
            left = middle
        else:
            right = middle
    below = np.clip(knots[left] * base, low, high)
    above = np.clip(knots[right] * base, low, high)
    span = above.sum() - below.sum()
    part = 0.0 if span <= 0 else (1.0 - below.sum()) / span
    out: FloatArray = below + min(max(part, 0.0), 1.0) * (above - below)
    return out
