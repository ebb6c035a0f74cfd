from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from taskgrad.sampling import AdaptiveBatchSampler, AdaptiveSampler
from taskgrad.sampling.arrays import FloatArray
from taskgrad.sampling.policies import OverwriteBoost, Policy, PolicyState, Proportional, Static, Uniform
from tests.sampling.helpers import NAMES, SIZES, TASK_OF_EXAMPLE, Report, Restless, trained

TOTAL = len(TASK_OF_EXAMPLE)


def build(policy: Any = None, **options: Any) -> AdaptiveBatchSampler:
    options = {"batch_size": 20, "tasks": NAMES, "update_every": 1, "delay": 0, **options}
    return AdaptiveBatchSampler(TASK_OF_EXAMPLE, policy=Restless() if policy is None else policy, **options)


class Steps(Policy):
    """Uniform from the report of step 2 on; keeps what it was given."""

    def __init__(self) -> None:
        self.states: list[PolicyState] = []

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        self.states.append(state)
        return np.full(4, 0.25) if report.step >= 2 else state.natural


def test_an_epoch_of_the_natural_mix_covers_the_data() -> None:
    sampler = build(Proportional(), batch_size=21, dataset=range(TOTAL))
    assert TOTAL % 21 == 0 and len(sampler) == TOTAL // 21
    batches = list(sampler)
    assert len(batches) == len(sampler) and {len(batch) for batch in batches} == {21}
    drawn = np.concatenate(batches)
    assert len(set(drawn.tolist())) >= TOTAL - 4  # each task is less than one example off
    assert all((np.diff(TASK_OF_EXAMPLE[batch]) >= 0).all() for batch in batches)
    assert all(type(i) is int for i in batches[0])


def test_length_and_the_attributes_that_loaders_read() -> None:
    assert len(build(batch_size=20)) == -(-TOTAL // 20)
    sampler = build(batch_size=20, num_batches=5)
    assert len(sampler) == 5 == len(list(sampler))
    assert sampler.batch_size == 20 and sampler.drop_last is True
    assert isinstance(sampler, torch.utils.data.Sampler)
    single = AdaptiveSampler(TASK_OF_EXAMPLE, 20, Uniform(), num_batches=5)
    assert len(single) == 100


def test_the_example_sampler_gives_the_same_stream() -> None:
    options: dict[str, Any] = {"policy": Restless(), "tasks": NAMES, "update_every": 3, "delay": 2, "num_batches": 30}
    batched = AdaptiveBatchSampler(TASK_OF_EXAMPLE, 20, **options)
    batches = list(trained(batched, batched))
    single = AdaptiveSampler(TASK_OF_EXAMPLE, 20, **options)
    loader = torch.utils.data.DataLoader(range(TOTAL), sampler=single, batch_size=20)  # type: ignore[arg-type]
    assert list(trained(loader, single)) == batches
    assert single.ledger.digest() == batched.ledger.digest() and len(batched.ledger) > 8


@pytest.mark.parametrize("update_every, delay", [(1, 0), (1, 3), (4, 0), (4, 2), (10, 8)])
def test_changes_take_effect_at_the_first_multiple_after_the_delay(update_every: int, delay: int) -> None:
    sampler = build(Steps(), update_every=update_every, delay=delay)
    for j, _ in enumerate(sampler):
        sampler.update(Report(step=j + 1))
        if j == 30:
            break
    expected = next(e for e in range(100) if e % update_every == 0 and e >= 1 + 1 + delay)
    assert [entry.effective_at for entry in sampler.ledger] == [0, expected]
    last = max(j for j in range(30) if -(-(j + 1 + delay) // update_every) * update_every == expected)
    assert sampler.ledger[-1].cause == f"report on batch {last}"


def test_the_last_valid_report_before_the_change_decides() -> None:
    class Last(Policy):
        def weights(self, report: Any, state: PolicyState) -> FloatArray:
            return np.eye(4)[report.step % 4]

    sampler = build(Last(), update_every=5, delay=1)
    for j, _ in enumerate(sampler):
        sampler.update(Report(step=j + 1, valid=j != 3))
        if j == 4:
            assert sampler.ledger[-1].cause == "report on batch 2"
            assert np.array_equal(sampler.weights, np.eye(4)[3])
            break


def test_a_decision_takes_effect_though_no_report_follows() -> None:
    sampler = build(Steps(), update_every=10)
    batches = iter(sampler)
    for step in (1, 2, 3):
        next(batches)
        sampler.update(Report(step=step))
    for _ in range(8):
        next(batches)
    assert [entry.effective_at for entry in sampler.ledger] == [0, 10]


def test_a_decision_takes_effect_though_the_next_report_is_for_a_later_change() -> None:
    sampler = build(update_every=10, delay=5)
    batches = iter(sampler)
    for j in range(18):
        next(batches)
        if j % 6 == 5:
            sampler.update(Report(step=j), batch=j)
    assert [(e.effective_at, e.cause) for e in sampler.ledger][1:] == [(20, "report on batch 11")]
    assert [waiting[0] for waiting in sampler.state_dict()["waiting"]] == [30]


def test_weights_are_those_of_the_next_batch() -> None:
    sampler = build(Steps())
    batches = iter(sampler)
    for step in (1, 2):
        next(batches)
        assert sampler.weights == pytest.approx(np.array(SIZES) / TOTAL)
        sampler.update(Report(step=step))
    assert sampler.weights.tolist() == [0.25] * 4
    assert np.bincount(TASK_OF_EXAMPLE[next(batches)]).tolist() == pytest.approx([5] * 4, abs=2)


def test_what_the_policy_is_given() -> None:
    policy = Steps()
    sampler = build(policy, delay=2, horizon=500, importance={"legal": 3}, critical={"legal"}, budget=0.5)
    sampler.observe({"legal": 2.5})
    rows: list[list[int]] = []
    for j, batch in enumerate(sampler):
        rows.append(batch)
        sampler.update(Report(step=j + 1), lr=0.1)
        if j == 8:
            break
    state = policy.states[-1]
    counts = np.bincount(TASK_OF_EXAMPLE[np.concatenate(rows)], minlength=4)
    assert state.step == 8 and state.horizon == 500 and state.lr == 0.1 and state.budget == 0.5
    assert state.tasks == NAMES and state.sizes.tolist() == list(SIZES)
    assert state.importance.tolist() == [1, 1, 3, 1]
    assert state.critical.tolist() == [False, False, True, False] and not state.critical.flags.writeable
    assert state.realised == pytest.approx(counts / counts.sum())
    assert state.epochs == pytest.approx(counts / np.array(SIZES))
    assert state.eval_losses == {"legal": 2.5}
    assert policy.states[3].weights == pytest.approx(state.natural)  # uniform is in force from batch 4 on
    assert policy.states[4].weights == pytest.approx(0.5 * state.natural + 0.125)


def test_reports_that_only_count() -> None:
    policy = Steps()
    sampler = build(policy)
    batches = iter(sampler)
    for report in (None, Report(step=5, valid=False), Report(step=7), Report(step=7), None):
        next(batches)
        sampler.update(report)
    assert len(policy.states) == 1 and sampler.consumed == 5


def test_gradient_accumulation_once_per_step_or_once_per_batch() -> None:
    streams = []
    for every_batch in (True, False):
        sampler = build(delay=4)
        rows = []
        for j, batch in enumerate(sampler):
            rows.append(batch)
            closes = j % 4 == 3
            report = Report(step=(j + 1) // 4, valid=j >= 3)  # the newest complete one
            if every_batch:
                sampler.update(report)
            elif closes:
                sampler.update(report, batch=j)
            if j == 39:
                break
        assert len(sampler.ledger) == 11
        streams.append((rows, sampler.ledger.digest(), sampler.consumed))
    assert streams[0] == streams[1]


def test_update_checks_its_batch() -> None:
    sampler = build()
    with pytest.raises(ValueError, match=r"update is on batch 0, but only 0 batches were drawn.*sampler object"):
        sampler.update(Report(step=1))
    batches = iter(sampler)
    for _ in range(3):
        next(batches)
    sampler.update(None, batch=1)
    with pytest.raises(ValueError, match="batch 0, but batch 2 is the first one not yet reported"):
        sampler.update(None, batch=0)
    with pytest.raises(ValueError, match="batch 3, but only 3 batches"):
        sampler.update(None, batch=3)
    with pytest.raises(TypeError, match="batch must be an integer"):
        sampler.update(None, batch=1.5)  # type: ignore[arg-type]


def test_a_change_on_a_drawn_batch_raises_and_names_the_delay() -> None:
    sampler = build(update_every=3, delay=1)
    batches = iter(sampler)
    for _ in range(8):
        next(batches)
    with pytest.raises(
        ValueError, match=r"takes effect at batch 3, but 8 batches are already drawn: .*delay=7 or more"
    ):
        sampler.update(Report(step=1))
    assert sampler.consumed == 8 and len(sampler.ledger) == 1
    enough = build(update_every=3, delay=7)
    batches = iter(enough)
    for _ in range(8):
        next(batches)
    enough.update(Report(step=1))
    assert [waiting[0] for waiting in enough.state_dict()["waiting"]] == [9]


def test_update_once_per_step_under_accumulation_is_told() -> None:
    """What is wrong there is not the delay, and raising it would only put off the error."""
    sampler = build(update_every=1, delay=8)
    with pytest.raises(ValueError, match=r"\d+ more than were counted, where it was 3 at first.*micro-batches.*follow"):
        for j, _ in enumerate(sampler):
            if j % 4 == 3:
                sampler.update(Report(step=j))
    assert sampler.consumed == 2


def test_update_world_size_times_per_batch_is_told() -> None:
    sampler = build(delay=50)
    with pytest.raises(ValueError, match=r"update is on batch 1, but only 1 batches were drawn.*once per batch"):
        for j, _ in enumerate(sampler):
            for _ in range(2):
                sampler.update(Report(step=j))


def test_a_fixed_policy_needs_no_delay() -> None:
    sampler = build(Uniform())
    batches = iter(sampler)
    for _ in range(8):
        next(batches)
    sampler.update(Report(step=1))
    assert sampler.consumed == 1 and len(sampler.ledger) == 1
    assert sampler.ledger[0].cause == "initial" and sampler.weights.tolist() == [0.25] * 4


def test_the_report_must_be_on_the_same_tasks() -> None:
    sampler = build()
    next(iter(sampler))
    with pytest.raises(ValueError, match=r"report is on the tasks \['a', 'b'\].*same tasks in the same order"):
        sampler.update(Report(step=1, tasks=("a", "b")))
    with pytest.raises(ValueError, match="same order"):
        sampler.update(Report(step=1, tasks=NAMES[::-1]))


def test_the_report_must_be_of_the_same_tracker() -> None:
    sampler = build()
    batches = iter(sampler)
    for step in (6, 7):
        next(batches)
        sampler.update(Report(step=step))
    next(batches)
    with pytest.raises(ValueError, match=r"the report is of step 3, after one of step 7.*reports of one tracker only"):
        sampler.update(Report(step=3))
    sampler.update(Report(step=7))
    resumed = build()
    resumed.load_state_dict(sampler.state_dict())
    next(iter(resumed))
    resumed.update(Report(step=1))  # the tracker was made anew
    assert resumed.ledger[-1].cause == "report on batch 3"


@pytest.mark.parametrize("wrong", [torch.tensor(0.5), {"tasks": NAMES, "valid": True}, [0.25] * 4])
def test_something_that_is_no_report(wrong: Any) -> None:
    sampler = build()
    next(iter(sampler))
    with pytest.raises(
        TypeError, match=rf"report must be a StepReport \(tracker.report\(\)\), got {type(wrong).__name__}"
    ):
        sampler.update(wrong)


def test_probes_may_take_half_of_the_batches() -> None:
    build(probe_every=2, batch_size=4)
    with pytest.raises(ValueError, match="pass probe_every=3 or more"):
        build(probe_every=2, batch_size=3)
    build(probe_every=3, batch_size=3)


def test_loss_weight_is_natural_share_over_the_probability_of_that_batch() -> None:
    sampler = build(Steps())
    batches = iter(sampler)
    with pytest.raises(ValueError, match="batch 0 was not drawn yet: only 0 batches were drawn"):
        sampler.loss_weight(0)
    for step in range(1, 5):
        next(batches)
        sampler.update(Report(step=step))
    natural = np.array(SIZES) / TOTAL
    for batch in range(4):
        expected = np.ones(4) if batch < 2 else natural / 0.25
        assert sampler.loss_weight(batch) == pytest.approx(expected)
        assert sampler.loss_weight(batch, "legal") == sampler.loss_weight(batch, 2) == pytest.approx(expected[2])
    resumed = build(Steps())
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.loss_weight(3).tolist() == sampler.loss_weight(3).tolist()
    for arguments, error, message in (
        ((4,), ValueError, "batch 4 was not drawn yet: only 4 batches"),
        ((-1,), ValueError, "batch must be at least 0"),
        ((0, "verse"), ValueError, r"task names unknown tasks \['verse'\]"),
        ((0, 4), ValueError, r"task must be below 4, got 4; the tasks are \['text'"),
        ((0, 1.5), TypeError, "task must be an integer"),
    ):
        with pytest.raises(error, match=message):
            sampler.loss_weight(*arguments)  # type: ignore[call-overload]


def test_no_loss_weight_makes_up_for_a_probability_of_0() -> None:
    sampler = build(Static([0.5, 0.5, 0, 0]))
    next(iter(sampler))
    assert sampler.loss_weight(0, "code") == pytest.approx(120 / TOTAL / 0.5)
    with pytest.raises(ValueError, match=r"tasks \['legal', 'poetry'\] had a probability of 0 at batch 0.*min_weight"):
        sampler.loss_weight(0)
    with pytest.raises(ValueError, match=r"tasks \['poetry'\] had a probability of 0"):
        sampler.loss_weight(0, "poetry")


def test_a_sampler_without_names_takes_those_of_the_first_report() -> None:
    sampler = build(tasks=None)
    assert sampler.tasks == ("0", "1", "2", "3")
    next(iter(sampler))
    with pytest.raises(ValueError, match="the sampler has"):
        sampler.update(Report(step=1, tasks=("a", "b")))
    sampler.update(Report(step=1))
    assert sampler.tasks == NAMES == sampler.realised().tasks
    loaded = build(tasks=None)
    loaded.load_state_dict(sampler.state_dict())
    assert loaded.tasks == NAMES


def test_realised_against_intended() -> None:
    sampler = build(Static([0.4, 0.3, 0.2, 0.1]), probe_every=7)
    batches = [*list(sampler), *list(sampler)]
    realised = sampler.realised()
    counts = np.bincount(TASK_OF_EXAMPLE[np.concatenate(batches)])
    assert realised.batches == len(batches) == 2 * len(sampler)
    assert realised.examples.tolist() == counts.tolist()
    assert np.abs(realised.share - realised.intended).max() * counts.sum() < 1
    assert realised.intended == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert realised.epochs == pytest.approx(counts / np.array(SIZES))
    assert realised.probes.sum() == 0 and realised.capped == ()
    assert "poetry" in str(realised)
    assert sampler.realised(10).examples.sum() == 200
    with pytest.raises(ValueError, match="only 88 batches were drawn"):
        sampler.realised(1000)


def test_realised_shows_probes_and_caps() -> None:
    sampler = build(Static([1, 0, 0, 0]), probe_every=5, max_epochs=3, num_batches=100)
    list(sampler)
    realised = sampler.realised()
    assert (realised.probes[1:] >= 19).all()
    assert realised.share[0] < realised.intended[0] == 1
    capped = build(Uniform(), max_epochs=2, num_batches=70)
    list(capped)
    assert capped.realised().capped == ("code", "legal", "poetry")
    assert capped.realised().epochs[1:].tolist() == [2, 2, 2]
    assert "capped" in str(capped.realised())


def test_guards_of_the_policy_are_defaults() -> None:
    class Cautious(Steps):
        guard_defaults = {"budget": 0.25, "min_weight": 0.05}  # noqa: RUF012

    sampler = build(Cautious())
    assert sampler.weights.min() == pytest.approx(0.05)
    assert sampler.ledger[0].bound == ("min_weight",)
    assert build(Cautious(), min_weight=0).weights == pytest.approx(np.array(SIZES) / TOTAL)

    class Wrong(Steps):
        guard_defaults = {"budgt": 0.25}  # noqa: RUF012

    with pytest.raises(ValueError, match=r"Wrong.guard_defaults names \['budgt'\]"):
        build(Wrong())


def test_any_object_with_weights_is_a_policy() -> None:
    class Plain:
        def weights(self, report: Any, state: PolicyState) -> list[float]:
            return [0.25] * 4

    sampler = build(Plain())
    next(iter(sampler))
    sampler.update(Report(step=1))
    assert sampler.weights.tolist() == [0.25] * 4


def test_the_default_policy() -> None:
    assert isinstance(AdaptiveBatchSampler(TASK_OF_EXAMPLE).policy, OverwriteBoost)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"policy": Uniform}, TypeError, "policy must be an object with a method weights"),
        ({"policy": "uniform"}, TypeError, "policy must be an object"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"update_every": 0}, ValueError, "update_every must be at least 1"),
        ({"num_replicas": 2}, TypeError, "pass num_replicas and rank together"),
        ({"rank": 0}, TypeError, "pass num_replicas and rank together"),
        ({"num_replicas": 2, "rank": 2}, ValueError, "rank must be below num_replicas, 2, got 2"),
        ({"num_replicas": 0, "rank": 0}, ValueError, "num_replicas must be at least 1"),
        ({"shares": {"text": 1}}, TypeError, "pass task_of_example.*or, for a stream .* shares="),
        ({"delay": -1}, ValueError, "delay must be at least 0"),
        ({"num_batches": 0}, ValueError, "num_batches must be at least 1"),
        ({"horizon": 0}, ValueError, "horizon must be at least 1"),
        ({"resume": "maybe"}, ValueError, "resume must be 'seek' or 'replay'"),
        ({"budget": "much"}, TypeError, "budget must be a number"),
        ({"budget": 0}, ValueError, "budget must be a share"),
        ({"min_weight": 0.3}, ValueError, "min_weight sums to 1.2"),
        ({"min_weight": {"verse": 0.3}}, ValueError, r"min_weight names unknown tasks \['verse'\]"),
        ({"pinned": ["verse"]}, ValueError, r"pinned names unknown tasks"),
        ({"pinned": NAMES}, ValueError, "all tasks are pinned"),
        ({"importance": -1}, ValueError, r"importance must be positive, got \[-1.0, -1.0"),
        ({"importance": {"legal": 0}}, ValueError, r"importance must be positive, got \[1.0, 1.0, 0.0, 1.0\]"),
        ({"importance": {"legal": float("nan")}}, ValueError, "importance must be finite"),
        ({"importance": {"verse": 2}}, ValueError, r"importance names unknown tasks \['verse'\]"),
        ({"importance": [1, 2]}, ValueError, r"importance must be a number or one per task \(4\), got shape \(2,\)"),
        ({"importance": "legal"}, TypeError, "importance must hold numbers, got 'legal'"),
        ({"importance": {"legal": "much"}}, TypeError, r"importance must hold numbers, got \['much'\]"),
        ({"critical": {"verse"}}, ValueError, r"critical names unknown tasks \['verse'\]; the tasks are \['text'"),
        ({"critical": "verse"}, ValueError, r"critical names unknown tasks \['verse'\]"),
        ({"probe_every": 0}, ValueError, "probe_every must be at least 1"),
        (
            {"probe_every": 2, "batch_size": 3},
            ValueError,
            "probe_every=2 is too small: .* of 4 tasks .* of 2 batches of 3; pass probe_every=3 or more",
        ),
        (
            {"min_weight": {"poetry": 0.1}, "budget": 0.05},
            ValueError,
            "min_weight diverts 0.08722 .*or pass budget=0.088",
        ),
        ({"pinned": "verse"}, ValueError, r"pinned names unknown tasks \['verse'\]"),
        ({"max_weight": {"verse": 0.3}}, ValueError, r"max_weight names unknown tasks"),
        ({"tasks": (*NAMES, "verse")}, ValueError, r"these tasks have no examples: \['verse'\]; leave them out"),
        ({"max_epochs": 0.5}, ValueError, "max_epochs must be a finite number of passes, at least 1"),
        ({"max_epochs": 1}, ValueError, "max_epochs=1 allows 861 draws, but one epoch of 44 batches of 20 takes 880"),
        ({"dataset": range(5)}, ValueError, "the dataset has 5 examples"),
        ({"policy": Static([0.5, 0.5])}, ValueError, "Static has 2 weights, the sampler has 4 tasks"),
    ],
)
def test_bad_arguments_raise(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**options)


def test_a_policy_that_returns_nonsense_is_named() -> None:
    class Broken(Policy):
        def weights(self, report: Any, state: PolicyState) -> FloatArray:
            return np.array([0.5, 0.5, np.nan, 0.0])

    sampler = build(Broken())
    next(iter(sampler))
    with pytest.raises(ValueError, match=r"Broken returned weights that are negative or not finite: {'legal': nan}"):
        sampler.update(Report(step=1))


def test_observe() -> None:
    sampler = build()
    sampler.observe([1.0, 2.0, 3.0, 4.0])
    assert sampler.state_dict()["eval_losses"] == {"text": 1.0, "code": 2.0, "legal": 3.0, "poetry": 4.0}
    with pytest.raises(ValueError, match=r"unknown tasks \['verse'\]"):
        sampler.observe({"verse": 1.0})
    with pytest.raises(ValueError, match=r"finite, got {'text': nan}: leave out"):
        sampler.observe({"text": float("nan")})
    with pytest.raises(ValueError, match=r"one per task \(4\)"):
        sampler.observe([1.0])


def test_numbered_tasks_may_be_named_by_their_numbers() -> None:
    policy = Steps()
    sampler = build(policy, tasks=None, importance={2: 3.0}, critical=[3])
    next(iter(sampler))
    sampler.observe({1: 0.5})  # type: ignore[dict-item]
    sampler.update(Report(step=1, tasks=("0", "1", "2", "3")))
    state = policy.states[0]
    assert state.importance.tolist() == [1, 1, 3, 1] and state.critical.tolist() == [False, False, False, True]
    assert state.eval_losses == {"1": 0.5}


def test_state_is_json() -> None:
    sampler = build()
    list(trained(sampler, sampler, 12))
    state = sampler.state_dict()
    assert json.loads(json.dumps(state)) == state
