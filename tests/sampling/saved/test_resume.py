"""Resuming is exact: the stream after a load is the stream of the run that was never stopped."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling import AdaptiveBatchSampler, Ledger
from taskgrad.sampling.arrays import FloatArray
from taskgrad.sampling.policies import Policy, PolicyState, Uniform
from tests.sampling.helpers import NAMES, TASK_OF_EXAMPLE, Report, Restless, loader, sealed_again, trained

LENGTH = 20


def build(**options: Any) -> AdaptiveBatchSampler:
    options = {
        "policy": Restless(), "batch_size": 12, "tasks": NAMES, "num_batches": LENGTH, "update_every": 3, "delay": 4,
        "budget": 0.6, "max_change": 3.0, "probe_every": 6, "max_epochs": 40, **options,
    }  # fmt: skip
    return AdaptiveBatchSampler(TASK_OF_EXAMPLE, **options)


def run(sampler: AdaptiveBatchSampler, batches: int, workers: int | None = None) -> list[list[int]]:
    """Train on so many batches, over as many epochs as they take, from a DataLoader or the sampler itself."""
    out: list[list[int]] = []
    source = sampler if workers is None else loader(sampler, workers)
    while len(out) < batches:
        out += trained(source, sampler, batches - len(out))
    return out


def saved(sampler: AdaptiveBatchSampler) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(sampler.state_dict()))
    return state


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[list[list[int]], str]:
    sampler = build()
    return run(sampler, 3 * LENGTH), sampler.ledger.digest()


def test_the_stream_moves(uninterrupted: tuple[list[list[int]], str]) -> None:
    sampler = build()
    run(sampler, 3 * LENGTH)
    assert len(sampler.ledger) >= LENGTH - 2
    assert any(entry.bound for entry in sampler.ledger)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_stream_does_not_depend_on_workers(uninterrupted: tuple[list[list[int]], str], workers: int) -> None:
    sampler = build()
    assert run(sampler, 3 * LENGTH, workers) == uninterrupted[0]
    assert sampler.ledger.digest() == uninterrupted[1]


@settings(max_examples=30, deadline=None)
@given(stops=st.lists(st.integers(0, 3 * LENGTH), min_size=1, max_size=3).map(sorted))
def test_resume_anywhere_any_number_of_times(uninterrupted: tuple[list[list[int]], str], stops: list[int]) -> None:
    sampler, batches = build(), []
    for stop in stops:
        batches += run(sampler, stop - len(batches))
        state = saved(sampler)
        sampler = build()
        sampler.load_state_dict(state)
        assert sampler.consumed == len(batches)
    batches += run(sampler, 3 * LENGTH - len(batches))
    assert batches == uninterrupted[0]
    assert sampler.ledger.digest() == uninterrupted[1]


@pytest.mark.parametrize("before, after", [(0, 0), (2, 2), (0, 2), (2, 0)])
@pytest.mark.parametrize("stop", [7, LENGTH, LENGTH + 13, 2 * LENGTH - 1])
def test_resume_in_the_middle_of_an_epoch_with_a_data_loader(
    uninterrupted: tuple[list[list[int]], str], before: int, after: int, stop: int
) -> None:
    sampler = build()
    batches = run(sampler, stop, before)
    resumed = build()
    resumed.load_state_dict(saved(sampler))
    assert batches + run(resumed, 3 * LENGTH - stop, after) == uninterrupted[0]
    assert resumed.ledger.digest() == uninterrupted[1]


def test_the_state_is_of_the_consumed_batch_not_of_what_workers_prefetched() -> None:
    sampler = build()
    batches = iter(loader(sampler, 2))
    for step in range(1, 4):
        sampler.update(Report(step=step, value=float(next(batches).sum())))
    assert sampler.task_ids(6).shape == (12,)  # drawn
    assert sampler.state_dict()["consumed"] == 3 == sampler.consumed
    assert sampler.realised().batches == 3


def test_the_delay_that_a_loader_needs_is_workers_times_prefetch() -> None:
    sampler = build(update_every=1, delay=3)
    with pytest.raises(ValueError, match="delay=4 or more"):
        run(sampler, 10, 2)
    run(build(update_every=1, delay=4), 10, 2)


def test_replay_draws_the_epoch_again_for_loaders_that_skip(uninterrupted: tuple[list[list[int]], str]) -> None:
    sampler = build()
    run(sampler, LENGTH + 8)
    resumed = build(resume="replay")
    resumed.load_state_dict(saved(sampler))
    resumed.set_epoch(1)
    drawn = iter(resumed)
    assert list(islice(drawn, 8)) == uninterrupted[0][LENGTH : LENGTH + 8]
    assert resumed.consumed == LENGTH + 8
    rest = []
    for batch in drawn:
        rest.append(batch)
        value = sum(batch)
        resumed.update(Report(step=resumed.consumed + 1, valid=value % 4 > 0, value=float(value)))
    assert rest == uninterrupted[0][LENGTH + 8 : 2 * LENGTH]
    assert run(resumed, LENGTH) == uninterrupted[0][2 * LENGTH :]
    assert resumed.ledger.digest() == uninterrupted[1]


def test_peeking_after_a_load_does_not_lose_the_place() -> None:
    expected = run(build(), 7 + 5)
    resumed = build()
    resumed.load_state_dict(saved(build_at(7)))
    peek = next(iter(resumed))
    assert peek == expected[7] == next(iter(resumed))
    assert len(list(resumed)) == LENGTH - 7


def build_at(batches: int) -> AdaptiveBatchSampler:
    sampler = build()
    run(sampler, batches)
    return sampler


def test_set_epoch_after_a_load_keeps_the_place() -> None:
    for epoch in (0, 1):
        resumed = build()
        resumed.load_state_dict(saved(build_at(7)))
        resumed.set_epoch(epoch)
        assert len(list(resumed)) == LENGTH - 7


def test_an_iteration_does_not_outlive_a_jump() -> None:
    for jump in ("load", "rewind", "rebase"):
        sampler = build_at(LENGTH + 3)
        state = saved(sampler)
        under_way = iter(sampler)
        first = next(under_way)
        if jump == "load":
            sampler.load_state_dict(state)
        elif jump == "rewind":
            sampler.rewind(1)
        else:
            sampler.rebase(state)
        with pytest.raises(RuntimeError, match=r"while this iteration over it was under way.*iter\(loader\)"):
            next(under_way)
        if jump == "load":
            assert next(iter(sampler)) == first


def test_a_state_from_the_end_of_an_epoch_begins_the_next() -> None:
    resumed = build()
    resumed.load_state_dict(saved(build_at(LENGTH)))
    assert resumed.epoch == 0
    assert len(list(resumed)) == LENGTH and resumed.consumed == LENGTH
    resumed.advance(LENGTH)
    assert len(list(resumed)) == LENGTH and resumed.epoch == 2


def test_decisions_not_yet_in_effect_are_saved() -> None:
    sampler = build(update_every=10, delay=4)
    run(sampler, 9)
    state = saved(sampler)
    assert [(waiting[0], waiting[2]) for waiting in state["waiting"]] == [(20, "report on batch 8")]
    assert [entry.effective_at for entry in Ledger.from_dict(state["ledger"])] == [0, 10]
    ahead = build(update_every=2, delay=6)
    run(ahead, 9)
    assert [entry.effective_at for entry in Ledger.from_dict(saved(ahead)["ledger"])][-2:] == [12, 14]


def test_a_report_given_before_the_save_is_not_taken_for_a_new_one_after_the_load() -> None:
    sampler = build(update_every=1, delay=0)
    for _ in islice(sampler, 6):
        sampler.update(Report(step=2))  # in the middle of an accumulation
    resumed = build(update_every=1, delay=0)
    resumed.load_state_dict(saved(sampler))
    next(iter(resumed))
    resumed.update(Report(step=2))
    assert resumed.ledger.digest() == sampler.ledger.digest()


def test_an_epoch_run_through_again_stays_that_after_a_load() -> None:
    sampler = build_at(15)
    before = saved(sampler)
    sampler.rewind(0)
    run(sampler, 5)
    resumed = build()
    resumed.load_state_dict(saved(sampler))
    run(resumed, 10)
    assert saved(resumed) == before


def test_without_updates_the_state_is_of_what_was_drawn_or_as_told() -> None:
    sampler = build(policy=Uniform())
    batches = list(islice(sampler, 6))
    assert sampler.state_dict()["consumed"] == 6
    resumed = build(policy=Uniform())
    resumed.load_state_dict(sampler.state_dict(consumed=4))
    assert list(islice(resumed, 2)) == batches[4:]
    with pytest.raises(ValueError, match="consumed is 7, but only 6"):
        sampler.state_dict(consumed=7)


def test_delay_and_update_every_may_change() -> None:
    sampler = build_at(9)
    resumed = build(update_every=1, delay=0)
    resumed.load_state_dict(saved(sampler))
    run(resumed, 11)
    starts = [entry.effective_at for entry in resumed.ledger]
    assert starts == sorted(set(starts)) and starts[-1] == LENGTH


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": 1}, "seed: saved 0, here 1"),
        ({"num_batches": 30}, "num_batches: saved 20, here 30"),
        ({"budget": 0.5}, "budget: saved 0.6, here 0.5"),
        ({"probe_every": None}, "probe_every: saved 6, here None"),
        ({"max_epochs": 41}, "max_epochs: saved 40.0, here 41.0"),
        ({"pinned": ["text"]}, "pinned: saved"),
        ({"policy": Uniform()}, "policy: saved 'Restless', here 'Uniform'"),
    ],
)
def test_a_sampler_built_otherwise_refuses_the_state(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*build it the same way"):
        build(**options).load_state_dict(saved(build_at(3)))


def test_other_data_or_tasks_refuse_the_state_and_name_rebase() -> None:
    state = saved(build_at(3))
    grown = np.append(TASK_OF_EXAMPLE, [3, 3])
    other = AdaptiveBatchSampler(grown, 12, Restless(), tasks=NAMES)
    with pytest.raises(ValueError, match=r"'poetry': 11.*'poetry': 13.*rebase\(state\)"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"rebase\(state\)"):
        build(tasks=["a", "b", "c", "d"]).load_state_dict(state)
    with pytest.raises(ValueError, match="not a sampler state of format 2"):
        build().load_state_dict({"weights": [1]})


@pytest.mark.parametrize("batch_size, replicas, remedy", [(13, 1, "batch_size=12"), (3, 2, "batch_size=6")])
def test_another_global_batch_is_refused_and_the_right_one_named(batch_size: int, replicas: int, remedy: str) -> None:
    other = build(batch_size=batch_size, num_replicas=replicas, rank=0)
    with pytest.raises(
        ValueError, match=rf"batches of 12 examples on all ranks.*{replicas} x {batch_size}: pass {remedy}"
    ):
        other.load_state_dict(saved(build_at(3)))
    with pytest.raises(ValueError, match="no batch_size on 5 ranks keeps it, use a number of ranks that divides 12"):
        build(batch_size=4, num_replicas=5, rank=0).load_state_dict(saved(build_at(3)))


def test_importance_and_critical_tasks_may_change() -> None:
    resumed = build(importance={"legal": 2}, critical={"poetry"}, horizon=100)
    resumed.load_state_dict(saved(build_at(9)))
    assert resumed.consumed == 9


def test_a_ledger_of_other_data_is_refused() -> None:
    state = saved(build_at(3))
    fewer = AdaptiveBatchSampler(TASK_OF_EXAMPLE[TASK_OF_EXAMPLE < 3], 12, Restless(), tasks=NAMES[:3])
    with pytest.raises(ValueError, match=r"saved ledger is for tasks of sizes .*'poetry': 11.*rebase\(state\)"):
        fewer.load_state_dict(state)
    state["ledger"]["entries"] += 1
    with pytest.raises(ValueError, match="field 'ledger' of the sampler's state was changed"):
        build().load_state_dict(state)
    with pytest.raises(ValueError, match="does not match its checksum"):
        build().load_state_dict(sealed_again(state))


def test_rebase_opens_a_new_era_on_other_data() -> None:
    old = build()
    run(old, LENGTH + 7)
    grown = np.append(TASK_OF_EXAMPLE, np.full(30, 4))

    def new() -> AdaptiveBatchSampler:
        return AdaptiveBatchSampler(grown, 12, Restless(), tasks=(*NAMES, "song"), num_batches=9, delay=4)

    sampler = new()
    sampler.rebase(saved(old))
    ledger = sampler.ledger
    assert (ledger.era, ledger.start, len(ledger)) == (1, LENGTH + 7, 1)
    assert ledger.past[0]["digest"] == old.ledger.digest() and ledger.past[0]["tasks"] == list(NAMES)
    assert sampler.epoch == 2 and sampler.consumed == LENGTH + 7
    assert sampler.weights == pytest.approx(np.bincount(grown) / len(grown))
    with pytest.raises(ValueError, match="batch 3 lies before batch 27, where this ledger begins"):
        sampler.loss_weight(3)

    def train(s: AdaptiveBatchSampler, count: int) -> list[list[int]]:
        out: list[list[int]] = []
        while len(out) < count:
            for batch in islice(s, count - len(out)):
                out.append(batch)
                s.update(Report(step=s.consumed + 1, tasks=(*NAMES, "song"), value=float(sum(batch))))
        return out

    straight = train(sampler, 20)
    assert sampler.realised().batches == 20
    resumed = new()
    resumed.rebase(saved(old))
    first = train(resumed, 11)
    again = new()
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert again.epoch == 3
    assert first + train(again, 9) == straight
    assert again.ledger.digest() == sampler.ledger.digest()
    with pytest.raises(ValueError, match="since rebase, the first is 2"):
        sampler.rewind(1)


def test_memory_that_json_cannot_hold_is_named() -> None:
    class Hoarder(Policy):
        def weights(self, report: Any, state: PolicyState) -> FloatArray:
            state.memory["array"] = np.ones(3)
            return state.natural

    sampler = build(policy=Hoarder())
    run(sampler, 1)
    with pytest.raises(TypeError, match=r"Hoarder keeps in state.memory what JSON cannot hold"):
        sampler.state_dict()


def test_loading_does_not_share_memory_with_the_saved_state() -> None:
    state = build_at(5).state_dict()
    text = json.dumps(state)
    resumed = build()
    resumed.load_state_dict(state)
    run(resumed, 8)
    assert json.dumps(state) == text
