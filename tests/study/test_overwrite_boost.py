"""The default policy's rules, on reports made up of the four fields that it reads."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.policies import OverwriteBoost, PolicyState
from taskgrad.sampling.policies.overwrite_boost import (
    CAP,
    FLOOR,
    GROWTH,
    LIFT,
    PATIENCE,
    RESTORED,
    SIGNIFICANT,
    TRIAL,
    WINDOW,
)

TASKS = ("common", "first", "second")
NATURAL = np.array([0.98, 0.01, 0.01])
ONES = (1.0, 1.0, 1.0)


def state(
    memory: dict[str, Any], natural: Any = NATURAL, importance: Any = ONES, critical: tuple[str, ...] = ()
) -> PolicyState:
    ones = np.ones(3)
    return PolicyState(
        tasks=TASKS,
        sizes=np.array([98, 1, 1]),
        natural=np.asarray(natural),
        importance=np.asarray(importance, dtype=np.float64),
        critical=np.array([task in critical for task in TASKS]),
        batch_size=64,
        horizon=None,
        lr=None,
        step=0,
        budget=0.04,
        realised=NATURAL,
        epochs=ones,
        weights=NATURAL,
        eval_losses=None,
        memory=memory,
    )


def report(
    loss: Any = None, norm: Any = ONES, signal: Any = (0.0, 0.0, 0.0), examples: Any = (62, 1, 1)
) -> SimpleNamespace:
    return SimpleNamespace(
        examples=np.array(examples),
        norm=np.array(norm, dtype=np.float64),
        signal=np.array(signal, dtype=np.float64),
        loss=None if loss is None else np.array(loss, dtype=np.float64),
    )


def repeat(memory: dict[str, Any], times: int, given_report: SimpleNamespace, **surroundings: Any) -> Any:
    weights = np.zeros(3)
    for _ in range(times):
        weights = OverwriteBoost().weights(given_report, state(memory, **surroundings))
    return weights


def descend(memory: dict[str, Any], times: int, start: float, slope: float, **surroundings: Any) -> list[Any]:
    """Weights at every step while the first task's loss falls by `slope` per step and the second's stays."""
    return [
        OverwriteBoost().weights(report([1.0, start - slope * k, 0.7]), state(memory, **surroundings))
        for k in range(times)
    ]


def test_starts_with_equal_parts_for_the_rare_tasks() -> None:
    assert OverwriteBoost().initial(state({})).tolist() == [0.0, 0.5, 0.5]


def test_without_rare_tasks_all_stays_with_the_natural_mix() -> None:
    even = np.full(3, 1 / 3)
    assert OverwriteBoost().initial(state({}, even)).sum() == 0
    assert repeat({}, 2, report(), natural=even).sum() == 0


def test_parts_scale_with_importance() -> None:
    assert OverwriteBoost().initial(state({}, importance=(1, 3, 1))).tolist() == [0.0, 0.75, 0.25]
    assert repeat({}, 3, report(), importance=(1, 3, 1)) == pytest.approx([0.0, 0.75, 0.25])


def test_a_mastered_task_is_released_by_its_gradients_alone_and_raised_again_when_they_come_back() -> None:
    memory: dict[str, Any] = {}
    assert repeat(memory, WINDOW, report()) == pytest.approx([0, 0.5, 0.5])
    released = repeat(memory, 5 * WINDOW, report(norm=(1, 0.05, 1)))
    assert released[1] == pytest.approx(FLOOR / 2, abs=0.01)
    assert released[2] == pytest.approx(1 - FLOOR / 2, abs=0.01)
    assert repeat(memory, 5 * WINDOW, report()) == pytest.approx([0, 0.5, 0.5], abs=0.01)


def test_the_budget_shrinks_when_all_is_mastered() -> None:
    memory: dict[str, Any] = {}
    repeat(memory, WINDOW, report())
    weights = repeat(memory, 8 * WINDOW, report(norm=(1, 0.05, 0.05)))
    assert FLOOR <= weights.sum() < FLOOR + 2 * CAP / 2 * 0.01


def test_the_scale_of_a_task_s_gradients_does_not_matter() -> None:
    weights = []
    for scale in (1.0, 1e3):
        memory: dict[str, Any] = {}
        repeat(memory, WINDOW, report(norm=(1, scale, 1)))
        weights.append(repeat(memory, WINDOW, report(norm=(1, 0.7 * scale, 0.9))))
    assert weights[0] == pytest.approx(weights[1])


def test_more_examples_with_a_smaller_mean_gradient_are_the_same_need() -> None:
    memory: dict[str, Any] = {}
    repeat(memory, WINDOW, report())
    assert repeat(memory, WINDOW, report(norm=(1, 0.5, 1), examples=(62, 4, 1))) == pytest.approx([0, 0.5, 0.5])


def test_a_task_whose_gradients_agree_with_their_memory_is_lifted() -> None:
    memory: dict[str, Any] = {}
    for k in range(WINDOW):
        weights = OverwriteBoost().weights(report(signal=(0, 1 + 0.1 * (-1) ** k, (-1) ** k)), state(memory))
    shared = 1 - FLOOR
    expected = [0.0, FLOOR / 2 + shared * LIFT / (1 + LIFT), FLOOR / 2 + shared / (1 + LIFT)]
    assert weights == pytest.approx(expected)


def test_a_rising_loss_raises_nothing() -> None:
    memory: dict[str, Any] = {}
    for k in range(3 * TRIAL):
        weights = OverwriteBoost().weights(report([1.0, 0.7 + 0.01 * k, 0.7]), state(memory))
        assert weights == pytest.approx([0, 0.5, 0.5])


def test_nothing_is_withheld_before_there_was_time_to_show_progress() -> None:
    assert repeat({}, (2 + PATIENCE) * TRIAL - 1, report([1.0, 0.7, 0.7])) == pytest.approx([0, 0.5, 0.5])


def test_a_task_that_makes_progress_gets_what_a_stalled_one_releases() -> None:
    weights = descend({}, (2 + PATIENCE) * TRIAL, start=3.0, slope=1e-4)[-1]
    assert weights == pytest.approx([0, 1 - FLOOR / 2, FLOOR / 2])


def test_losses_only_withhold_so_where_both_stall_the_budget_shrinks() -> None:
    assert repeat({}, (2 + PATIENCE) * TRIAL, report([1.0, 0.7, 0.7])) == pytest.approx([0, FLOOR / 2, FLOOR / 2])


def test_phases_and_rests_grow_with_the_run() -> None:
    memory: dict[str, Any] = {}
    parts = [w[2] for w in descend(memory, 2400, start=3.0, slope=1e-4)]
    rests = np.array([part == pytest.approx(FLOOR / 2) for part in parts])
    turns = (np.flatnonzero(rests[1:] != rests[:-1]) + 2).tolist()
    first = (2 + PATIENCE) * TRIAL
    on_again = int(1.5 * first)
    off_again = int(GROWTH * on_again)
    assert turns == [first, on_again, off_again, int(1.5 * off_again)]


def test_a_probe_is_trusted_less_than_a_task_with_progress() -> None:
    parts = descend({}, int(1.5 * (2 + PATIENCE) * TRIAL) + 1, start=3.0, slope=1e-4)[-1]
    assert FLOOR / 2 < parts[2] < parts[1] / 2


def test_a_learner_by_its_gradients_does_not_rest() -> None:
    signal = (0.0, 0.0, 1.0)
    memory: dict[str, Any] = {}
    for k in range((3 + PATIENCE) * TRIAL):
        wobble = (0.0, 0.0, 0.1 * (-1) ** k)
        weights = OverwriteBoost().weights(report([1.0, 0.7, 0.7], signal=np.add(signal, wobble)), state(memory))
    assert weights == pytest.approx([0, FLOOR / 2, 1 - FLOOR / 2])


def test_relearning_what_was_lost_is_no_gain() -> None:
    memory: dict[str, Any] = {}
    for level in (2.0, 1.0, 0.5):
        repeat(memory, TRIAL, report([1.0, level, 0.7]))
    assert memory["first"]["progress"] == 3 * TRIAL
    for level in (0.9, 0.8, 0.7, 0.6, 0.55):
        repeat(memory, TRIAL, report([1.0, level, 0.7]))
    assert memory["first"]["progress"] == 3 * TRIAL


@pytest.mark.parametrize("stalled", [False, True])
def test_progress_after_a_stall_needs_stronger_evidence(stalled: bool) -> None:
    """A drop between the two thresholds counts while a task is trusted, and not once it stalled."""
    memory: dict[str, Any] = {}
    spread, drop = 0.05, (SIGNIFICANT + RESTORED) / 2

    def trial(level: float) -> None:
        for n in range(TRIAL):
            loss = level + (spread if n % 2 else -spread)
            OverwriteBoost().weights(report([1.0, loss, 0.7]), state(memory))

    for _ in range(3 + PATIENCE if stalled else 2):
        trial(1.0)
    kept = memory["first"]
    before = kept["progress"]
    trial(kept["best"] - drop * (spread**2 / TRIAL + kept["best_variance"]) ** 0.5)
    assert (kept["progress"] == before) == stalled


def test_a_critical_task_never_falls_below_an_equal_part() -> None:
    for weights in descend({}, 1000, start=3.0, slope=1e-3, critical=("second",)):
        assert weights[2] >= 0.5 - 1e-9


def test_without_losses_nothing_is_withheld() -> None:
    assert repeat({}, 10 * TRIAL, report()) == pytest.approx([0, 0.5, 0.5])


def test_absent_tasks_and_unknown_values_change_nothing() -> None:
    memory: dict[str, Any] = {}
    nan = float("nan")
    absent = report([1.0, nan, nan], norm=(1, nan, nan), signal=(0, nan, nan), examples=(64, 0, 0))
    assert repeat(memory, 3, absent) == pytest.approx([0, 0.5, 0.5])
    assert memory["first"]["seen"] == 0 and memory["first"]["weight"] == 0


def test_memory_is_plain_data() -> None:
    memory: dict[str, Any] = {}
    descend(memory, 4 * TRIAL + 7, start=3.0, slope=1e-3)
    copy = json.loads(json.dumps(memory))
    assert copy == memory
    assert repeat(copy, 50, report([1.0, 2.0, 0.7])).tolist() == repeat(memory, 50, report([1.0, 2.0, 0.7])).tolist()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    importance=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    critical=st.sets(st.sampled_from(TASKS)),
)
def test_parts_are_a_distribution_above_the_floor(seed: int, importance: list[float], critical: set[str]) -> None:
    rng = np.random.default_rng(seed)
    memory: dict[str, Any] = {}
    for k in range(700):
        scale = np.exp(-0.01 * k * rng.random(3))
        drawn = report(rng.random(3) * scale, rng.random(3) * scale, rng.normal(size=3) + 0.2, rng.integers(0, 3, 3))
        now = state(memory, importance=importance, critical=tuple(critical))
        weights = OverwriteBoost().weights(drawn, now)
        assert weights.min() >= 0 and weights.sum() <= 1 + 1e-9
        assert (weights >= FLOOR * OverwriteBoost().initial(now) - 1e-12).all()
