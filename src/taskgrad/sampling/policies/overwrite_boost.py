"""Share the budget among the rare tasks: away from those that are done, and from those that nothing speaks for.

Every task rarer than an equal share (n_t / sum(n) < 1 / T) begins with an equal part of the budget. Every tenth report
the parts are set anew, by three questions to each task; what they need is kept over the task's appearances:

- **Is there anything left?** The need is what is left of the gradients' energy n_t ||g_t||^2 (of its peak), and of the
  loss (of its beginning), whichever is less. A task without need gives its part back. Where examples were shown more
  than ``PASSES`` times, low training losses say nothing, unless the policy is told that they are ``fresh``.
- **Is it overwritten?** Of two tasks that are half learned, the one that learns unhindered soon needs nothing; the one
  that the others undo as fast as it learns (an overwrite ratio rho of 1 or more) stays where it is. So an overwritten
  task's claim is full as long as its need is above ``FULL``; another's falls with its need.
- **Does anything speak for it?** Its loss falls (the last third of its history against the third before, by
  ``FALLING`` standard errors), or it has a pull of its own that the others undo, by two standard errors, less than
  ``HELD`` times: noise has none, so its rho is far above, or undefined. A task whose loss is clearly below its
  beginning is proven: for good if far below, else until nothing has spoken for it for ``LAPSE`` of the run. One that
  is not is trusted less the longer nothing speaks for it: only time tells a plateau from noise.

A task with any need keeps ``BASE`` of an equal part, or ``CUT`` where it is not trusted at all; the rest is split by
claim^2 x trust, at most ``CAP`` equal parts times the need for the proven, ``UNPROVEN`` for the others. What nobody
claims stays with the natural mix: the budget in force shrinks. docs/policy-log.md has the evidence for the rules and
the constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..arrays import BoolArray, FloatArray
from .base import Policy, PolicyState
from .history import Average, History
from .updates import column, counted

EVERY = 10
"""Reports between decisions: what is kept is read and written that seldom."""
ENOUGH = 150
"""Appearances before anything is concluded from losses or from rho."""
FIRST = 40
"""Appearances in a loss's beginning: the lower of the first and the second so many, as an inflated start soon falls."""
CALIBRATED = 160
"""Appearances after which a loss only falls by learning: what proves a task must be below those just before, too. The
loss of noise falls at first as well, until the network gives every answer its frequency."""
DONE, RELEASE = 0.02, 0.05
"""Need below which a task gets nothing, and above it the stretch over which its base grows to the full one."""
BASE, CUT = 0.5, 0.4
"""Part that a task keeps while it has any need, and that of one no longer trusted, in equal parts."""
CAP, UNPROVEN, UNPROVEN_EARLY = 8.0, 0.75, 1.25
"""Most that a task gets of the rest, in equal parts: beyond the first, the budget is not worth its price; the others
hold for tasks that nothing proves, and for these up to ``EARLY`` of the run: a plateau ends the sooner, and then is
worth the more."""
EARLY = 0.35
FULL = 0.3
"""Need from which on the claim of an overwritten task is full."""
FREE, OVERWRITTEN = 0.7, 1.1
"""Overwrite ratios up to which a task learns unhindered, and from which on it is overwritten."""
HELD = 2.0
"""Overwrite ratio below which a task's own pull speaks for it, and above which no falling loss does."""
FALLING = 3.0
"""Standard errors that a loss must have fallen by to speak for its task: noise seldom exceeds them."""
PROVEN, SURE, PROVEN_HELD_OUT = 0.95, 0.7, 0.8
"""Of its beginning: two standard errors below the first a training loss, or below the last a held-out one, proves a
task for a while; if its mean is below the second as well, for good."""
LAPSE = 0.5
PASSES = 3.0
"""Passes over a task's examples after which a low training loss may be memory."""
GRACE, NEW, RECENT = 0.15, 0.3, 0.03
"""Of the run: how long evidence keeps its full weight, how long a task is new, how long something was just now."""
DOUBT = ((0.3, 1.0), (0.7, 0.5), (0.7 + 0.1, 0.0))
"""Trust in a task that is not proven, by the part of the run that nothing spoke for it; linear in between. (The sum is
.8 but for the last bit, with which the table was made.)"""
LAST, ABOVE = 0.85, 1.1
"""After this part of the run a task that is not proven is not trusted at all, unless it is new, or its own pull spoke
for it just now and its loss is not that far above its beginning."""
LEAST_TRUST = 0.3
"""Below it a task is cut."""
ASSUMED, LONGER = 2000, 1.5
"""Batches of a run whose horizon is unknown: so many, or so many times those so far."""
NOTICED = 0.005
"""Of a share: smaller changes are not explained."""
_TINY = 1e-12


class OverwriteBoost(Policy):
    """The default policy; see the module's docstring. It reads ``examples``, ``norm``, ``overwrite`` and
    ``overwrite_se`` of the reports; their ``loss`` where there is one (``batch.losses(per_example)``), and held-out
    losses where ``sampler.observe`` is given any: each makes it better. Tasks without any
    loss are not distrusted.

    ``fresh``: examples are new at every showing although the data set is finite (augmented, generated), so that low
    training losses mean what they say. Streams (``shares=``) are fresh anyway.

    What it is made for, in this order, and what was measured once on 70 random scenarios (held-out accuracy, paired
    with the equal split of the same budget; ``python -m benchmarks.policies.contract``):

    1. never worse than the equal split: below it in 1 of 70, by .020 (a control of equal parts off by 2 %: in none);
    2. a task with nothing to learn ends under half an equal part, in 97 % of the scenarios that have one, given losses
       and a horizon (without one it is never cut); .9 of one over the run;
    3. where nobody needs the budget it goes back: .03 of it is in force at the end;
    4. better where needs differ: +.005 +- .001 over all, +.025 where tasks are learned one after the other.

    From gradients alone 1 and 3 hold, 2 does not: nothing there tells noise from a plateau. A static split that knows
    the run's average mix does as well. docs/policy-log.md has the whole table, and what is not met.

    Tasks in ``state.critical`` never fall below an equal part. Parts scale with ``state.importance``.
    """

    guard_defaults: ClassVar[Mapping[str, float]] = {"budget": 0.05, "probe_every": 200}

    def __init__(self, fresh: bool = False) -> None:
        if not isinstance(fresh, bool):
            raise TypeError(f"fresh must be True or False, got {fresh!r}")
        self.fresh = fresh

    def initial(self, state: PolicyState) -> FloatArray:
        """A part for each rare task [T], equal but for their importance; all to the natural mix if no task is rare."""
        return _equal_parts(state)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Parts of the budget [T]; they sum to less than 1 where nobody claims the rest."""
        memory = state.memory
        if not memory:
            parts = _equal_parts(state).tolist()
            memory.update(reports=0, sums=[[0.0] * len(parts)] * 5, parts=parts, kept={})
        examples, norm = counted(report), column(report, "norm")
        seen = (examples > 0) & np.isfinite(norm)
        energy = np.where(seen, examples, 0.0) * np.square(np.where(seen, norm, 0.0))
        loss = np.full(len(norm), np.nan) if report.loss is None else column(report, "loss")
        told = seen & np.isfinite(loss)
        loss = np.where(told, loss, 0.0)
        sums = np.array(memory["sums"]) + np.stack([seen, energy, told, loss, np.square(loss)])
        memory["reports"] += 1
        if memory["reports"] % EVERY == 0:
            ratio = column(report, "overwrite"), column(report, "overwrite_se")
            memory["parts"] = self._decide(sums, ratio, state).tolist()
            sums[:] = 0.0
        memory["sums"] = sums.tolist()
        return np.array(memory["parts"])

    def why(self, state: PolicyState) -> str:
        """Why ``state.weights`` become ``state.proposed``: the rare tasks whose share of a batch moves most, at most
        three of them, in 120 characters or so: "addition: others undo 1.3 of its pull, loss still falling (z 4.1): up
        to 1.6 %". Nothing where none moves by more than ``NOTICED``."""
        kept = state.memory.get("kept")
        if not kept or state.proposed is None:
            return ""
        moved = np.where(_equal_parts(state) > 0, np.abs(state.proposed - state.weights), 0.0)
        out: list[str] = []
        for t in np.argsort(-moved, kind="stable")[:3]:
            if moved[t] <= NOTICED * state.weights[t]:
                break
            way = "up" if state.proposed[t] > state.weights[t] else "down"
            text = f"{state.tasks[t]}: {_reason(kept, int(t))}: {way} to {100 * state.proposed[t]:.2g} %"
            if out and len("; ".join([*out, text])) > 120:
                break
            out.append(text)
        return "; ".join(out)

    def _decide(self, sums: FloatArray, ratio: tuple[FloatArray, FloatArray], state: PolicyState) -> FloatArray:
        """Enter what the reports since the last decision summed up to, and set the parts [T]."""
        memory, equal = state.memory, _equal_parts(state)
        seen, energy, told, loss, squares = sums
        kept = {name: np.array(values) for name, values in memory["kept"].items()} or _fresh(len(equal))
        now = float(state.step + 1)
        run = float(state.horizon) if state.horizon is not None else max(float(ASSUMED), LONGER * now)

        kept["began"] = np.where((kept["seen"] == 0) & (seen > 0), now, kept["began"])
        kept["seen"] += seen
        average = Average(kept, "energy", 200)
        average.enter(seen, energy)
        kept["peak"] = np.where(average.weight > 100, np.maximum(kept["peak"], average.mean), kept["peak"])
        peak = np.where(kept["peak"] > 0, kept["peak"], np.inf)  # a gradient of 0 leaves nothing to learn
        left = np.where(average.weight > 100, average.mean / peak, 1.0)

        by_loss, grade = _enter_losses(kept, told, loss, squares)
        held_out = _held_out(memory, state)
        repeated = np.zeros(len(equal), dtype=bool)
        if state.epochs is not None and not self.fresh:
            repeated = state.epochs > PASSES
        need = np.where(repeated, 1.0, np.minimum(np.minimum(left, by_loss), 1.0))
        need = np.where(np.isnan(held_out), need, np.clip(held_out, 0.0, 1.0))
        kept["proven"] = np.maximum(np.maximum(kept["proven"], grade), held_out < PROVEN_HELD_OUT)

        falls, held = _evidence(kept, ratio, by_loss, now)
        held = np.where(repeated, 1.0, held)  # how fast they are memorised is no sign that they learn unhindered
        trust, strong = _trust(kept, (kept["told"] > 0) | ~np.isnan(held_out), now, run)
        kept.update(need=need, trust=trust, falls=falls, ratio=np.where(np.isnan(ratio[0]), -1.0, ratio[0]))
        memory["kept"] = {name: values.tolist() for name, values in kept.items()}
        most = np.where(now - kept["began"] < EARLY * run, UNPROVEN_EARLY, UNPROVEN)
        return _split(equal, need, trust, np.where(strong, CAP, most), held, state.critical)

    def __repr__(self) -> str:
        return f"OverwriteBoost({'fresh=True' if self.fresh else ''})"


def _equal_parts(state: PolicyState) -> FloatArray:
    """Importance of the rare tasks, divided by its sum [T]; zeros if there is none."""
    wanted = np.where(state.natural < 1.0 / len(state.tasks), state.importance, 0.0)
    out: FloatArray = wanted / max(float(wanted.sum()), _TINY)
    return out


def _fresh(count: int) -> dict[str, Any]:
    """What is kept, one value per task: appearances, and those with a loss; the batch of the first, of the last
    evidence and of the last that an own pull gave; peak of the energy; proven: 0, 1 or, for good, 2; smoothed rho."""
    names = ("seen", "told", "began", "last", "spoke", "peak", "proven", "rho", "rho_weight")
    kept = {name: np.zeros(count) for name in names}
    for name in ("energy", "loss", "first", "second", "third"):
        Average.begin(kept, name, count)
    History.begin(kept, count)
    return kept


def _enter_losses(
    kept: dict[str, Any], told: FloatArray, loss: FloatArray, squares: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Enter ``told`` losses per task that sum to ``loss``, their squares to ``squares``; gives the loss over that of
    the beginning [T], 1 where that says nothing, and how far it proves its task [T]: 0, 1 or, for good, 2."""
    kept["told"] += told
    begins = 0
    for name, ends in (("first", FIRST), ("second", 2 * FIRST), ("third", CALIBRATED)):
        within = (kept["told"] > begins) & (kept["told"] <= ends)
        Average(kept, name, None).enter(*(np.where(within, x, 0.0) for x in (told, loss, squares)))
        begins = ends
    recent = Average(kept, "loss", 100)
    recent.enter(told, loss, squares)
    History(kept).enter(told, loss, squares)

    first, second, third = (Average(kept, name, None) for name in ("first", "second", "third"))
    start, error = _lower((first.mean, first.error), second)
    # of a loss that goes below 0 nobody knows the end
    known = (kept["told"] > FIRST) & (start > 0) & (recent.mean >= 0)
    left = np.where(known, recent.mean / np.where(known, start, 1.0), 1.0)

    base, error = _lower((start, error), third)
    size = np.where(base == 0, 1.0, np.abs(base))
    fallen = (base - recent.mean) / size
    clearly = fallen - 2.0 * np.sqrt(recent.error**2 + error**2) / size > 1.0 - PROVEN
    grade = np.where(clearly, np.where(fallen > 1.0 - SURE, 2.0, 1.0), 0.0)
    return left, np.where(kept["told"] > CALIBRATED + FIRST, grade, 0.0)


def _lower(known: tuple[FloatArray, FloatArray], other: Average) -> tuple[FloatArray, FloatArray]:
    """The lower of two means, and its standard error, each [T]."""
    mean, error = known
    below = (other.weight > 0) & (other.mean < mean)
    return np.where(below, other.mean, mean), np.where(below, other.error, error)


def _held_out(memory: dict[str, Any], state: PolicyState) -> FloatArray:
    """Mean of the last three held-out losses over the beginning [T]; NaN where there are no three yet. The beginning is
    the lowest of the first three, but at least .3 of the first: that may be inflated, and a task may be quick."""
    if state.eval_losses is not None and memory.get("evaluations") != state.evaluations:
        given = [state.eval_losses.get(task) for task in state.tasks]
        first, recent = memory.setdefault("held_out", [[], []])
        memory["evaluations"] = state.evaluations
        if len(first) < 3:
            first.append(given)
        memory["held_out"][1] = [*recent, given][-3:]
    first, recent = memory.get("held_out", [[], []])
    if len(recent) < 3:
        return np.full(len(state.tasks), np.nan)
    values = np.array(first, dtype=np.float64)
    start = np.maximum(values.min(0), 0.3 * values[0])
    now = np.array(recent, dtype=np.float64).mean(0)
    return np.asarray(np.where(now >= 0, now, np.nan) / np.where(start > 0, start, np.nan))


def _evidence(
    kept: dict[str, Any], ratio: tuple[FloatArray, FloatArray], by_loss: FloatArray, now: float
) -> tuple[FloatArray, FloatArray]:
    """Note what speaks for whom; gives by how many standard errors each loss fell [T], and how far each task is held
    down by the others, from 0 to 1 [T]."""
    rho, error = ratio
    known = np.isfinite(rho)
    kept["rho_weight"] = np.where(known, 0.95 * kept["rho_weight"] + 1.0, kept["rho_weight"])
    step = (np.where(known, np.minimum(rho, 5.0), 0.0) - kept["rho"]) / np.maximum(kept["rho_weight"], 1.0)
    kept["rho"] = np.where(known, kept["rho"] + step, kept["rho"])
    falls = History(kept).fall()
    fell = (falls > FALLING) & (kept["told"] > ENOUGH) & ~(rho - error > HELD)
    speaks = (rho + 2.0 * error < HELD) & (kept["seen"] > ENOUGH)
    kept["spoke"] = np.where(speaks & (by_loss < ABOVE), now, kept["spoke"])
    kept["last"] = np.where(fell | speaks, now, kept["last"])
    held = np.where(known, np.clip((kept["rho"] - FREE) / (OVERWRITTEN - FREE), 0.0, 1.0), 0.0)
    return falls, held


def _trust(kept: Mapping[str, Any], judged: BoolArray, now: float, run: float) -> tuple[FloatArray, BoolArray]:
    """Trust in each task, from 0 to 1 [T], and which may have more than an equal part, bool [T].

    Gradients alone prove nobody wrong: tasks without a loss to judge them by are trusted."""
    since = now - kept["last"]
    silent = now - np.maximum(np.maximum(kept["last"], kept["began"]) - GRACE * run, 0.0)
    times, levels = np.array(DOUBT).T
    trust = np.interp(np.maximum(silent, 0.0) / run, times, levels)
    excused = (now - kept["began"] <= NEW * run) | (now - kept["spoke"] <= RECENT * run)
    trust = np.where((now > LAST * run) & ~excused, 0.0, trust)
    proven = (kept["proven"] > 1) | ((kept["proven"] > 0) & (since < LAPSE * run))
    strong = (kept["proven"] > 1) | (proven & (since < RECENT * run))
    spoken_for = (kept["last"] > 0) & (since < NEW * run)
    return np.where(judged & ~proven, trust, 1.0), np.where(judged, strong, spoken_for)


def _split(
    equal: FloatArray, need: FloatArray, trust: FloatArray, most: FloatArray, held: FloatArray, critical: BoolArray
) -> FloatArray:
    """Parts [T] from the equal ones; see the module's docstring."""
    cut = trust < LEAST_TRUST
    claim = np.square(np.minimum(1.0, need / (1.0 - (1.0 - FULL) * held)))
    want = np.where(cut, 0.0, equal * claim * trust)
    left = np.maximum(need - DONE, 0.0) / (1.0 - DONE)
    base = np.where(cut, CUT, BASE) * np.minimum(1.0, left / RELEASE)
    base = equal * np.where(critical, 1.0, base)
    return base + _fill(want, equal * left * most, 1.0 - float(base.sum()))


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


def _reason(kept: Mapping[str, Any], t: int) -> str:
    """Why task ``t`` has the part it has, in words and numbers."""
    need, trust, ratio, falls = (float(kept[name][t]) for name in ("need", "trust", "ratio", "falls"))
    if need < DONE + RELEASE:
        return f"done (need {need:.2g})"
    words = [f"{100 * need:.0f} % left"] if need < 0.9 else []
    if ratio >= 0:
        words.append(f"others undo {ratio:.1f} of its pull")
    if falls > FALLING:
        words.append(f"loss still falling (z {falls:.1f})")
    if trust < 1:
        words.append(f"no progress shown (trust {trust:.1f})")
    return ", ".join(words) or "not learned yet"
