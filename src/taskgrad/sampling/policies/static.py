"""Probabilities that the user chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import FloatArray, to_numpy
from .base import FixedPolicy, PolicyState


class Static(FixedPolicy):
    """Fixed probabilities, one per task: a mapping from task name, or a sequence in the order of the tasks.

    A mapping may leave tasks out: they get 0. Raises ValueError for negative, non-finite or empty weights and for a
    sum other than 1; names and length are checked against the sampler's tasks when the sampler is built.
    """

    def __init__(self, weights: Mapping[str, float] | Sequence[float]) -> None:
        self.names: tuple[str, ...] | None = tuple(weights) if isinstance(weights, Mapping) else None
        raw = list(weights.values()) if isinstance(weights, Mapping) else weights
        values = np.array(to_numpy(raw), dtype=np.float64)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"weights must hold one probability per task, got shape {values.shape}")
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"weights must be finite and not negative, got {values.tolist()}")
        if abs(values.sum() - 1) > 1e-6:
            raise ValueError(f"weights must sum to 1, got {values.sum():.6g}: divide them by their sum")
        self.values = values

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """The fixed probabilities [T], whatever the report."""
        if self.names is None:
            if len(self.values) != len(state.tasks):
                raise ValueError(f"Static has {len(self.values)} weights, the sampler has {len(state.tasks)} tasks")
            return self.values
        unknown = sorted(set(self.names) - set(state.tasks))
        if unknown:
            raise ValueError(f"Static has weights for unknown tasks {unknown}; the tasks are {list(state.tasks)}")
        out = np.zeros(len(state.tasks))
        out[[state.tasks.index(name) for name in self.names]] = self.values
        return out

    def __repr__(self) -> str:
        values = self.values.tolist()
        return f"Static({values if self.names is None else dict(zip(self.names, values, strict=True))})"
