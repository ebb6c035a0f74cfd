"""Share the budget among rare tasks, and take it back where it buys nothing that is kept.

Every task rarer than an equal share (n_t / sum(n) < 1 / T) starts with an equal part of the budget. From then on, as in
TCP's control loop,

- a part is spent in *trials*: blocks of the task's appearances. A trial pays where the block's mean loss is
  significantly below the lowest confirmed one so far, so that relearning what was lost does not count as gain. Where
  trials stop paying (nothing to learn, nothing kept, or all learned), the part is halved, down to a floor; it is probed
  again later, after waits that double with every failure.
- what is released goes to tasks whose gradients ask for it: those that are not backed off and along whose remembered
  gradient the training steps make progress, -<m_t, theta_{k+1} - theta_k> > 0 by more than two standard errors. If no
  task asks, it stays with the natural mix: the budget in force shrinks.

So gradients alone cause raises beyond the equal part, and losses only ever withhold or give back. Without losses in the
reports nothing is withheld.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..arrays import FloatArray, to_numpy
from .base import Policy, PolicyState

TRIAL = 96
"""Appearances of a task in a trial: with fewer, the loss's own spread hides the progress of a slow task."""
PATIENCE = 3
"""Trials in a row without progress before the part is cut: a slow learner may need as many to show any."""
RESTORED = 3.0
"""Standard errors that give a part back: over a run a task with nothing to learn passes two by chance."""
SIGNIFICANT = 2.0
"""Standard errors that progress must exceed."""
FLOOR = 0.2
"""Lowest part, of an equal one: a wrong verdict costs four fifths, and the loss stays observable."""
WAIT = 8
"""Further trials at the floor before the first probe; doubles with each probe that fails."""
WINDOW = 200
"""Steps that the progress along remembered gradients is averaged over, as the tracker's overwrite ratio."""


class OverwriteBoost(Policy):
    """The default policy; see the module's docstring. Rates of progress need ``predicted_effect`` in the report, and
    ``loss`` where parts are to be withheld: call ``batch.losses(per_example)`` while training.
    """

    guard_defaults: ClassVar[Mapping[str, float]] = {"budget": 0.05, "probe_every": 200}

    def initial(self, state: PolicyState) -> FloatArray:
        """An equal part for each rare task [T]; all to the natural mix if no task is rare."""
        rare = _rare(state)
        out: FloatArray = rare / max(1, int(rare.sum()))
        return out

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Parts of the budget [T]; they sum to less than 1 where released parts find no taker."""
        rare = _rare(state)
        if not rare.any():
            return np.zeros(len(state.tasks))
        examples = to_numpy(report.examples)
        losses = None if report.loss is None else to_numpy(report.loss)
        progress = -np.asarray(to_numpy(report.predicted_effect), dtype=np.float64)
        parts, asks = np.zeros(len(rare)), np.zeros(len(rare), dtype=bool)
        for t, task in enumerate(state.tasks):
            if not rare[t]:
                continue
            kept = state.memory.setdefault(task, _fresh())
            if np.isfinite(progress[t]):
                _average(kept, float(progress[t]))
            if losses is not None and examples[t] > 0 and np.isfinite(losses[t]):
                _observe(kept, float(losses[t]))
            parts[t] = kept["part"]
            asks[t] = kept["part"] == 1.0 and _is_positive(kept)
        released = float((rare - parts).sum())
        if asks.any():
            parts[asks] += released / asks.sum()
        out: FloatArray = parts / rare.sum()
        return out

    def __repr__(self) -> str:
        return "OverwriteBoost()"


def _rare(state: PolicyState) -> Any:
    return state.natural < 1.0 / len(state.tasks)


def _fresh() -> dict[str, Any]:
    """What the policy knows of a task: its part, the trial under way, the best trial, and the average progress."""
    return {
        "part": 1.0,
        "count": 0,
        "sum": 0.0,
        "squares": 0.0,
        "warm": False,
        "best": None,
        "best_variance": 0.0,
        "misses": 0,
        "wait": WAIT,
        "weight": 0.0,
        "progress": 0.0,
        "progress_squares": 0.0,
    }


def _observe(kept: dict[str, Any], loss: float) -> None:
    """Enter a loss into the trial under way, and judge the trial if it is complete."""
    kept["count"] += 1
    kept["sum"] += loss
    kept["squares"] += loss * loss
    if kept["count"] < TRIAL:
        return
    mean = kept["sum"] / TRIAL
    needed = SIGNIFICANT if kept["part"] == 1.0 else RESTORED
    variance = max(0.0, kept["squares"] / TRIAL - mean * mean) / TRIAL
    kept["count"], kept["sum"], kept["squares"] = 0, 0.0, 0.0
    if not kept["warm"]:
        # The first trial holds the fall from a fresh model's loss: no later one could be compared with it.
        kept["warm"] = True
    elif kept["best"] is None or kept["best"] - mean > needed * (variance + kept["best_variance"]) ** 0.5:
        kept.update(best=mean, best_variance=variance, misses=0, part=1.0, wait=WAIT)
    else:
        kept["misses"] += 1
        if kept["misses"] >= PATIENCE + kept["wait"]:
            kept.update(misses=0, part=1.0, wait=2 * kept["wait"])
        elif kept["misses"] >= PATIENCE:
            kept["part"] = max(FLOOR, kept["part"] / 2)


def _average(kept: dict[str, Any], progress: float) -> None:
    """Enter a step into the exponential averages of progress and of its square, and their common weight."""
    decay = 1.0 - 1.0 / WINDOW
    kept["weight"] = decay * kept["weight"] + 1.0
    for name, value in (("progress", progress), ("progress_squares", progress * progress)):
        kept[name] += (value - kept[name]) / kept["weight"]


def _is_positive(kept: dict[str, Any]) -> bool:
    """Whether the average progress exceeds 0 significantly, once half of the window is filled."""
    if kept["weight"] < WINDOW / 2:
        return False
    spread = max(0.0, kept["progress_squares"] - kept["progress"] ** 2)
    return bool(kept["progress"] > SIGNIFICANT * (spread / kept["weight"]) ** 0.5)
