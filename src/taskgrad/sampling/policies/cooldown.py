"""Cooldown: a high temperature first, the natural mix afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..arrays import FloatArray
from .base import FixedPolicy, PolicyState
from .temperature import Temperature
from .updates import horizon, number


class Cooldown(FixedPolicy):
    """p_t proportional to n_t ** (1 / temperature) for the first ``until`` of the run, then to n_t.

    As published in arXiv 2410.04579 (NAACL 2025), section 4: one change, at a fixed step; the paper takes temperature 5
    and half of the run, and finds finer schedules no better. Needs the sampler's ``horizon``. Raises ValueError unless
    ``temperature`` is positive and ``until`` lies between 0 and 1.
    """

    def __init__(self, temperature: float = 5.0, until: float = 0.5) -> None:
        self.hot = Temperature(temperature)
        self.until = number("until", until, 0.0, 1.0, open_low=True)

    def changes(self, state: PolicyState) -> Sequence[int]:
        """The batch at which the temperature falls to 1."""
        return (math.ceil(self.until * horizon(state, "Cooldown")),)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Tempered mix [T] before the change, natural mix after it."""
        return self.hot.weights(None, state) if state.step + 1 < self.changes(state)[0] else state.natural

    def __repr__(self) -> str:
        return f"Cooldown({self.hot.temperature:g}, until={self.until:g})"
