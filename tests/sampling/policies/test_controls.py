"""Controls: Replay and Shuffled."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from taskgrad.sampling import AdaptiveBatchSampler, Ledger
from taskgrad.sampling.policies import Cooldown, DoGE, OverwriteBoost, PiKE, Policy, Replay, Shuffled, Static
from tests.sampling.helpers import NAMES, SIZES, TASK_OF_EXAMPLE, Report, Restless, trained
from tests.sampling.policies.helpers import report, state


def build(policy: Any, **options: Any) -> AdaptiveBatchSampler:
    options = {"batch_size": 20, "tasks": NAMES, "update_every": 3, "delay": 1, "num_batches": 50, **options}
    return AdaptiveBatchSampler(TASK_OF_EXAMPLE, policy=policy, **options)


def test_replay_is_the_average_of_the_mixes_that_were_in_force() -> None:
    adaptive = build(Restless(), budget=0.4)
    in_force = []
    for j, _ in enumerate(islice(adaptive, 31)):
        in_force.append(adaptive.ledger.at(j).weights / 2**40)
        adaptive.update(Report(step=j + 1))
    expected = np.mean(in_force, axis=0)
    for policy in (
        Replay(adaptive.state_dict()),
        Replay(adaptive.ledger, batches=31),
        Replay(adaptive.ledger.to_dict(), batches=31),
    ):
        sampler = build(policy)
        assert sampler.weights == pytest.approx(expected)
        list(trained(sampler, sampler))
        assert len(sampler.ledger) == 1


def test_replay_knows_its_data_and_tasks() -> None:
    saved = build(Restless()).state_dict(consumed=0)
    with pytest.raises(ValueError, match="batches must be at least 1, got 0"):
        Replay(saved)
    saved["consumed"] = 5
    grown = np.append(TASK_OF_EXAMPLE, [3])
    with pytest.raises(ValueError, match=r"sizes \[700, 120, 30, 11\], the sampler's tasks have \[700, 120, 30, 12\]"):
        AdaptiveBatchSampler(grown, policy=Replay(saved), tasks=NAMES)
    with pytest.raises(ValueError, match=r"ledger of the tasks \['text', 'code', 'legal', 'poetry'\], the sampler has"):
        build(Replay(saved), tasks=("text", "code", "poetry", "legal"))
    build(Replay(saved), tasks=None)


def test_replay_takes_ledgers_only() -> None:
    with pytest.raises(ValueError, match="does not say how many batches were drawn: pass batches"):
        Replay(build(Restless()).ledger)
    for wrong in ({"weights": [1]}, [0.5, 0.5], None):
        with pytest.raises(TypeError, match="source must be a sampler's state_dict"):
            Replay(wrong)  # type: ignore[arg-type]
    broken = build(Restless()).ledger.to_dict()
    broken["sizes"] = broken["sizes"][::-1]
    with pytest.raises(ValueError, match="does not match its checksum"):
        Replay(broken, batches=4)
    later = Ledger(SIZES, start=10)
    with pytest.raises(ValueError, match="batches must be at least 11, got 10"):
        Replay(later, batches=10)


@pytest.mark.parametrize(
    "sizes", [(700, 120, 30, 11), (500, 500, 5, 4, 3, 2), (10, 10, 10), (90, 5, 5), (40, 25, 25, 10), (7,)]
)
def test_shuffled_permutes_within_rare_and_within_frequent_tasks(sizes: tuple[int, ...]) -> None:
    tasks = tuple("abcdefg"[: len(sizes)])
    rare = np.array(sizes) / sum(sizes) < 1 / len(sizes)
    seen = set()
    for seed in range(30):
        given = state(sizes, tasks)
        receivers = Shuffled(Static([1.0]), seed).receivers(given)
        assert sorted(receivers) == list(range(len(sizes)))
        assert (rare[receivers] == rare).all()
        for group in (rare, ~rare):
            moved = receivers[group] != np.flatnonzero(group)
            assert moved.all() if group.sum() > 1 else not moved.any()
        assert Shuffled(Static([1.0]), seed).receivers(given).tolist() == receivers.tolist()
        seen.add(tuple(receivers))
    assert len(seen) > 1 or max(rare.sum(), (~rare).sum()) < 3


def test_shuffled_hands_weights_over() -> None:
    asked = [0.4, 0.3, 0.2, 0.1]
    sampler = build(Shuffled(Static(asked), seed=3))
    assert sampler.weights[0] == pytest.approx(0.4)  # the only frequent task
    assert sorted(sampler.weights) == pytest.approx(sorted(asked))
    assert all(got != pytest.approx(want) for got, want in zip(sampler.weights[1:], asked[1:], strict=True))


def test_shuffled_keeps_the_inner_policys_memory_guards_and_schedule() -> None:
    inner, shuffled = PiKE(1, 1, every=2), Shuffled(PiKE(1, 1, every=2), seed=1)
    memories: list[dict[str, Any]] = [{}, {}]
    rng = np.random.default_rng(0)
    for step in range(6):
        given = report(signal=rng.normal(size=4), norm=rng.random(4), examples=rng.integers(1, 5, 4))
        states = [state(SIZES, NAMES, memory=memory, step=step) for memory in memories]
        plain, mixed = inner.weights(given, states[0]), shuffled.weights(given, states[1])
        assert mixed[shuffled.receivers(states[1])].tolist() == plain.tolist()
        assert memories[0] == memories[1]
    assert Shuffled(OverwriteBoost()).guard_defaults == OverwriteBoost.guard_defaults
    assert (
        build(Shuffled(OverwriteBoost())).state_dict()["settings"]["budget"] == OverwriteBoost.guard_defaults["budget"]
    )
    scheduled = build(Shuffled(Cooldown(5, until=0.5)), horizon=60)
    assert [entry.effective_at for entry in scheduled.ledger] == [0, 30]
    assert not Shuffled(Static([1.0])).adaptive and Shuffled(inner).adaptive


def test_a_state_of_another_inner_policy_is_refused() -> None:
    saved = build(Shuffled(PiKE(1, 1))).state_dict()
    build(Shuffled(PiKE(2, 1))).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"policy: saved 'Shuffled\(PiKE\)', here 'Shuffled\(DoGE\)'"):
        build(Shuffled(DoGE())).load_state_dict(saved)


def test_shuffled_leaves_the_rest_with_the_natural_mix_and_takes_any_policy() -> None:
    class Plain:
        def weights(self, report: Any, state: Any) -> list[float]:
            return [0.0, 0.5, 0.0, 0.0]

    policy = Shuffled(Plain())
    assert policy.initial(state(SIZES, NAMES))[0] == pytest.approx(700 / 861)
    assert policy.weights(None, state(SIZES, NAMES)).sum() == 0.5
    assert policy.changes(state()) == () and policy.adaptive and policy.guard_defaults == {}
    for wrong in (Policy, "uniform", None):
        with pytest.raises(TypeError, match="policy must be an object with a method weights"):
            Shuffled(wrong)
