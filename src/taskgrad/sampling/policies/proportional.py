"""The natural mix."""

from __future__ import annotations

from typing import Any

from ..arrays import FloatArray
from .base import FixedPolicy, PolicyState


class Proportional(FixedPolicy):
    """p_t = n_t / sum(n): every example of the data set equally often."""

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """The natural mix [T], whatever the report."""
        return state.natural

    def __repr__(self) -> str:
        return "Proportional()"
