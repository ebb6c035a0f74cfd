"""Policies to compare with, beside those that taskgrad ships."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from taskgrad.sampling.policies import Policy, PolicyState, Proportional, Static

Floats = npt.NDArray[np.float64]

DECAY = 0.98
"""Of the average of a task's loss, per appearance."""


def rare_tasks(state: PolicyState) -> npt.NDArray[np.bool_]:
    """Tasks below an equal share of the natural mix, bool [T]: those that ``OverwriteBoost`` raises too."""
    return np.asarray(state.natural < 1.0 / len(state.tasks))


class LossDriven(Policy):
    """The budget in proportion to an average of the tasks' losses, over the rare tasks."""

    def initial(self, state: PolicyState) -> Floats:
        """Equal parts [T]."""
        rare = rare_tasks(state)
        return np.asarray(rare / rare.sum())

    def weights(self, report: Any, state: PolicyState) -> Floats:
        """Parts [T]; equal until every rare task was seen."""
        losses = report.loss.tolist()
        for task, loss in zip(state.tasks, losses, strict=True):
            if np.isfinite(loss):
                kept = state.memory.get(task, loss)
                state.memory[task] = DECAY * kept + (1.0 - DECAY) * loss
        rare = rare_tasks(state)
        if any(task not in state.memory for task in np.array(state.tasks)[rare]):
            return self.initial(state)
        parts = np.where(rare, [state.memory.get(task, 0.0) for task in state.tasks], 0.0)
        return np.asarray(parts / parts.sum())


def equal(natural: Floats) -> Policy:
    """The whole budget in equal parts for the rare tasks."""
    rare = natural < 1.0 / len(natural)
    return Static((rare / rare.sum()).tolist())


def replay(mean: Floats, natural: Floats, budget: float) -> Policy:
    """A static policy that gives, within the budget, the ``mean`` weights [T] of another run."""
    if np.abs(mean - natural).max() < 1e-9:
        return Proportional()
    asked = natural + (mean - natural) / budget
    asked = np.maximum(asked, 0.0)
    return Static((asked / asked.sum()).tolist())
