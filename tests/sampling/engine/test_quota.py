from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.engine.quota import ONE, allocate, deadline_keys, due, from_units, rates, spread, to_units

shares = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)


def units_of(weights: list[float]) -> np.ndarray:
    values = np.array(weights)
    return to_units(values / values.sum())


@settings(deadline=None)
@given(shares)
def test_units_sum_exactly_and_are_close(weights: list[float]) -> None:
    probabilities = np.array(weights) / sum(weights)
    units = to_units(probabilities)
    assert units.dtype == np.int64
    assert int(units.sum()) == ONE
    assert (units >= 0).all()
    assert np.abs(from_units(units) - probabilities).max() <= 2.0**-38


def test_units_of_many_tasks() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(10_000))
    assert int(to_units(probabilities).sum()) == ONE


@settings(max_examples=60, deadline=None)
@given(shares, st.integers(1, 40), st.integers(0, 2**63))
def test_deficits_stay_below_one_while_weights_stand(weights: list[float], batch_size: int, key: int) -> None:
    accrual = units_of(weights) * batch_size
    credit = np.zeros_like(accrual)
    for k in range(150):
        credit = credit + accrual
        counts = allocate(credit, rates(accrual), batch_size, key + k)
        credit = credit - counts * ONE
        assert int(counts.sum()) == batch_size and (counts >= 0).all()
        assert int(credit.sum()) == 0
        assert int(np.abs(credit).max()) < ONE


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("tasks", [2, 3, 10, 60])
def test_deficits_stay_below_one_plus_log_tasks_when_weights_move(tasks: int, batch_size: int) -> None:
    rng = np.random.default_rng(tasks)
    worst = 0.0
    for adversary in ("random", "one", "starved", "fullest"):
        credit = np.zeros(tasks, dtype=np.int64)
        standing = set(range(tasks))
        for k in range(600):
            if adversary == "random":
                weights = rng.dirichlet(np.full(tasks, 0.3))
            elif adversary == "one":
                weights = np.eye(tasks)[rng.integers(tasks)]
            elif adversary == "starved":  # feed only those not served since the round began
                weights = np.array([float(t in standing) for t in range(tasks)])
            else:
                weights = (credit >= np.sort(credit)[-max(1, tasks // (1 + k % tasks))]).astype(float)
            accrual = units_of(list(weights)) * batch_size
            credit = credit + accrual
            counts = allocate(credit, rates(accrual), batch_size, k)
            credit = credit - counts * ONE
            standing -= set(np.flatnonzero(counts).tolist())
            standing = standing or set(range(tasks))
            worst = max(worst, int(credit.max()) / ONE)
            assert int(credit.sum()) == 0
            assert int(credit.min()) > -ONE
    assert worst <= 1 + math.log(tasks)


def test_forced_tasks_get_a_slot_at_the_expense_of_the_smallest_claims() -> None:
    credit = (np.array([3.4, 0.6, -0.2, 0.2]) * ONE).astype(np.int64)
    counts = allocate(credit, rates(np.full(4, ONE)), 4, 0, forced=np.array([False, False, True, True]))
    assert counts.tolist() == [2, 0, 1, 1]


def test_room_is_never_exceeded_and_the_batch_is_still_full() -> None:
    credit = (np.array([6.5, 1.5, 0.0, 0.0]) * ONE).astype(np.int64)
    counts = allocate(credit, rates(np.full(4, ONE)), 8, 0, room=np.array([2, 3, 1, 9]))
    assert counts.sum() == 8
    assert (counts <= [2, 3, 1, 9]).all()
    assert counts[:2].tolist() == [2, 3]


def test_equal_deadlines_are_broken_differently_from_batch_to_batch() -> None:
    accrual = np.full(8, ONE // 8)
    chosen = {int(allocate(accrual.copy(), rates(accrual), 1, key).argmax()) for key in range(100)}
    assert len(chosen) == 8


@settings(max_examples=300, deadline=None)
@given(st.integers(1, ONE - 1), st.integers(1, 2**60) | st.integers(1, 2**12).map(lambda n: ONE // n))
def test_deadlines_are_exact(left: int, accrual: int) -> None:
    key = int(deadline_keys(np.array([left]), rates(np.array([accrual])), np.zeros(1, dtype=np.uint32))[0])
    batches = -((left - ONE) // accrual)  # until the credit is a whole example, in Python's integers
    assert key >> 36 == min(batches - 1, 2**28 - 1)
    assert key >> 32 & 15 == 15 - (left >> 36)


def test_resting_tasks_come_last() -> None:
    left = np.array([ONE - 1, 1])
    resting, slow = deadline_keys(left, rates(np.array([0, 2**13])), np.zeros(2, dtype=np.uint32))
    assert slow < resting


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**60), 2**60), st.booleans(), st.integers(0, 2**55)), min_size=1, max_size=9))
def test_spreading_keeps_the_sum_and_is_in_proportion(rows: list[tuple[int, bool, int]]) -> None:
    amounts, who = np.array([a for a, _, _ in rows]), np.array([w for _, w, _ in rows])
    payers = np.array([0 if w else p for _, w, p in rows])
    out = spread(amounts, who, 7, payers)
    if not payers.any():
        assert np.array_equal(out, amounts)
        return
    assert sum(out.tolist()) == sum(amounts.tolist())
    assert (out[who] == 7).all()
    freed = sum(a - 7 for a, w, _ in rows if w)
    for got, (amount, was_set, payer) in zip(out.tolist(), rows, strict=True):
        if not was_set:
            share = freed * payer // int(payers.sum())
            assert abs(got - amount - share) <= len(rows) + abs(freed) * 2.0**-50 * len(rows)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(1, 6))
def test_what_is_due_leaves_the_later_deadlines_within_reach(slack: list[int], batch_size: int) -> None:
    slack = [s for s in slack if sorted(slack).index(s) < (s + 1) * batch_size]
    for s in sorted(set(slack)):  # keep only what can be met at all
        while sum(other <= s for other in slack) > (s + 1) * batch_size:
            slack.remove(s)
    forced = due(np.array(slack), batch_size)
    chosen = [] if forced is None else sorted(np.array(slack)[forced].tolist())
    assert len(chosen) <= batch_size
    rest = sorted(slack)[len(chosen) :]
    assert chosen == sorted(slack)[: len(chosen)]  # the nearest deadlines
    assert all(rank < s * batch_size for rank, s in enumerate(rest))  # the rest fit into the batches after this one
    if chosen:  # and not one too many
        fewer = sorted(slack)[len(chosen) - 1 :]
        assert any(rank >= s * batch_size for rank, s in enumerate(fewer))
