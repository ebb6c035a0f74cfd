"""How many examples of each task a batch gets: exact integer deficits, no random draw.

All amounts are integers in units of 2**-40 of an example. Each batch adds ``batch size x weight`` to every task's
credit and takes one unit of 2**40 per example served, so credits are the deficits against the intended mix and sum to
zero. While weights stand, every credit stays strictly between -1 and 1 example: whole credits are served at once, the
remaining slots go to fractional credits, the earliest deadline (the batch in which the credit would reach a whole
example) first, which is optimal for unit jobs with integer release times and deadlines. When weights move, more whole
credits may fall due than there are slots; then the largest are served, which keeps every deficit below 1 + ln T.
"""

from __future__ import annotations

import numpy as np

from .arrays import BoolArray, FloatArray, IntArray
from .permutation import hash_range

ONE = 1 << 40
"""One example, and the sum of the weights."""

_NEVER = np.iinfo(np.int64).max


def to_units(probabilities: FloatArray) -> IntArray:
    """Probabilities [T] (they sum to 1) as int64 [T] summing to 2**40 exactly, by largest remainder."""
    scaled = probabilities / probabilities.sum() * ONE
    units: IntArray = np.floor(scaled).astype(np.int64)
    short = ONE - int(units.sum())
    order = np.argsort(-(scaled - units), kind="stable")
    if short < 0:  # rounding in the division above; at most a few units
        units[int(units.argmax())] += short
    else:
        units[order[:short]] += 1
    return units


def from_units(units: IntArray) -> FloatArray:
    """Weights [T] in units of 2**-40 as probabilities, float64, exact."""
    return units / float(ONE)


def allocate(
    credit: IntArray,
    accrual: IntArray,
    slots: int,
    tie_key: int,
    forced: BoolArray | None = None,
    room: IntArray | None = None,
) -> IntArray:
    """Examples per task, int64 [T], summing to ``slots``.

    ``credit`` int64 [T], this batch's accrual included; ``accrual`` int64 [T], what every batch adds; ``tie_key``
    decides between equal deadlines; ``forced`` bool [T]: tasks that get at least one slot (at most ``slots`` of them,
    with room); ``room`` int64 [T]: most that each may get, summing to at least ``slots``.
    """
    counts = np.maximum(credit // ONE, 0)
    if room is not None:
        counts = np.minimum(counts, room)
    if forced is not None:
        counts = np.maximum(counts, forced)
    open_slots = slots - int(counts.sum())
    if open_slots < 0:
        _cut(counts, credit, -open_slots, forced)
    elif open_slots > 0:
        open_slots -= _serve_fractions(counts, credit, accrual, open_slots, tie_key, room)
        _fill(counts, credit, open_slots, room)
    return counts


def _serve_fractions(
    counts: IntArray, credit: IntArray, accrual: IntArray, slots: int, tie_key: int, room: IntArray | None
) -> int:
    left = credit - counts * ONE
    eligible = left > 0
    if room is not None:
        eligible &= counts < room
    tasks = np.flatnonzero(eligible)
    if len(tasks) > slots:
        per_batch = accrual[tasks]
        deadline = np.where(per_batch > 0, -((left[tasks] - ONE) // np.maximum(per_batch, 1)), _NEVER)
        ties = hash_range(len(counts), tie_key)[tasks]
        # Equal deadlines: the larger credit, in sixteenths of an example, then chance, lest the same tasks always meet.
        tasks = tasks[np.lexsort((ties, -(left[tasks] >> 36), deadline))[:slots]]
    counts[tasks] += 1
    return len(tasks)


def _fill(counts: IntArray, credit: IntArray, slots: int, room: IntArray | None) -> None:
    # Only when forced slots or a cap took eligible tasks away: the largest credits, one slot at a time.
    left = credit - counts * ONE
    for _ in range(slots):
        allowed = left if room is None else np.where(counts < room, left, -_NEVER)
        task = int(allowed.argmax())
        counts[task] += 1
        left[task] -= ONE


def _cut(counts: IntArray, credit: IntArray, slots: int, forced: BoolArray | None) -> None:
    # Over-full after weights moved: give back the slots whose credit is smallest, so that the largest are served.
    keep = np.zeros_like(counts) if forced is None else forced.astype(np.int64)
    last = credit - (counts - 1) * ONE
    for _ in range(slots):
        task = int(np.where(counts > keep, last, _NEVER).argmin())
        counts[task] -= 1
        last[task] += ONE
