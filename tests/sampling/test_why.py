"""What the ledger says of the reasons: in the policy's words, or else which shares moved."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.arrays import FloatArray
from taskgrad.sampling.policies import Cooldown, OverwriteBoost, Policy, PolicyState, Proportional, Shuffled, Uniform
from taskgrad.sampling.policies.overwrite_boost import PATIENCE, TRIAL, WINDOW
from tests.sampling.helpers import NAMES, SIZES, TASK_OF_EXAMPLE, Report
from tests.sampling.policies.helpers import report, state


class Alternating(Policy):
    """Says what it is told to say, and remembers what it was asked about."""

    def __init__(self, says: Any) -> None:
        self.says = says
        self.asked: list[PolicyState] = []

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        state.memory["reports"] = state.memory.get("reports", 0) + 1
        return np.array([0.4, 0.3, 0.2, 0.1]) if report.step % 2 else np.full(4, 0.25)

    def why(self, state: PolicyState) -> str:
        self.asked.append(replace(state, memory=dict(state.memory)))
        return self.says  # type: ignore[no-any-return]


def build(policy: Any, **options: Any) -> AdaptiveBatchSampler:
    options = {"tasks": NAMES, "update_every": 1, "delay": 0, **options}
    return AdaptiveBatchSampler(TASK_OF_EXAMPLE, 20, policy, **options)


def run(sampler: AdaptiveBatchSampler, steps: int) -> None:
    """So many batches with a report after each, and one more, before which the last decision is entered."""
    batches = iter(sampler)
    for step in range(1, steps + 1):
        next(batches)
        sampler.update(Report(step=step))
    next(batches)


def test_the_policys_words_and_what_it_is_asked() -> None:
    policy = Alternating("code is next")
    sampler = build(policy)
    run(sampler, 3)
    assert [entry.why for entry in sampler.ledger] == ["the natural mix", *["code is next"] * 3]
    for n, asked in enumerate(policy.asked):
        before, after = sampler.ledger[n].weights / 2**40, sampler.ledger[n + 1].weights / 2**40
        assert asked.proposed is not None and not asked.proposed.flags.writeable and not asked.weights.flags.writeable
        assert asked.weights.tolist() == before.tolist() and asked.proposed.tolist() == after.tolist()
        assert asked.memory == {"reports": n + 1} and asked.step == n


def test_a_policy_is_not_asked_about_no_change() -> None:
    class Noisy(Alternating):
        def weights(self, report: Any, state: PolicyState) -> FloatArray:
            shares = np.array([0.4, 0.3, 0.2, 0.1]) * (1 + 0.001 * np.random.default_rng(report.step).random(4))
            return np.asarray(shares / shares.sum())

    policy = Noisy("x")
    sampler = build(policy)
    run(sampler, 6)
    assert len(sampler.ledger) == 2 == len(policy.asked) + 1


@pytest.mark.parametrize("policy", [Alternating(""), Shuffled(Alternating("code is next"))])
def test_without_words_the_sampler_says_what_moved(policy: Any) -> None:
    sampler = build(policy)
    run(sampler, 2)
    first, second = list(sampler.ledger)[1:3]
    before, after = first.weights / 2**40, second.weights / 2**40
    t = int(np.abs(after - before).argmax())
    verb = "raised" if after[t] > before[t] else "lowered"
    assert second.why.startswith(f"{verb} {NAMES[t]} {before[t]:.3g} -> {after[t]:.3g}, ")
    assert second.why.endswith("1 more") and len(second.why) <= 120


def test_words_are_cut_and_made_printable() -> None:
    sampler = build(Alternating("two\nlines\x1b[31m " + "x" * 500))
    run(sampler, 2)
    assert sampler.ledger[1].why.startswith("two\\nlines\\x1b[31m xxx") and len(sampler.ledger[1].why) == 120


@pytest.mark.parametrize("says", [None, 3, ["words"]])
def test_words_must_be_text(says: Any) -> None:
    sampler = build(Alternating(says))
    with pytest.raises(TypeError, match=r"Alternating\.why must return text, got"):
        run(sampler, 1)


def test_a_policy_of_ones_own_needs_no_words() -> None:
    class Plain:
        def weights(self, report: Any, state: PolicyState) -> FloatArray:
            return np.full(4, 0.25)

    sampler = build(Plain())
    run(sampler, 2)
    assert sampler.ledger[1].why.startswith("lowered text ")


def test_fixed_mixes_and_schedules_say_what_moves() -> None:
    assert build(Uniform()).ledger[0].why.startswith("lowered text 0.813 -> 0.25, raised poetry 0.0128 -> 0.25")
    ledger = build(Cooldown(5, until=0.5), horizon=40).ledger
    assert [entry.cause for entry in ledger] == ["initial", "schedule"]
    assert (
        ledger[1].why.startswith("raised text ")
        and ledger[1].weights.tolist() == build(Proportional()).ledger[0].weights.tolist()
    )


def test_words_of_a_decision_that_waits_are_saved() -> None:
    sampler = build(Alternating("code is next"), update_every=10, delay=3)
    list(itertools.islice(sampler, 5))
    sampler.update(Report(step=1), batch=4)
    assert len(sampler.ledger) == 1
    resumed = build(Alternating("other words"), update_every=10, delay=3)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    list(resumed)
    assert resumed.ledger[1].why == "code is next"


def test_it_is_asked_for_the_last_word_on_a_batch_only() -> None:
    policy = Alternating("code is next")
    sampler = build(policy, update_every=9, delay=3)
    run(sampler, 25)
    assert [state.step for state in policy.asked] == [5, 14, 23]
    assert [entry.why for entry in sampler.ledger][1:] == ["code is next"] * 3


def test_overwrite_boost_says_what_it_knows() -> None:
    tasks = ("text", "math", "noise", "code", "new\n")
    policy, memory = OverwriteBoost(), {}
    surroundings = state((10_000, 100, 100, 100, 100), tasks, memory=memory, budget=0.05)
    rng = np.random.default_rng(0)
    for step in range(4 * WINDOW + 10 * PATIENCE * TRIAL):
        late = step > 4 * WINDOW
        norm = [1.0, 1.0, 1.0, 0.1 if late else 1.0, np.nan]
        signal = [0.0, 0.5 + 0.1 * rng.standard_normal(), *rng.standard_normal(2), np.nan]
        loss = [1.0, 2.0 / (1 + step / 500), 2.0 + 0.1 * rng.standard_normal(), 0.05 if late else 1.0, np.nan]
        given = report(step, examples=[60, 1, 1, 1, 0], norm=norm, signal=signal, loss=loss)
        policy.weights(given, replace(surroundings, step=step))
    before = np.array([0.95, 0.0125, 0.0125, 0.0125, 0.0125])
    after = np.array([0.95, 0.030, 0.004, 0.002, 0.014])
    seen = dict(memory)
    why = policy.why(replace(surroundings, weights=before, proposed=after))
    missed = memory["noise"]["seen"] - memory["noise"]["progress"]
    assert f"lowered noise (no progress in {missed} appearances)" in why and missed > 300
    assert "released code (mastered)" in why and "raised math (learns)" in why and why.endswith(" and 1 more")
    assert memory == seen and len(why) <= 120
    only = np.array([0.9485, 0.0125, 0.0125, 0.0125, 0.014])
    assert policy.why(replace(surroundings, weights=before, proposed=only)) == "raised new\\n (100% left to learn)"
    frequent = np.array([0.94, 0.0125, 0.0125, 0.0125, 0.0125])
    assert policy.why(replace(surroundings, weights=before, proposed=frequent)) == ""
    fresh = replace(surroundings, memory={}, weights=before, proposed=only)
    assert policy.why(fresh) == "raised new\\n"


def test_overwrite_boost_in_a_sampler_names_the_task_that_stops_learning() -> None:
    sampler = AdaptiveBatchSampler(dict(zip(NAMES, SIZES, strict=True)), 20, update_every=1, delay=0, num_batches=2000)
    for step, batch in enumerate(sampler):
        counts = np.bincount(np.searchsorted(np.cumsum(SIZES), batch, side="right"), minlength=4)
        has = np.where(counts > 0, 1.0, np.nan)
        gone = 0.05 if step > 1000 else 1.0
        columns = {"norm": has * [1, 1, gone, 1], "signal": has * [0, 1, 1, 1], "loss": has * [1, 1, gone, 1]}
        given = report(step + 1, examples=counts, **columns)
        given.tasks = NAMES
        sampler.update(given)
    whys = [entry.why for entry in sampler.ledger]
    left = [int(found[1]) for why in whys if (found := re.search(r"lowered legal \((\d+)% left to learn\)", why))]
    assert len(left) > 10 and left[0] == 100 and min(left) < 40
    assert all(why and why.isprintable() and len(why) <= 120 for why in whys)
