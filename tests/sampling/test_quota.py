from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.quota import ONE, allocate, from_units, to_units

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
        counts = allocate(credit, accrual, batch_size, key + k)
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
            counts = allocate(credit, accrual, batch_size, k)
            credit = credit - counts * ONE
            standing -= set(np.flatnonzero(counts).tolist())
            standing = standing or set(range(tasks))
            worst = max(worst, int(credit.max()) / ONE)
            assert int(credit.sum()) == 0
            assert int(credit.min()) > -ONE
    assert worst <= 1 + math.log(tasks)


def test_forced_tasks_get_a_slot_at_the_expense_of_the_smallest_claims() -> None:
    credit = (np.array([3.4, 0.6, -0.2, 0.2]) * ONE).astype(np.int64)
    counts = allocate(credit, np.full(4, ONE), 4, 0, forced=np.array([False, False, True, True]))
    assert counts.tolist() == [2, 0, 1, 1]


def test_room_is_never_exceeded_and_the_batch_is_still_full() -> None:
    credit = (np.array([6.5, 1.5, 0.0, 0.0]) * ONE).astype(np.int64)
    counts = allocate(credit, np.full(4, ONE), 8, 0, room=np.array([2, 3, 1, 9]))
    assert counts.sum() == 8
    assert (counts <= [2, 3, 1, 9]).all()
    assert counts[:2].tolist() == [2, 3]


def test_equal_deadlines_are_broken_differently_from_batch_to_batch() -> None:
    accrual = np.full(8, ONE // 8)
    chosen = {int(allocate(accrual.copy(), accrual, 1, key).argmax()) for key in range(100)}
    assert len(chosen) == 8
