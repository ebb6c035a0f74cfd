"""One stream on many ranks: its parts, its state, and the ledger they agree on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader

import taskgrad as tg
from taskgrad.sampling import AdaptiveBatchSampler, AdaptiveSampler
from taskgrad.sampling.policies import Policy, PolicyState, Proportional
from tests.sampling.helpers import NAMES, TASK_OF_EXAMPLE, Report
from tests.utils.ranks import on_two_ranks

SLOW = pytest.mark.slow


class Restless(Policy):
    """Other weights after every report, by the batch that it is on."""

    def weights(self, report: Any, state: PolicyState) -> Any:
        return np.random.default_rng(state.step).dirichlet(np.ones(4))


def part(rank: int, ranks: int, batch: int = 48, **options: Any) -> AdaptiveBatchSampler:
    """The sampler of one rank."""
    options = {"policy": Restless(), "tasks": NAMES, "num_batches": 15, "update_every": 2, "delay": 3, **options}
    return AdaptiveBatchSampler(TASK_OF_EXAMPLE, batch // ranks, num_replicas=ranks, rank=rank, **options)


def drawn(sampler: AdaptiveBatchSampler, batches: int) -> list[list[int]]:
    """Train on so many batches, with a report on each."""
    out: list[list[int]] = []
    while len(out) < batches:
        for rows in islice(sampler, batches - len(out)):
            out.append(rows)
            sampler.update(Report(step=sampler.consumed + 1))
    return out


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 48])
def test_parts_are_disjoint_and_together_the_global_batch(ranks: int) -> None:
    whole = drawn(part(0, 1), 40)
    samplers = [part(rank, ranks) for rank in range(ranks)]
    parts = [drawn(sampler, 40) for sampler in samplers]
    for k, rows in enumerate(whole):
        together = [row for p in parts for row in p[k]]
        assert sorted(together) == sorted(rows) and {len(p[k]) for p in parts} == {48 // ranks}
    assert len({sampler.ledger.digest() for sampler in samplers}) == 1
    for rank, sampler in enumerate(samplers):
        assert sampler.rank == rank and sampler.num_replicas == ranks and sampler.batch_size == 48 // ranks
        assert len(sampler) == 15 and sampler.realised().examples.sum() == 48 * 40
        for k in (0, 17, 39):
            assert sampler.task_ids(k).tolist() == TASK_OF_EXAMPLE[parts[rank][k]].tolist()
            other = (rank + 1) % ranks
            assert sampler.task_ids(k, other).tolist() == TASK_OF_EXAMPLE[parts[other][k]].tolist()
            assert sampler.task_ids(k, "global").tolist() == sorted(TASK_OF_EXAMPLE[whole[k]].tolist())


def test_task_ids_of_what_is_not_there() -> None:
    sampler = part(0, 2)
    drawn(sampler, 3)
    with pytest.raises(ValueError, match="batch 3 was not drawn yet: only 3 batches were drawn"):
        sampler.task_ids(3)
    with pytest.raises(ValueError, match="rank must be below num_replicas, 2, or 'global', got 2"):
        sampler.task_ids(1, 2)
    with pytest.raises(TypeError, match="rank must be an integer"):
        sampler.task_ids(1, "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch must be at least 0"):
        sampler.task_ids(-1)


@settings(max_examples=20, deadline=None)
@given(
    before=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
    after=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
    stop=st.integers(1, 40),
)
def test_a_run_may_go_on_with_other_ranks(before: int, after: int, stop: int) -> None:
    whole = drawn(part(0, 1), 45)
    saved = []
    for rank in range(before):
        sampler = part(rank, before)
        drawn(sampler, stop)
        saved.append(json.loads(json.dumps(sampler.state_dict())))
    assert all(state["ledger"] == saved[0]["ledger"] for state in saved)
    resumed = [part(rank, after) for rank in range(after)]
    for sampler in resumed:
        sampler.load_state_dict(saved[0])
    rest = [drawn(sampler, 45 - stop) for sampler in resumed]
    for k in range(45 - stop):
        assert sorted(row for p in rest for row in p[k]) == sorted(whole[stop + k])


def test_a_task_in_every_batch_goes_round() -> None:
    """511 to 1 at 64 rows on 8 ranks: the one rare row of every global batch."""
    task = np.repeat([0, 1], [51100, 100])
    parts = [
        AdaptiveBatchSampler(task, 64, Proportional(), num_batches=400, num_replicas=8, rank=rank) for rank in range(8)
    ]
    counts = np.array([[np.bincount(task[rows], minlength=2) for rows in sampler] for sampler in parts]).cumsum(1)
    assert (counts.max(0) - counts.min(0)).max() <= 2 + 2 / 2
    assert (counts[:, -1, 1] == 50).all()


def test_accelerate_would_spread_the_batches() -> None:
    shard = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    sampler = part(0, 1)
    with pytest.raises(
        RuntimeError, match=r"spread the batches of this sampler over 2 processes.*accelerate\.prepare\("
    ):
        next(iter(shard(sampler, num_processes=2, process_index=1)))
    single = AdaptiveSampler(TASK_OF_EXAMPLE, 48, Restless())
    with pytest.raises(RuntimeError, match="over 2 processes"):
        next(iter(shard(BatchSampler(single, 48, True), num_processes=2, process_index=0)))
    loader = DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=shard(sampler, num_processes=2))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="over 2 processes"):
        next(iter(loader))
    assert len(list(shard(sampler, num_processes=1))) == 15
    assert sampler.consumed == 15


# -- real ranks --------------------------------------------------------------------------------------------------------


class Group:
    """What one rank trains with."""

    def __init__(self, rank: int, follow: bool = True, policy: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.rank = rank
        model = nn.Linear(3, 1)
        self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.tracker = tg.track(model, NAMES, self.optimizer, verify=False)
        policy = Restless() if policy is None else policy
        self.sampler = part(options.pop("part", rank), 2, policy=policy, **options)
        if follow:
            self.sampler.follow(self.tracker)
        self.x = torch.randn(len(TASK_OF_EXAMPLE), 3)

    def step(self, rows: list[int], batch: bool = True) -> None:
        x = self.x[torch.as_tensor(rows)]
        ids = torch.from_numpy(TASK_OF_EXAMPLE[np.asarray(rows)])
        if batch:
            with self.tracker.batch(ids):
                self.model(x).square().mean().backward()
        else:
            self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, source: Any = None) -> None:
        for rows in self.sampler if source is None else source:
            self.step(rows)


def followed(rank: int) -> Any:
    group = Group(rank)
    for _ in range(2):
        group.train()
    return group


def by_hand(rank: int) -> Any:
    group = Group(rank, follow=False)
    for _ in range(2):
        for rows in group.sampler:
            group.step(rows)
            group.sampler.update(group.tracker.report())
    return group


def looked_at_on_one(rank: int) -> Any:
    group = Group(rank)
    for _ in range(2):
        if rank == 0:
            next(iter(group.sampler))
        group.train()
    return group


def workers_on_one(rank: int) -> Any:
    group = Group(rank, delay=9)
    for _ in range(2):
        group.train(
            DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=group.sampler, num_workers=2 * rank)  # type: ignore[arg-type]
        )
    return group


def late_on_one(rank: int) -> Any:
    """The one that draws ahead moves the change for both."""
    group = Group(rank, delay=3)
    loader = DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=group.sampler, num_workers=3 * rank)  # type: ignore[arg-type]
    for _ in range(2):
        group.train(loader)
    assert any("late" in entry.cause for entry in group.sampler.ledger)
    return group


def rounded_on_one(rank: int) -> Any:
    """Another machine's rounding: rank 0's weights are taken."""

    class Rounded(Restless):
        def weights(self, report: Any, state: PolicyState) -> Any:
            return np.round(super().weights(report, state), 9 if rank else 15) * (1 - 1e-8)

    group = Group(rank, policy=Rounded())
    group.train()
    return group


def resumed(rank: int) -> Any:
    group = Group(rank)
    group.train()
    states = [group.tracker.state_dict(), group.sampler.state_dict()]
    again = Group(rank)
    again.tracker.load_state_dict(states[0])
    again.sampler.load_state_dict(states[1])
    again.train()
    return again


def evaluated_on_one(rank: int) -> Any:
    group = Group(rank)
    for _ in range(2):
        for rows in group.sampler:
            if rank == 0:
                with torch.no_grad(), group.tracker.batch(torch.from_numpy(TASK_OF_EXAMPLE[rows])):
                    group.model.module(group.x[rows])
            group.step(rows)
    return group


def empty_on_one(rank: int) -> Any:
    """A step without a batch() on one rank is counted by hand."""
    group = Group(rank)
    for k, rows in enumerate(group.sampler):
        if rank and k == 5:
            group.sampler.advance()
        group.step(rows, batch=not (rank and k == 5))
    return group


def uncounted_on_one(rank: int) -> Any:
    group = Group(rank)
    for k, rows in enumerate(group.sampler):
        group.step(rows, batch=not (rank and k == 5))
    return group


def another_seed_on_one(rank: int) -> Any:
    return Group(rank, seed=rank).train()


def another_budget_on_one(rank: int) -> Any:
    return Group(rank, budget=0.5 + 0.1 * rank).train()


def the_same_part(rank: int) -> Any:
    return Group(rank, part=0).train()


def other_weights_on_one(rank: int) -> Any:
    class Other(Restless):
        def weights(self, report: Any, state: PolicyState) -> Any:
            return super().weights(report, state) if rank == 0 or state.step < 4 else np.full(4, 0.25)

    return Group(rank, policy=Other()).train()


def no_reports_on_one(rank: int) -> Any:
    group = Group(rank, follow=False)
    for rows in group.sampler:
        group.step(rows)
        group.sampler.update(None if rank else group.tracker.report())
    return group


RIGHT = (
    followed, by_hand, looked_at_on_one, workers_on_one, late_on_one, rounded_on_one, resumed, evaluated_on_one,
    empty_on_one,
)  # fmt: skip
WRONG = {
    uncounted_on_one: r"the ranks have counted \[\d+, \d+\] batches.*advance",
    another_seed_on_one: "1: 'other arguments, other data or another loaded state'",
    another_budget_on_one: "1: 'other arguments",
    the_same_part: r"the ranks draw the parts \[0, 0\]",
    other_weights_on_one: "1: 'other weights from the same policy: other reports'",
    no_reports_on_one: "1: 'a decision where rank 0 has none, or none where it has one",
}


def told(rank: int) -> list[str]:
    """Warnings of a sampler that knows nothing of the ranks, and of one that was told."""
    said = []
    for options in ({}, {"num_replicas": 1, "rank": 0}, {"num_replicas": 2, "rank": rank}):
        sampler = AdaptiveBatchSampler(TASK_OF_EXAMPLE, 12, Proportional(), **options)  # type: ignore[arg-type]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            next(iter(sampler))
            next(iter(sampler))
        said.append("; ".join(str(warning.message) for warning in found))
    return said


def every_case(rank: int) -> dict[str, Any]:
    return {"told": told(rank), **{case.__name__: _outcome(case, rank) for case in (*RIGHT, *WRONG)}}


def _outcome(case: Callable[[int], Any], rank: int) -> Any:
    try:
        group = case(rank)
    except RuntimeError as error:
        return str(error)
    if group is None:
        return "nothing was wrong"
    sampler = group.sampler
    weights = [[entry.effective_at, entry.cause, entry.weights.tolist()] for entry in sampler.ledger]
    ids = [sampler.task_ids(k, "global").tolist() for k in range(sampler.consumed)]
    return {"digest": sampler.ledger.digest(), "entries": weights, "consumed": sampler.consumed, "ids": ids}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_two_ranks(every_case)


@SLOW
@pytest.mark.parametrize("case", RIGHT)
def test_the_ranks_have_one_ledger(found: list[dict[str, Any]], case: Callable[[int], Any]) -> None:
    first, second = (f[case.__name__] for f in found)
    assert first == second
    assert first["consumed"] in (15, 30) and len(first["entries"]) > 3


@SLOW
@pytest.mark.parametrize("case", WRONG)
def test_ranks_that_differ_stop_and_say_so(found: list[dict[str, Any]], case: Callable[[int], Any]) -> None:
    for f in found:
        with pytest.raises(RuntimeError, match=WRONG[case]):
            raise RuntimeError(f[case.__name__])


@SLOW
def test_what_is_the_same_whatever_else_a_rank_does(found: list[dict[str, Any]]) -> None:
    one = found[0]
    for name in ("by_hand", "looked_at_on_one", "evaluated_on_one", "resumed"):
        assert one[name]["entries"] == one["followed"]["entries"], name


@SLOW
def test_ranks_that_a_sampler_knows_nothing_of_are_told(found: list[dict[str, Any]]) -> None:
    for f in found:
        silent, told_one, told_two = f["told"]
        assert "2 ranks are up, and all of them draw the same batches" in silent and "num_replicas=2" in silent
        assert silent.count("ranks are up") == 1 and told_one == told_two == ""
