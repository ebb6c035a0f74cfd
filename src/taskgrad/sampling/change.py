"""From one mix to the next: which weights really change, and how that is said in a line.

A policy that follows measurements asks for a slightly different mix after every report. What is in force stays in
force for every task that is asked to move by less than ``TOLERANCE``, so that the ledger holds changes, not noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._text import printable
from .arrays import IntArray
from .engine.quota import ONE, from_units, to_units
from .guards import Guards

TOLERANCE = 0.01
"""A weight asked to move by less than this part of itself stays."""
NAMED = 3
"""Tasks that a line names."""
WIDTH = 120
"""Characters of a line."""


def next_mix(asked: IntArray, in_force: IntArray, guards: Guards) -> IntArray:
    """The mix that follows ``in_force`` where the guards let through ``asked``; both int64 [T], summing to 2**40.

    ``in_force`` itself where no task moves. A task that moves gets what is asked for it, the others keep their weight.
    What is then missing from 2**40, or too much, is made up by letting others move too, those with furthest to go
    first, the last one part of its way. So every weight lies between those that the guards let through before and now,
    and within their bounds. Where the budget, the one guard on all weights together, would be exceeded all the same,
    ``asked`` is taken as it is, and so is the natural mix. Weights are compared with those in force, so a slow drift
    is entered as soon as it adds up.
    """
    tolerance = TOLERANCE
    if guards.max_change is not None:  # lest steps that it limits be too small to ever be entered
        tolerance = min(tolerance, (guards.max_change - 1.0) / 2)
    natural = to_units(guards.natural)
    if np.array_equal(asked, natural):
        return asked
    moved = np.abs(asked - in_force) > tolerance * in_force
    if not moved.any():
        return in_force
    mix = np.where(moved, asked, in_force)
    short = ONE - int(mix.sum())
    gap = np.maximum(asked - mix if short > 0 else mix - asked, 0)
    order = np.argsort(-gap, kind="stable")
    gaps = gap[order]
    taken = np.clip(abs(short) - (np.cumsum(gaps) - gaps), 0, gaps)
    mix[order] += taken if short > 0 else -taken
    if guards.budget is not None:
        allowed = max(int(guards.budget * 2 * ONE), int(np.abs(asked - natural).sum()))
        if int(np.abs(mix - natural).sum()) > allowed:
            return asked
    return mix


def described(tasks: Sequence[str], before: IntArray, after: IntArray) -> str:
    """What a change does to the weights that move most, in a line; both int64 [T]."""
    weights = from_units(np.stack([before, after]))
    order = np.argsort(-np.abs(after - before), kind="stable")
    moved = order[: int(np.count_nonzero(after != before))]
    parts = [
        f"{'raised' if weights[1, t] > weights[0, t] else 'lowered'} {printable(tasks[t], 20)} "
        f"{weights[0, t]:.3g} -> {weights[1, t]:.3g}"
        for t in moved[:NAMED]
    ]
    return joined(parts, len(moved))


def joined(parts: Sequence[str], count: int) -> str:
    """The first of ``parts`` that have room in a line, and how many others of ``count`` there are."""
    for kept in range(len(parts), 0, -1):
        line = ", ".join(parts[:kept]) + (f" and {count - kept} more" if count > kept else "")
        if len(line) <= WIDTH:
            return line
    return parts[0][:WIDTH] if parts else ""
