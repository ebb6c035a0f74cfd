"""How many examples of each task a batch gets: exact integer deficits, no random draw.

All amounts are integers in units of 2**-40 of an example. Each batch adds ``batch size x weight`` to every task's
credit and takes one unit of 2**40 per example served, so credits are the deficits against the intended mix and sum to
zero. While weights stand, every credit stays strictly between -1 and 1 example: whole credits are served at once, the
remaining slots go to fractional credits, the earliest deadline (the batch in which the credit would reach a whole
example) first, which is optimal for unit jobs with integer release times and deadlines. When weights move, more whole
credits may fall due than there are slots; then the largest are served, which keeps every deficit below 1 + ln T.

Floating point appears in two places, as one correctly rounded IEEE operation each, so it is the same everywhere:
deadlines, where it is exact (``deadline_keys``), and parts of a sum to be spread, which may be off by a few units of
2**-40 (``spread``). ``csrc/index_engine/quota.cpp`` agrees to the bit.
"""

from __future__ import annotations

import heapq

import numpy as np

from ..arrays import BoolArray, FloatArray, IntArray
from .permutation import Uint32Array, UintArray, hash32

ONE_BITS = 40
ONE = 1 << ONE_BITS
"""One example, and the sum of the weights."""

_FARTHEST = (1 << 28) - 1
_RESTING = 2.0**-64


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


def rates(accrual: IntArray) -> FloatArray:
    """``accrual`` int64 [T] as divisors, float64; tasks that accrue nothing get one that puts them last."""
    out: FloatArray = np.where(accrual > 0, accrual.astype(np.float64), _RESTING)
    return out


def spread(amounts: IntArray, who: BoolArray, values: IntArray | int, payers: IntArray) -> IntArray:
    """``amounts`` with ``values`` at ``who``; the difference goes to ``payers`` in proportion, so that the sum stands.

    All int64 [T], payers not negative. Where they are all zero nothing changes.
    """
    total = int(payers.sum())
    if total == 0:
        return amounts
    replaced = np.where(who, values, amounts)
    freed = int((amounts - replaced).sum())
    parts = np.floor(payers * (float(freed) / float(total))).astype(np.int64)
    parts[int(payers.argmax())] += freed - int(parts.sum())
    out: IntArray = replaced + parts
    return out


def due(slack: IntArray, batch_size: int) -> BoolArray | None:
    """Tasks, bool [T], that must be in this batch so that every later deadline can be met too; None: none.

    ``slack`` int64 [T]: batches that each task can still wait. Of the first s + 1 batches with ``batch_size`` slots
    each, those after this one hold s * batch_size tasks: whatever is due by then and exceeds that must come now.
    """
    near = np.flatnonzero(slack * batch_size < len(slack))  # the others never exceed the slots before them
    if not len(near):
        return None
    waits = np.maximum(slack[near], 0)
    by_then = np.cumsum(np.bincount(waits))
    needed = int((by_then - np.arange(len(by_then)) * batch_size).max())
    if needed <= 0:
        return None
    forced = np.zeros(len(slack), dtype=np.bool_)
    forced[near[np.argsort(waits, kind="stable")[: min(needed, batch_size)]]] = True
    return forced


def allocate(
    credit: IntArray,
    rate: FloatArray,
    slots: int,
    tie_key: int,
    forced: BoolArray | None = None,
    room: IntArray | None = None,
) -> IntArray:
    """Examples per task, int64 [T], summing to ``slots``.

    ``credit`` int64 [T], this batch's accrual included; ``rate`` float64 [T], what every batch adds, by ``rates``;
    ``tie_key`` decides between equal deadlines; ``forced`` bool [T]: tasks that get at least one slot (at most
    ``slots`` of them, with room); ``room`` int64 [T]: most that each may get, summing to at least ``slots``.
    """
    counts: IntArray = np.maximum(credit >> ONE_BITS, 0)
    if room is not None:
        counts = np.minimum(counts, room)
    if forced is not None:
        counts = np.maximum(counts, forced)
    open_slots = slots - int(counts.sum())
    if open_slots < 0:
        _cut(counts, credit, -open_slots, forced)
    elif open_slots > 0:
        open_slots -= _serve_fractions(counts, credit, rate, open_slots, tie_key, room)
        _fill(counts, credit, open_slots, room)
    return counts


def deadline_keys(left: IntArray, rate: FloatArray, ties: Uint32Array) -> UintArray:
    """What fractional credits are served by, smallest first, uint64: deadline (28 bits), credit, chance.

    ``left`` int64, in (0, ONE). A task whose credit reaches a whole example n batches from now has
    floor((ONE - left - 1/2) / rate) = n - 1: for integers the half changes no quotient, it only keeps resting tasks
    last. The quotient is never an integer, and at least 2**-42 of itself below the next one: more than division
    rounds, so the floor is exact. (A rate above 2**53 is rounded itself, but then the quotient is below 1.) Equal
    deadlines: the larger credit, in sixteenths of an example, then a hash, lest the same tasks always meet.
    """
    away = np.minimum(((ONE - left) - 0.5) / rate, _FARTHEST).astype(np.uint64)
    sixteenths = (left >> (ONE_BITS - 4)).astype(np.uint64)
    keys: UintArray = away << np.uint64(36) | (np.uint64(15) - sixteenths) << np.uint64(32) | ties.astype(np.uint64)
    return keys


def _serve_fractions(
    counts: IntArray, credit: IntArray, rate: FloatArray, slots: int, tie_key: int, room: IntArray | None
) -> int:
    left = credit - (counts << ONE_BITS)
    eligible = left > 0
    if room is not None:
        eligible &= counts < room
    tasks = np.flatnonzero(eligible)
    if len(tasks) > slots:
        ties = hash32(tasks.astype(np.uint32) ^ np.uint32(tie_key & 0xFFFFFFFF))
        keys = deadline_keys(left[tasks], rate[tasks], ties)
        last = np.partition(keys, slots - 1)[slots - 1]
        chosen = keys < last
        chosen[np.flatnonzero(keys == last)[: slots - int(chosen.sum())]] = True
        tasks = tasks[chosen]
    counts[tasks] += 1
    return len(tasks)


def _fill(counts: IntArray, credit: IntArray, slots: int, room: IntArray | None) -> None:
    # Only when forced slots or a cap took eligible tasks away: the largest credits, one slot at a time.
    if not slots:
        return
    most = np.full_like(counts, slots) + counts if room is None else room
    left = credit - (counts << ONE_BITS)
    heap = [(-int(left[t]), int(t)) for t in np.flatnonzero(counts < most)]
    heapq.heapify(heap)
    for _ in range(slots):
        claim, task = heap[0]
        counts[task] += 1
        if counts[task] < most[task]:
            heapq.heapreplace(heap, (claim + ONE, task))
        else:
            heapq.heappop(heap)


def _cut(counts: IntArray, credit: IntArray, slots: int, forced: BoolArray | None) -> None:
    # Over-full after weights moved: give back the slots whose credit is smallest, so that the largest are served.
    least = np.zeros_like(counts) if forced is None else forced.astype(np.int64)
    last = credit - ((counts - 1) << ONE_BITS)
    heap = [(int(last[t]), int(t)) for t in np.flatnonzero(counts > least)]
    heapq.heapify(heap)
    for _ in range(slots):
        claim, task = heap[0]
        counts[task] -= 1
        if counts[task] > least[task]:
            heapq.heapreplace(heap, (claim + ONE, task))
        else:
            heapq.heappop(heap)
