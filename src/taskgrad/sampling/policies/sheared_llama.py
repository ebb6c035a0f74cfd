"""Dynamic batch loading: more of the tasks that are farthest above a reference loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ..arrays import FloatArray
from ..inputs import known, per_task
from .base import Policy, PolicyState
from .updates import ascend

SMOOTHING = 1e-4
"""Share of the uniform mix that the released code adds after each step."""


class ShearedLlama(Policy):
    """p <- p exp(D), normalised, with D_t = evaluation loss - reference loss, after each evaluation.

    - ``variant="paper"``: D_t = max(0, evaluation loss - reference loss), as published in arXiv 2310.06694 (Sheared
      LLaMA), algorithm 1.
    - ``variant="released"``: D_t may be negative, and p <- (1 - c) p + c / T with c = 1e-4 follows. From the authors'
      code, princeton-nlp/LLM-Shearing, commit b87218b, ``DynamicLoadingCallback``.

    Starts from the natural mix. Give evaluation losses by ``sampler.observe``; a step is taken on the next report.
    Tasks missing from an evaluation stay where they are.

    ``reference``: the loss to reach, by task name, one for every task, finite; names are checked when the sampler is
    built.
    """

    def __init__(self, reference: Mapping[str, float], variant: Literal["paper", "released"] = "paper") -> None:
        if not isinstance(reference, Mapping):
            raise TypeError(f"reference must map task names to losses, got {reference!r}")
        if variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {variant!r}")
        self.reference = {str(task): float(loss) for task, loss in reference.items()}
        bad = {task: loss for task, loss in self.reference.items() if not np.isfinite(loss)}
        if bad:
            raise ValueError(f"reference losses must be finite, got {bad}")
        self.variant = variant

    def initial(self, state: PolicyState) -> FloatArray:
        """The natural mix; the reference is checked against the tasks."""
        known("ShearedLlama.reference", self.reference, state.tasks)
        missing = [task for task in state.tasks if task not in self.reference]
        if missing:
            raise ValueError(f"ShearedLlama has no reference loss for the tasks {missing}: give one for every task")
        return state.natural

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """The proportions after the last evaluation [T]; before any evaluation the natural mix."""
        kept = np.array(state.memory.get("weights", state.natural))
        if state.eval_losses is None or state.memory.get("evaluations") == state.evaluations:
            return kept
        excess = per_task("eval_losses", state.eval_losses, state.tasks, 0.0)
        excess -= [self.reference[task] for task in state.tasks]
        seen = np.array([task in state.eval_losses for task in state.tasks])
        if self.variant == "paper":
            excess = np.maximum(excess, 0.0)
        kept = ascend(kept, excess, seen)
        if self.variant == "released":
            kept = (1.0 - SMOOTHING) * kept + SMOOTHING / len(kept)
        state.memory["weights"], state.memory["evaluations"] = kept.tolist(), state.evaluations
        return kept

    def __repr__(self) -> str:
        return f"ShearedLlama({self.reference}, {self.variant!r})"
