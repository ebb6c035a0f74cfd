"""PiKE: more of the tasks with large gradients, less of those with noisy ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import FloatArray
from ..inputs import count_of
from .base import Policy, PolicyState
from .updates import ascend, column, counted, number


class PiKE(Policy):
    """p_t <- p_t exp(zeta1 |grad L_t|^2 - zeta2 sigma_t^2 / (2 b)), normalised, every ``every`` reports.

    As published in arXiv 2502.06244 (NeurIPS 2025), algorithm 1; b is the batch size, sigma_t^2 the variance of a
    single example's gradient. Starts uniform. ``zeta1`` and ``zeta2`` scale with the model's gradients and are tuned
    for each run in the paper, so there are no defaults; the paper's interval could not be looked up.

    Here, over the reports since the last update that hold the task, |grad L_t|^2 is estimated by the mean of s_t, the
    report's ``signal`` (the plain |g_t|^2 of n_t examples exceeds it by sigma_t^2 / n_t, for a rare task most of it),
    and sigma_t^2 by the mean of n_t (|g_t|^2 - s_t). Neither is cut at 0, which would bias it. A task without
    observation since the last update stays where it is.
    """

    def __init__(self, zeta1: float, zeta2: float, every: int = 100) -> None:
        self.zeta1 = number("zeta1", zeta1, 0.0)
        self.zeta2 = number("zeta2", zeta2, 0.0)
        self.every = count_of("every", every, 1)

    def initial(self, state: PolicyState) -> FloatArray:
        """Uniform [T]."""
        count = len(state.tasks)
        return np.full(count, 1.0 / count)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Probabilities after the last update [T]."""
        memory, count = state.memory, len(state.tasks)
        kept = np.array(memory.get("weights", self.initial(state)))
        sums = np.array(memory.get("sums", [[0.0] * count] * 3))
        signal, norm, examples = column(report, "signal"), column(report, "norm"), counted(report)
        seen = np.isfinite(signal) & np.isfinite(norm) & (examples > 0)
        square = np.where(seen, signal, 0.0)
        noise = np.where(seen, examples * (np.square(norm, where=seen, out=np.zeros(count)) - square), 0.0)
        sums += np.stack([seen, square, noise])
        reports = memory.get("reports", 0) + 1
        if reports >= self.every:
            kept = ascend(kept, self._gain(sums, state.batch_size), sums[0] > 0)
            reports, sums = 0, np.zeros_like(sums)
        memory.update(weights=kept.tolist(), sums=sums.tolist(), reports=reports)
        return kept

    def _gain(self, sums: FloatArray, batch_size: int) -> FloatArray:
        square, noise = sums[1:] / np.maximum(sums[0], 1.0)
        return np.asarray(self.zeta1 * square - self.zeta2 * noise / (2.0 * batch_size), dtype=np.float64)

    def __repr__(self) -> str:
        return f"PiKE({self.zeta1:g}, {self.zeta2:g}, every={self.every})"
