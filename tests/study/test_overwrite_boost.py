"""The default policy's control loop, on reports made up of the three fields that it reads."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from taskgrad.sampling.policies import OverwriteBoost, PolicyState
from taskgrad.sampling.policies.overwrite_boost import FLOOR, PATIENCE, RESTORED, SIGNIFICANT, TRIAL, WAIT

TASKS = ("common", "learner", "noise")
NATURAL = np.array([0.98, 0.01, 0.01])


def state(memory: dict[str, Any], natural: np.ndarray[Any, Any] = NATURAL) -> PolicyState:
    ones = np.ones(3)
    return PolicyState(
        tasks=TASKS,
        sizes=np.array([98, 1, 1]),
        natural=natural,
        importance=ones,
        critical=np.zeros(3, dtype=bool),
        batch_size=64,
        horizon=None,
        lr=None,
        step=0,
        budget=0.04,
        realised=natural,
        epochs=ones,
        weights=natural,
        eval_losses=None,
        memory=memory,
    )


def report(loss: list[float] | None, effect: list[float], examples: tuple[int, ...] = (62, 1, 1)) -> SimpleNamespace:
    return SimpleNamespace(
        examples=np.array(examples),
        loss=None if loss is None else np.array(loss),
        predicted_effect=np.array(effect),
    )


def drive(memory: dict[str, Any], trials: float, learner: float = -0.01, slope: float = 1e-3) -> Any:
    """Parts after that many trials: the learner's loss falls by `slope` per step from where it was, noise's stays."""
    rng = np.random.default_rng(len(memory))
    policy = OverwriteBoost()
    weights = policy.initial(state(memory))
    level = memory.pop("level", 3.0)
    for _ in range(round(trials * TRIAL)):
        level -= slope
        losses = [1.0, level + 0.05 * rng.normal(), 0.7 + 0.05 * rng.normal()]
        weights = policy.weights(
            report(losses, [0.0, learner + 0.01 * rng.normal(), 0.01 * rng.normal()]), state(memory)
        )
        assert weights.min() >= 0 and weights.sum() <= 1 + 1e-9
    memory["level"] = level
    return weights


def test_starts_with_equal_parts_for_the_rare_tasks() -> None:
    assert OverwriteBoost().initial(state({})).tolist() == [0.0, 0.5, 0.5]
    assert OverwriteBoost().initial(state({}, np.full(3, 1 / 3))).sum() == 0


def test_a_learner_gets_what_noise_releases() -> None:
    assert drive({}, 2 + PATIENCE + 3)[1:] == pytest.approx([1 - FLOOR / 2, FLOOR / 2])


def test_nothing_is_withheld_before_there_was_time_to_show_progress() -> None:
    assert drive({}, PATIENCE + 1)[1:] == pytest.approx([0.5, 0.5])


def test_without_a_gradient_that_asks_the_budget_shrinks() -> None:
    weights = drive({}, 2 + PATIENCE + 3, learner=0.0)
    assert weights[1:] == pytest.approx([0.5, FLOOR / 2])


def test_a_mastered_task_releases_its_part_and_the_budget_shrinks_to_the_floor() -> None:
    memory: dict[str, Any] = {}
    drive(memory, 5)
    assert drive(memory, PATIENCE + 4, slope=0.0)[1:] == pytest.approx([FLOOR / 2, FLOOR / 2])


def test_probes_come_after_waits_that_double() -> None:
    policy, memory = OverwriteBoost(), {}
    flat = report([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    parts = [policy.weights(flat, state(memory))[1] for _ in range((PATIENCE + 3 * WAIT + 12) * TRIAL)]
    blocks = np.array(parts[TRIAL - 1 :: TRIAL])
    probes = np.flatnonzero((blocks[1:] == 0.5) & (blocks[:-1] < 0.5)) + 1
    assert np.diff(probes).tolist() == [PATIENCE + 2 * WAIT]


def test_relearning_what_was_lost_is_no_gain() -> None:
    policy, memory = OverwriteBoost(), {}
    weights = np.zeros(3)
    for block, level in enumerate([2.0, 1.0, 0.5, 0.9, 0.8, 0.7, 0.6, 0.55]):
        for k in range(TRIAL):
            losses = [1.0, level + 0.01 * (-1) ** k, 0.7]
            weights = policy.weights(report(losses, [0.0, -0.1, 0.0]), state(memory))
        assert (weights[1] >= 0.5) == (block < 2 + PATIENCE)
    assert weights[1] == pytest.approx(FLOOR / 2)


@pytest.mark.parametrize("backed_off", [False, True])
def test_a_part_is_given_back_on_stronger_evidence_than_it_is_kept(backed_off: bool) -> None:
    """A drop between the two thresholds keeps a whole part, and does not restore a cut one."""
    memory: dict[str, Any] = {}
    drive(memory, PATIENCE + 6 if backed_off else 2)
    kept = memory["noise"]
    assert (kept["part"] < 1.0) == backed_off
    misses = kept["misses"]
    # two levels of equal spread: the trial's mean, its variance and the threshold are known exactly
    spread, drop = 0.05, (SIGNIFICANT + RESTORED) / 2
    error = (spread**2 / TRIAL + kept["best_variance"]) ** 0.5
    for n in range(TRIAL):
        loss = kept["best"] - drop * error + (spread if n % 2 else -spread)
        OverwriteBoost().weights(report([1.0, 1.0, loss], [0.0, 0.0, 0.0]), state(memory))
    assert kept["misses"] == (misses + 1 if backed_off else 0)
    assert (kept["part"] < 1.0) == backed_off


def test_without_losses_nothing_is_withheld() -> None:
    policy, memory = OverwriteBoost(), {}
    for _ in range(10 * TRIAL):
        weights = policy.weights(report(None, [0.0, -0.1, 0.0]), state(memory))
    assert weights.tolist() == [0.0, 0.5, 0.5]


def test_absent_tasks_and_unknown_values_change_nothing() -> None:
    policy, memory = OverwriteBoost(), {}
    nan = float("nan")
    policy.weights(report([1.0, nan, nan], [nan, nan, nan], examples=(64, 0, 0)), state(memory))
    assert memory["learner"]["count"] == 0 and memory["learner"]["weight"] == 0


def test_memory_is_plain_data() -> None:
    memory: dict[str, Any] = {}
    drive(memory, 4)
    copy = json.loads(json.dumps(memory))
    assert copy == memory
    assert drive(copy, 0.5).tolist() == drive(memory, 0.5).tolist()
