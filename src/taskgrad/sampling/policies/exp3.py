"""Exp3: tasks as the arms of a bandit whose reward is the training loss (Online Data Mixing)."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from ..arrays import FloatArray
from .base import Policy, PolicyState
from .updates import losses, number

_LARGEST_LOSS = 600.0  # its exponential, summed over tasks, is still a float


class Exp3(Policy):
    """Online Data Mixing (arXiv 2312.02406): the higher a task's loss, the more of it.

    With T tasks, the t-th report and eps_t = min(1 / T, sqrt(ln T / (T t))):

    - ``variant="paper"``: R_i <- a R_i + (1 - a) loss_i / p_i for the tasks in the batch, p_i the probability it was
      drawn with, a = ``smoothing``; then p = (1 - T eps_t) softmax(eps_{t-1} R) + eps_t. Could not be
      checked against the paper's text: this is its rule as OpenDCAI/DataFlex restates it (commit 3c13e37), without the
      scale of rewards and the lower bound on eps that it adds.
    - ``variant="released"``: R_i <- a R_i + (1 - a) exp(loss_i), without importance weight; then p = (1 - T eps_t) R /
      sum(R) + eps_t. From the authors' code, alon-albalak/online-data-mixing, commit edbfdad,
      ``SmoothedMeanWeightUpdater``.

    The authors' warm-up on fixed weights is left out. Starts uniform, as eps_1 = 1 / T says; with few tasks eps_t keeps
    it nearly so for long (at t = 100, T = 3: 18 % of the batch). Needs ``loss`` in the reports.
    """

    def __init__(self, variant: Literal["paper", "released"] = "paper", smoothing: float = 0.9) -> None:
        if variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {variant!r}")
        self.variant = variant
        self.smoothing = number("smoothing", smoothing, 0.0, 1.0)

    def initial(self, state: PolicyState) -> FloatArray:
        """Uniform [T]."""
        count = len(state.tasks)
        return np.full(count, 1.0 / count)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """The next distribution over the arms [T]."""
        loss = losses(report, "Exp3")
        memory, count = state.memory, len(state.tasks)
        reward = np.array(memory.get("reward", [0.0] * count))
        # A task drawn by a probe although its probability is 0 has no importance weight, so no estimate either.
        seen = np.isfinite(loss) & (state.weights > 0) if self.variant == "paper" else np.isfinite(loss)
        if self.variant == "paper":
            fresh = np.divide(loss, state.weights, out=np.zeros(count), where=seen)
        else:
            fresh = np.exp(np.minimum(loss, _LARGEST_LOSS, out=np.zeros(count), where=seen))
        reward = np.where(seen, self.smoothing * reward + (1.0 - self.smoothing) * fresh, reward)
        turn = memory.get("turn", 0) + 1
        memory["reward"], memory["turn"] = reward.tolist(), turn
        return self._distribution(reward, turn)

    def _distribution(self, reward: FloatArray, turn: int) -> FloatArray:
        count = len(reward)
        floor = _exploration(count, turn)
        if self.variant == "paper":
            logits = _exploration(count, turn - 1) * reward
            arms = np.exp(logits - logits.max())
        else:
            arms = reward if reward.sum() > 0 else np.ones(count)
        out = (1.0 - count * floor) * arms / arms.sum() + floor
        return np.asarray(out / out.sum(), dtype=np.float64)

    def __repr__(self) -> str:
        return f"Exp3({self.variant!r}, smoothing={self.smoothing:g})"


def _exploration(count: int, turn: int) -> float:
    """eps_t, and 1 / T before the first report."""
    return 1.0 / count if turn == 0 else min(1.0 / count, math.sqrt(math.log(count) / (count * turn)))
