"""Share the budget among the rare tasks that still learn; take it back where it is not needed or buys nothing.

Every task rarer than an equal share (n_t / sum(n) < 1 / T) begins with an equal part of the budget. What moves the
parts from then on, all of it kept per task over its appearances:

- **Need**, from the gradient's size: the energy n_t ||g_t||^2 (the mean squared gradient of an example, whatever the
  number n_t of them in a batch) over the highest it had. A mastered task's falls to a few hundredths, and its part is
  released at once; if it is forgotten, its gradients grow and it is raised again.
- **Learning**, from the gradient's direction: the signal <m_t, g_t> is positive by more than two standard errors.
  What such a task wants is multiplied by ``LIFT``.
- **Trials**, from the losses, which can only withhold: the need is at most loss / highest loss, and a task that is not
  learning by its gradients must show confirmed progress, blocks of appearances whose mean loss is significantly below
  the lowest one so far (relearning what was lost is no gain). As the last progress recedes, the task wants less; after
  ever longer phases without any it falls to a floor, and after a rest of half its history it is probed again.

The budget is split in proportion to what tasks want, at most ``CAP`` equal parts times its need for each. What that
leaves over stays with the natural mix: the budget in force shrinks. So gradients alone raise a task above the others;
losses withhold, and give back. Without losses in the reports only what mastered tasks release is withheld.
docs/policy-log.md has the evidence for the rules and the constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from taskgrad.sampling.arrays import FloatArray
from taskgrad.sampling.policies import Policy, PolicyState
from taskgrad.sampling.policies.updates import column, counted

WINDOW = 200
"""Appearances that energy, signal and loss are averaged over: four times the tracker's memory."""
SIGNIFICANT = 2.0
"""Standard errors that a signal, or a trial's progress, must exceed."""
RESTORED = 3.0
"""Standard errors that progress must exceed after a stall: over a run a task with nothing to learn passes two by
chance."""
SHARPNESS = 2.0
"""Power of the need: half as much left to learn wants a quarter."""
LIFT = 2.0
"""Weight of a task that learns by its gradients, against one of the same need that does not."""
CAP = 8.0
"""Highest part, in equal ones: with few claimants the rest of the budget is not worth its price."""
FLOOR = 0.2
"""Lowest part, of an equal one: a wrong verdict costs four fifths, and the task stays observable."""
TRIAL = 96
"""Appearances in a trial: with fewer, the loss's own spread hides the progress of a slow task."""
PATIENCE = 3
"""Trials without progress that cost nothing, at any time: a slow learner may need as many to show any."""
GROWTH = 2.0
"""A phase without progress ends when the task was seen this many times as often as at its beginning; the next begins
after half of that again. So phases grow with the run, as a plateau's length is unknown."""
DOUBT = 3.0
"""Power with which trust in a stalled task falls as its last progress recedes."""
_TINY = 1e-12


class OverwriteBoost(Policy):
    """The default policy; see the module's docstring. It needs ``examples``, ``norm`` and ``signal`` in the report, and
    ``loss`` where parts are to be withheld: call ``batch.losses(per_example)`` while training.

    Tasks in ``state.critical`` never fall below an equal part because of trials. Parts scale with
    ``state.importance``.
    """

    guard_defaults: ClassVar[Mapping[str, float]] = {"budget": 0.05, "probe_every": 200}

    def initial(self, state: PolicyState) -> FloatArray:
        """A part for each rare task [T], equal but for their importance; all to the natural mix if no task is rare."""
        return _equal_parts(state)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Parts of the budget [T]; they sum to less than 1 where released parts find no taker."""
        equal = _equal_parts(state)
        examples, norm, signal = counted(report), column(report, "norm"), column(report, "signal")
        losses = None if report.loss is None else column(report, "loss")
        want, high = np.zeros(len(equal)), np.zeros(len(equal))
        for t, task in enumerate(state.tasks):
            if equal[t] == 0:
                continue
            kept = state.memory.setdefault(task, _fresh())
            if examples[t] > 0 and np.isfinite(norm[t]):
                _enter_gradient(kept, float(examples[t]) * float(norm[t]) ** 2, float(signal[t]))
                if losses is not None and np.isfinite(losses[t]):
                    _enter_loss(kept, float(losses[t]))
            need, learns = _need(kept), _learns(kept)
            if learns or kept["on"]:
                want[t] = need**SHARPNESS * (LIFT if learns else _trust(kept))
                high[t] = CAP * need
        floor = equal * np.where(state.critical, 1.0, FLOOR)
        return floor + _fill(want * equal, high * equal, float((equal - floor).sum()))

    def __repr__(self) -> str:
        return "OverwriteBoost()"


def _equal_parts(state: PolicyState) -> FloatArray:
    """Importance of the rare tasks, divided by its sum [T]; zeros if there is none."""
    wanted = np.where(state.natural < 1.0 / len(state.tasks), state.importance, 0.0)
    out: FloatArray = wanted / max(float(wanted.sum()), _TINY)
    return out


def _fill(want: FloatArray, high: FloatArray, total: float) -> FloatArray:
    """min(c x want, high) [T] with the factor c for which it sums to ``total``; ``high`` where that is not enough."""
    out = np.where(want > 0, high, 0.0)
    free = want > 0
    while free.any() and out.sum() > total + _TINY:
        rest = total - float(out[~free].sum())
        shared = want * (rest / float(want[free].sum()))
        over = free & (shared >= high)
        if not over.any():
            return np.where(free, shared, out)
        free &= ~over
    return out


def _fresh() -> dict[str, Any]:
    """What the policy knows of a task: the averages, the trial under way, the best trial, and the phase it is in."""
    return {
        "weight": 0.0,
        "energy": 0.0,
        "energy_peak": 0.0,
        "signal": 0.0,
        "signal_squares": 0.0,
        "loss_weight": 0.0,
        "loss": 0.0,
        "loss_peak": 0.0,
        "seen": 0,
        "count": 0,
        "sum": 0.0,
        "squares": 0.0,
        "warm": False,
        "best": None,
        "best_variance": 0.0,
        "progress": 0,
        "began": 0,
        "on": True,
        "rests_until": 0.0,
    }


def _enter_gradient(kept: dict[str, Any], energy: float, signal: float) -> None:
    """Enter an appearance's energy and signal into their exponential averages."""
    kept["weight"] = (1.0 - 1.0 / WINDOW) * kept["weight"] + 1.0
    kept["energy"] += (energy - kept["energy"]) / kept["weight"]
    if kept["weight"] > WINDOW / 2:
        kept["energy_peak"] = max(kept["energy_peak"], kept["energy"])
    if np.isfinite(signal):
        kept["signal"] += (signal - kept["signal"]) / kept["weight"]
        kept["signal_squares"] += (signal * signal - kept["signal_squares"]) / kept["weight"]


def _enter_loss(kept: dict[str, Any], loss: float) -> None:
    """Enter an appearance's loss into its average and the trial under way, and let the phase end where it is over."""
    kept["loss_weight"] = (1.0 - 1.0 / WINDOW) * kept["loss_weight"] + 1.0
    kept["loss"] += (loss - kept["loss"]) / kept["loss_weight"]
    kept["loss_peak"] = max(kept["loss_peak"], kept["loss"])
    kept["seen"] += 1
    kept["count"] += 1
    kept["sum"] += loss
    kept["squares"] += loss * loss
    if kept["count"] == TRIAL:
        _judge(kept)
    if kept["on"] and kept["seen"] >= max(GROWTH * kept["began"], kept["began"] + PATIENCE * TRIAL):
        kept.update(on=False, rests_until=1.5 * kept["seen"])
    elif not kept["on"] and kept["seen"] >= kept["rests_until"]:
        kept.update(on=True, began=kept["seen"])


def _judge(kept: dict[str, Any]) -> None:
    """Whether the trial that is complete made progress on the best one."""
    mean = kept["sum"] / TRIAL
    variance = max(0.0, kept["squares"] / TRIAL - mean * mean) / TRIAL
    kept.update(count=0, sum=0.0, squares=0.0)
    needed = SIGNIFICANT if _trust(kept) == 1.0 else RESTORED
    if not kept["warm"]:
        # The first trial holds the fall from a fresh model's loss: no later one could be compared with it.
        kept["warm"] = True
    elif kept["best"] is None or kept["best"] - mean > needed * (variance + kept["best_variance"]) ** 0.5:
        seen = kept["seen"]
        kept.update(best=mean, best_variance=variance, progress=seen, began=seen, on=True)


def _need(kept: dict[str, Any]) -> float:
    """What is left to learn, in [0, 1]: by the gradients, and by the losses where they say less."""
    by_gradient = kept["energy"] / kept["energy_peak"] if kept["energy_peak"] > 0 else 1.0
    by_loss = kept["loss"] / kept["loss_peak"] if kept["loss_peak"] > 0 else 1.0
    return float(min(1.0, by_gradient, by_loss))


def _learns(kept: dict[str, Any]) -> bool:
    """Whether the average signal is significantly positive, once half of the window is filled."""
    if kept["weight"] <= WINDOW / 2:
        return False
    variance = max(0.0, kept["signal_squares"] - kept["signal"] ** 2)
    return bool(kept["signal"] > SIGNIFICANT * (variance / kept["weight"]) ** 0.5)


def _trust(kept: dict[str, Any]) -> float:
    """How far a task that does not learn by its gradients is trusted, in [0, 1], by its last confirmed progress."""
    allowed = max(GROWTH * kept["progress"], kept["progress"] + PATIENCE * TRIAL)
    return float(min(1.0, allowed / max(1, kept["seen"])) ** DOUBT)
