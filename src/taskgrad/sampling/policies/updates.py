"""What the adaptive policies share: reading a report, checking arguments, one multiplicative step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import BoolArray, FloatArray, to_numpy
from .base import PolicyState

_TINY = float(np.finfo(np.float64).tiny)
_LARGEST = 1e100  # what sums of squares, which policies keep, can be made of


def column(report: Any, name: str) -> FloatArray:
    """A field of the report as float64 on the CPU; NaN, as if not measured, where it is infinite or beyond 1e100."""
    values = np.asarray(to_numpy(getattr(report, name)), dtype=np.float64)
    return np.where(np.abs(values) > _LARGEST, np.nan, values)


def counted(report: Any) -> FloatArray:
    """Examples of each task in the step [T]; tokens where the number of examples is not known (ids (1, S))."""
    examples = column(report, "examples")
    return np.where(np.isnan(examples), column(report, "tokens"), examples) if np.isnan(examples).any() else examples


def losses(report: Any, policy: str) -> FloatArray:
    """Losses of the report [T], NaN for tasks that are not in it. Raises ValueError where there are none."""
    if report.loss is None:
        raise ValueError(
            f"{policy} needs the losses of the tasks, but the report has none: call batch.losses(per_example) inside "
            "`with tracker.batch(ids) as batch:`"
        )
    return column(report, "loss")


def horizon(state: PolicyState, policy: str) -> int:
    """Batches of the run. Raises ValueError where the sampler was not told."""
    if state.horizon is None:
        raise ValueError(
            f"{policy} needs the length of the run: pass horizon=<batches of the whole run> to the sampler"
        )
    return state.horizon


def ascend(weights: FloatArray, gain: FloatArray, seen: BoolArray) -> FloatArray:
    """p_t exp(gain_t), normalised: one step of exponentiated gradient ascent, [T].

    Only over tasks that were ``seen``, which keep what they had together: a task without observation stays where it
    is. No weight reaches 0, from where it could never return.
    """
    if not seen.any():
        return weights
    logits = np.log(np.maximum(weights[seen], _TINY)) + gain[seen]
    raised = np.exp(logits - logits.max())
    out = weights.copy()
    out[seen] = np.maximum(weights[seen].sum() * raised / raised.sum(), _TINY)
    return np.asarray(out / out.sum(), dtype=np.float64)


def number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """``value`` as a finite float in [low, high], or (low, high] with ``open_low``; raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    found = float(value)
    if not (math.isfinite(found) and (found > low if open_low else found >= low) and found <= high):
        least = "above" if open_low else "at least"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be {least} {low:g}{most}, got {found:g}")
    return found
