"""Temperature sampling, the usual static remedy for imbalance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import FloatArray
from .base import FixedPolicy, PolicyState


class Temperature(FixedPolicy):
    """p_t proportional to n_t ** (1 / temperature): 1 is the natural mix, infinity is uniform.

    Raises ValueError unless ``temperature`` is positive (infinity is allowed).
    """

    def __init__(self, temperature: float) -> None:
        temperature = float(temperature)
        if math.isnan(temperature) or temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}; 1 is the natural mix, 5 is common")
        self.temperature = temperature

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Tempered natural mix [T], whatever the report."""
        logs = np.log(state.natural) / self.temperature
        powers = np.exp(logs - logs.max())
        return np.asarray(powers / powers.sum(), dtype=np.float64)

    def __repr__(self) -> str:
        return f"Temperature({self.temperature:g})"
