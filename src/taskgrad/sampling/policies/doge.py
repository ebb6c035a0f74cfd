"""DoGE: more of the tasks whose gradients help the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import FloatArray
from .base import Policy, PolicyState
from .updates import ascend, column, number


class DoGE(Policy):
    """W_i = lr sum_{j != i} <g_i, g_j> / mean_i |g_i|, clipped to lr [0, max_score]; p <- p exp(W / mu), normalised,
    then p <- (1 - smoothing) p + smoothing / T. One step per report.

    g_i is a task's mean gradient, scaled down to norm ``max_grad_norm``. From the authors' code (arXiv 2310.15393),
    Olivia-fsm/DoGE, commit 88400e9, ``src/trainer.py``, with the values of ``config/doge.json``. Starts uniform.

    What to know of it: the clip at 0 throws conflict away. A task that is overwritten by all the others scores exactly
    what an orthogonal one does. The reference computes one backward pass per task and step, and weights the gradients
    of its proxy model by p; here the gradients are the report's, and p are the probabilities of sampling. Its result,
    for another run, is the average of p over the steps: ``Replay``.

    Needs the learning rate, which ``sampler.follow`` reads; by hand it is ``sampler.update(report, lr=...)``. Tasks
    that are not in a batch stay where they are.
    """

    def __init__(
        self, mu: float = 0.01, max_score: float = 5.0, smoothing: float = 0.0, max_grad_norm: float = 5.0
    ) -> None:
        self.mu = number("mu", mu, 0.0, open_low=True)
        self.max_score = number("max_score", max_score, 0.0, open_low=True)
        self.smoothing = number("smoothing", smoothing, 0.0, 1.0)
        self.max_grad_norm = number("max_grad_norm", max_grad_norm, 0.0, open_low=True)

    def initial(self, state: PolicyState) -> FloatArray:
        """Uniform [T]."""
        count = len(state.tasks)
        return np.full(count, 1.0 / count)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Probabilities after this report's step [T]."""
        if state.lr is None:
            raise ValueError(
                "DoGE needs the learning rate: call sampler.follow(tracker), or sampler.update(report, lr=...)"
            )
        kept = np.array(state.memory.get("weights", self.initial(state)))
        norm, gram = column(report, "norm"), column(report, "gram")
        seen = np.isfinite(norm) & (norm > 0) & (np.diagonal(gram) > 0)
        if seen.any():
            kept = ascend(kept, state.lr * self._scores(norm, gram, seen) / self.mu, seen)
            kept = (1.0 - self.smoothing) * kept + self.smoothing / len(kept)
            state.memory["weights"] = kept.tolist()
        return kept

    def _scores(self, norm: FloatArray, gram: FloatArray, seen: Any) -> FloatArray:
        """W / lr [T], 0 for tasks not seen."""
        clipped = np.minimum(np.where(seen, norm, 0.0), self.max_grad_norm)
        # The Gram is that of the gradients' parts in the batch, which have the direction of the mean gradients.
        length = np.sqrt(np.where(seen, np.diagonal(gram), 1.0))
        scale = clipped / length
        inner = np.where(seen[:, None] & seen[None, :], gram, 0.0) * scale[:, None] * scale[None, :]
        alignment = inner.sum(1) - np.diagonal(inner)
        return np.asarray(np.clip(alignment / (clipped[seen].mean() + 1e-6), 0.0, self.max_score), dtype=np.float64)

    def __repr__(self) -> str:
        return (
            f"DoGE(mu={self.mu:g}, max_score={self.max_score:g}, smoothing={self.smoothing:g}, "
            f"max_grad_norm={self.max_grad_norm:g})"
        )
