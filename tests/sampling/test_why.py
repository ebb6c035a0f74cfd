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
from tests.sampling.helpers import NAMES, SIZES, TASK_OF_EXAMPLE, Report
from tests.sampling.policies.helpers import report


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


def test_overwrite_boost_in_a_sampler_names_the_task_that_stops_learning() -> None:
    sampler = AdaptiveBatchSampler(
        dict(zip(NAMES, SIZES, strict=True)), 20, OverwriteBoost(fresh=True), update_every=1, delay=0, num_batches=2000
    )
    for step, batch in enumerate(sampler):
        counts = np.bincount(np.searchsorted(np.cumsum(SIZES), batch, side="right"), minlength=4)
        has = np.where(counts > 0, 1.0, np.nan)
        gone = 0.01 if step > 1000 else 1.0
        columns = {"norm": has * [1, 1, gone, 1], "loss": has * [1, 1, gone, 1]}
        nan = np.full(4, np.nan)
        given = report(step + 1, examples=counts, overwrite=nan, overwrite_se=nan, **columns)
        given.tasks = NAMES
        sampler.update(given)
    whys = [entry.why for entry in sampler.ledger]
    left = [int(found[1]) for why in whys if (found := re.search(r"legal: (\d+) % left.*: down to", why))]
    assert len(left) > 3 and left[0] > 70 and min(left) < 40
    assert any(re.search(r"legal: done \(need 0\.\d+\): down to", why) for why in whys)
    assert all(why and why.isprintable() and len(why) <= 120 for why in whys)
