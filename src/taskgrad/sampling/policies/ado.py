"""ADO: more of the tasks that scaling laws, fitted on the way, expect to be learned fastest."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import FloatArray
from ..inputs import count_of
from .base import Policy, PolicyState
from .scaling_law import ScalingLaw, fit
from .updates import counted, losses

POINTS = 256
"""Most points of a loss curve that are kept; beyond, neighbours are merged, which doubles the steps of each."""
LEAST_POINTS = 8
ALPHA_MIN = 0.05
FLOOR = 1e-2
_LEAST_LOSS = 1e-12


class ADO(Policy):
    """Adaptive Data Optimization (arXiv 2410.11820). Every ``fit_every`` reports, L_t(n) = eps + beta n ** -alpha is
    fitted to each task's loss over n, the run's examples so far. Then, for each report k:

    - speed_t = max(alpha_t, 0.05) (L_t(n) - eps_t) / n, what the next example is expected to gain;
    - h_t <- 0.9 h_t + 0.1 x share of the task in the batch;
    - r_t proportional to natural_t speed_t h_t ** 0.5, raised to 0.01 at least and normalised;
    - p = 0.9 a + 0.1 r; a <- (1 - 1 / (k + 1)) a + r / (k + 1).

    Natural mix before the first fit. From the authors' code, yidingjiang/ado, commit bc3d8d0, ``src/data_selectors/
    ado.py``, as are the Huber loss of log L and alpha <= 0.8 in the fit. Different from it: the curve is smoothed by
    means over equal blocks of steps (the reference: Savitzky-Golay, then every tenth step), of which at most 256 are
    kept, so that the memory stays bounded; the fit's optimum is found by regression over a grid of alpha (the
    reference: L-BFGS from 512 starts); and the bounds eps >= e^0.5 and beta <= e^6.5, made for language models' losses,
    are left out. By its 1 / (k + 1) the policy hardly moves late in a run.

    ``start``: reports before the first change; ``skip``: reports at the start that no fit sees, where the loss falls
    faster than any power law (the released configurations leave out 1,000). Needs ``loss`` in the reports, not
    negative; a task missing from a batch counts with its last loss.
    """

    def __init__(self, start: int = 1000, fit_every: int = 1000, skip: int = 500) -> None:
        self.start = count_of("start", start, 1)
        self.fit_every = count_of("fit_every", fit_every, 1)
        self.skip = count_of("skip", skip, 0)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Probabilities after this report [T]; the natural mix until the first fit."""
        memory = state.memory
        if not memory:
            memory.update(_fresh(state))
        samples = float((state.step + 1) * state.batch_size)
        examples = counted(report)
        loss = _observed(report, memory, examples)
        if examples.sum() > 0:
            memory["history"] = (0.9 * np.array(memory["history"]) + 0.1 * examples / examples.sum()).tolist()
        turn = memory["reports"]
        memory["reports"] = turn + 1
        if loss is not None and turn >= self.skip:
            _enter(memory, samples, loss)
        if turn + 1 >= self.start and (turn + 1) % self.fit_every == 0 and len(memory["samples"]) >= LEAST_POINTS:
            memory["laws"] = _fits(memory)
        if memory["laws"] is None:
            return state.natural
        laws = [ScalingLaw(*law) for law in memory["laws"]]
        speed = np.array([max(law.alpha, ALPHA_MIN) * law.reducible(samples) / samples for law in laws])
        return self._mix(memory, state.natural, speed, turn)

    def _mix(self, memory: dict[str, Any], natural: FloatArray, speed: FloatArray, turn: int) -> FloatArray:
        """The two last lines of the rule."""
        wanted = natural * speed * np.sqrt(memory["history"])
        wanted = wanted / wanted.sum() if 0 < wanted.sum() < np.inf else natural
        wanted = np.maximum(wanted, FLOOR)
        wanted = wanted / wanted.sum()
        average = np.array(memory["average"])
        out = 0.9 * average + 0.1 * wanted
        memory["average"] = (average + (wanted - average) / (turn + 1)).tolist()
        return np.asarray(out / out.sum(), dtype=np.float64)

    def __repr__(self) -> str:
        return f"ADO(start={self.start}, fit_every={self.fit_every}, skip={self.skip})"


def _fresh(state: PolicyState) -> dict[str, Any]:
    """``samples`` and ``losses``: the curve, a point per full block of ``block`` reports; ``sums``: the block under way
    (reports in it, summed samples, summed losses)."""
    count = len(state.tasks)
    return {
        "reports": 0,
        "history": state.natural.tolist(),
        "average": state.natural.tolist(),
        "last": [None] * count,
        "samples": [],
        "losses": [],
        "block": 1,
        "sums": [0, 0.0, [0.0] * count],
        "laws": None,
    }


def _observed(report: Any, memory: dict[str, Any], examples: FloatArray) -> FloatArray | None:
    """Losses [T], imputed for absent tasks: their last one, before any the batch's mean; None if nothing is known."""
    loss = losses(report, "ADO")
    if (loss < 0).any():
        raise ValueError(f"ADO fits power laws to losses, which must not be negative, got {loss.tolist()}")
    seen = np.isfinite(loss)
    if not seen.any():
        return None
    # A weight of one example keeps tasks in whose losses the report has without examples.
    mean = float(np.average(loss[seen], weights=np.maximum(examples[seen], 1.0)))
    last = [float(loss[t]) if seen[t] else memory["last"][t] for t in range(len(loss))]
    memory["last"] = last
    return np.maximum([mean if value is None else value for value in last], _LEAST_LOSS)


def _enter(memory: dict[str, Any], samples: float, loss: FloatArray) -> None:
    """Add a step to the block under way; a full block becomes a point, and too many points become half as many."""
    reports, total, summed = memory["sums"]
    reports, total, summed = reports + 1, total + samples, (np.array(summed) + loss).tolist()
    if reports == memory["block"]:
        memory["samples"].append(total / reports)
        memory["losses"].append((np.array(summed) / reports).tolist())
        reports, total, summed = 0, 0.0, [0.0] * len(loss)
    memory["sums"] = [reports, total, summed]
    if len(memory["samples"]) >= POINTS:
        memory["samples"] = np.array(memory["samples"]).reshape(-1, 2).mean(1).tolist()
        memory["losses"] = np.array(memory["losses"]).reshape(len(memory["samples"]), 2, -1).mean(1).tolist()
        memory["block"] *= 2


def _fits(memory: dict[str, Any]) -> list[list[float]]:
    samples, curves = np.array(memory["samples"]), np.array(memory["losses"]).T
    laws = [fit(samples, curve) for curve in curves]
    return [[law.log_beta, law.eps, law.alpha] for law in laws]
