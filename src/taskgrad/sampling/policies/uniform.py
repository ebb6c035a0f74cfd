"""Every task equally often."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import FloatArray
from .base import FixedPolicy, PolicyState


class Uniform(FixedPolicy):
    """p_t = 1 / T."""

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Equal probabilities [T], whatever the report."""
        count = len(state.tasks)
        return np.full(count, 1.0 / count)

    def __repr__(self) -> str:
        return "Uniform()"
