"""Policies that depend on data and batch alone: Cooldown, TwoPhase, UniMax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.policies import Cooldown, Proportional, Static, Temperature, TwoPhase, UniMax
from tests.sampling.helpers import NAMES, SIZES, TASK_OF_EXAMPLE
from tests.sampling.policies.helpers import state

TOTAL = sum(SIZES)


def build(policy: Any, **options: Any) -> AdaptiveBatchSampler:
    options = {"batch_size": 20, "tasks": NAMES, "horizon": 100, "num_batches": 100, "update_every": 10, **options}
    return AdaptiveBatchSampler(TASK_OF_EXAMPLE, policy=policy, **options)


def entries(sampler: AdaptiveBatchSampler) -> list[tuple[int, str]]:
    return [(entry.effective_at, entry.cause) for entry in sampler.ledger]


def mix_at(sampler: AdaptiveBatchSampler, batch: int) -> list[float]:
    return (sampler.ledger.at(batch).weights / 2**40).tolist()


def test_cooldown_is_hot_then_natural() -> None:
    policy, given = Cooldown(2, until=0.5), {"horizon": 9}
    for step, expected in ((-1, (0.706101, 0.223289, 0.070610)), (3, (0.706101, 0.223289, 0.070610))):
        assert policy.weights(None, state(step=step, **given)) == pytest.approx(expected, abs=5e-7)
    for step in (4, 8, 100):  # the report on batch 4 speaks of batch 5, the first of the second half of 9
        assert policy.weights(None, state(step=step, **given)).tolist() == state().natural.tolist()


def test_a_schedule_needs_no_reports_and_is_exact() -> None:
    sampler = build(Cooldown(float("inf"), until=0.37))
    assert entries(sampler) == [(0, "initial"), (40, "schedule")]
    assert mix_at(sampler, 39) == [0.25] * 4
    assert mix_at(sampler, 40) == pytest.approx(np.array(SIZES) / TOTAL)
    counts = [np.bincount(TASK_OF_EXAMPLE[batch], minlength=4) for batch in sampler]
    assert sum(counts[:40]).tolist() == [200] * 4  # type: ignore[union-attr]
    assert sum(counts[40:])[0] == pytest.approx(60 * 20 * SIZES[0] / TOTAL, abs=1)  # type: ignore[index]


def test_a_schedule_survives_saving_and_is_made_anew_by_rebase() -> None:
    sampler = build(Cooldown(until=0.4))
    batches = list(sampler)
    resumed = build(Cooldown(until=0.4))
    for _, _ in zip(range(30), resumed, strict=False):
        pass
    saved = resumed.state_dict(consumed=30)
    again = build(Cooldown(until=0.4))
    again.load_state_dict(saved)
    assert list(again) == batches[30:]
    before = build(Cooldown(until=0.4))
    before.rebase(saved)
    assert entries(before) == [(30, "initial"), (40, "schedule")]
    later = build(Cooldown(until=0.2))
    later.rebase(saved)
    assert entries(later) == [(30, "initial")] and mix_at(later, 30) == pytest.approx(np.array(SIZES) / TOTAL)


def test_a_scheduled_change_takes_the_steps_that_max_change_allows() -> None:
    sampler = build(TwoPhase(Static([0.25] * 4), until=0.3), max_change=2.0)
    at = [batch for batch, _ in entries(sampler)]
    assert at == list(range(0, at[-1] + 1, 10))[:1] + list(range(30, at[-1] + 1, 10)) and len(at) > 3
    mixes = np.array([mix_at(sampler, batch) for batch in at])
    assert mixes[-1] == pytest.approx([0.25] * 4)
    grown = mixes[1:] > mixes[:-1]
    natural = np.array(SIZES) / TOTAL
    assert (mixes[1:] <= np.maximum(2 * mixes[:-1], natural) + 1e-9)[grown].all()


def test_two_phases() -> None:
    policy = TwoPhase(Temperature(2), until=0.5)
    assert policy.weights(None, state(horizon=10)).tolist() == [1, 0, 0]  # the only task with a third or more
    assert policy.weights(None, state(horizon=10, step=3)).tolist() == [1, 0, 0]
    expected = (0.706101, 0.223289, 0.070610)
    assert policy.weights(None, state(horizon=10, step=4)) == pytest.approx(expected, abs=5e-7)
    both = TwoPhase(Proportional(), until=0.5).weights(None, state((45, 40, 15), horizon=10))
    assert both == pytest.approx((45 / 85, 40 / 85, 0))
    named = TwoPhase(Proportional(), until=0.5, frequent=["b", "a"])
    assert named.weights(None, state(horizon=10)) == pytest.approx((10 / 11, 1 / 11, 0))


def test_two_phases_with_a_schedule_inside() -> None:
    sampler = build(TwoPhase(Cooldown(5, until=0.7), until=0.3))
    assert entries(sampler) == [(0, "initial"), (30, "schedule"), (70, "schedule")]
    early = TwoPhase(Cooldown(5, until=0.2), until=0.3)
    assert early.changes(state(horizon=100)) == (30,)
    rebased = build(TwoPhase(Cooldown(5, until=0.7), until=0.3))
    for _ in sampler:
        if sampler.consumed == 80:
            break
    rebased.rebase(sampler.state_dict())
    assert entries(rebased) == [(80, "initial")]
    assert mix_at(rebased, 80) == pytest.approx(np.array(SIZES) / TOTAL)
    assert mix_at(sampler, 0) == [1, 0, 0, 0]
    assert mix_at(sampler, 30) == pytest.approx(Temperature(5).weights(None, state(SIZES, NAMES)))
    assert mix_at(sampler, 70) == pytest.approx(np.array(SIZES) / TOTAL)


@pytest.mark.parametrize(
    "budget, epochs, placed",
    [(600, 4, (280, 280, 40)), (600, 1, (490, 100, 10)), (6000, 4, (4000, 400, 40)), (30, 1, (10, 10, 10))],
)
def test_unimax_allocates(budget: int, epochs: float, placed: tuple[float, ...]) -> None:
    assert UniMax(epochs).allocate(budget, state().sizes) == pytest.approx(placed)
    shares = UniMax(epochs).weights(None, state(horizon=budget // 10, batch_size=10))
    assert shares == pytest.approx(np.array(placed) / sum(placed))


def test_unimax_is_the_evenest_split_under_its_cap() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        sizes = rng.integers(1, 500, size=6)
        budget, epochs = int(rng.integers(6, 3000)), float(rng.uniform(0.5, 5))
        caps = epochs * sizes
        low, high = 0.0, float(budget)  # the level at which min(level, cap) fills the budget, by bisection
        for _ in range(100):
            level = (low + high) / 2
            low, high = (level, high) if np.minimum(level, caps).sum() < budget else (low, level)
        assert UniMax(epochs).allocate(budget, sizes) == pytest.approx(np.minimum(high, caps), rel=1e-9)


def test_unimax_says_what_it_cannot_place() -> None:
    given = state(horizon=600, batch_size=10)
    with pytest.warns(UserWarning, match=r"UniMax\(4\) can place 4440 of the run's 6000 examples.*5.41 times"):
        shares = UniMax(4).initial(given)
    assert shares == pytest.approx(np.array([4000, 400, 40]) / 4440)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Cooldown(0), ValueError, "temperature must be positive"),
        (lambda: Cooldown(5, until=0), ValueError, "until must be above 0 and at most 1, got 0"),
        (lambda: Cooldown(5, until=1.5), ValueError, "until must be above 0 and at most 1, got 1.5"),
        (lambda: TwoPhase([0.5, 0.5], until=0.5), TypeError, "joint must be a fixed policy"),  # type: ignore[arg-type]
        (lambda: TwoPhase(Proportional(), until=float("nan")), ValueError, "until must be above 0"),
        (lambda: TwoPhase(Proportional(), 0.5, frequent="text"), TypeError, r"write \['text'\]"),
        (lambda: TwoPhase(Proportional(), 0.5, frequent=[]), ValueError, "at least one task"),
        (lambda: UniMax(0), ValueError, "max_epochs must be above 0"),
        (lambda: UniMax("4"), TypeError, "max_epochs must be a number, got '4'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("policy", [Cooldown(), TwoPhase(Proportional(), 0.5), UniMax(4)], ids=repr)
def test_without_a_horizon_the_sampler_is_not_built(policy: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(policy).__name__} needs the length of the run: pass horizon="):
        build(policy, horizon=None)


def test_names_are_checked_when_the_sampler_is_built() -> None:
    with pytest.raises(ValueError, match=r"TwoPhase.frequent names unknown tasks \['verse'\]; the tasks are"):
        build(TwoPhase(Proportional(), 0.5, frequent=["verse"]))
    with pytest.raises(ValueError, match="Static has 2 weights, the sampler has 4 tasks"):
        build(TwoPhase(Static([0.5, 0.5]), 0.5))
