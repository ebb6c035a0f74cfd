"""``shares=``: streams of which only the tasks' shares are known. Tasks are drawn, not examples."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import taskgrad as tg
from taskgrad.sampling import AdaptiveBatchSampler, AdaptiveSampler
from taskgrad.sampling.engine.quota import to_units
from taskgrad.sampling.saved.resume import new_engine
from tests.sampling.helpers import NAMES, TASK_OF_EXAMPLE, Report, Restless, loader, trained
from tests.sampling.policies.test_every_policy import CASES as POLICIES
from tests.sampling.policies.test_every_policy import TASKS
from tests.sampling.saved.test_copies import reported
from tests.sampling.test_follow import Restless as Follower

SHARES = {"text": 0.7, "code": 0.2, "legal": 0.08, "poetry": 0.02}
NATURAL = np.array([*SHARES.values()]) / sum(SHARES.values())


def build(shares: Any = SHARES, policy: Any = None, **options: Any) -> AdaptiveBatchSampler:
    options = {"batch_size": 10, "num_batches": 50, "update_every": 1, "delay": 0, **options}
    return AdaptiveBatchSampler(
        shares=shares, policy=tg.policies.Proportional() if policy is None else policy, **options
    )


def train(sampler: AdaptiveBatchSampler, count: int) -> list[list[int]]:
    out: list[list[int]] = []
    while len(out) < count:
        for batch in islice(sampler, count - len(out)):
            out.append(batch)
            step = sampler._stream.uncounted + 1
            sampler.update(Report(step=step, value=float(step % 7), tasks=sampler.tasks))
    return out


def test_ids_per_slot_follow_the_shares() -> None:
    sampler = build(dataset=None)
    batches = [*sampler, *sampler]
    assert len(sampler) == 50 and len(batches) == 100 and {len(batch) for batch in batches} == {10}
    assert all(type(task) is int and 0 <= task < 4 for batch in batches for task in batch)
    assert all(batch == sorted(batch) for batch in batches)
    for done in (1, 7, 50, 100):  # less than one example off, at any time
        counts = np.bincount(np.concatenate(batches[:done]), minlength=4)
        assert np.abs(counts - done * 10 * NATURAL).max() < 1
    assert sampler.tasks == tuple(SHARES) and sampler._index.named
    assert [sampler.task_ids(k).tolist() for k in range(100)] == batches


def test_counts_are_those_that_the_ledger_asks_for() -> None:
    sampler = build(policy=Restless(), update_every=5)
    batches = train(sampler, 100)
    assert len(sampler.ledger) > 10
    counts = np.bincount(np.concatenate(batches), minlength=4)
    realised = sampler.realised()
    assert realised.examples.tolist() == counts.tolist()
    assert np.abs(counts - 1000 * realised.intended).max() < 1 + np.log(4)
    # the same weights over examples give the same counts: nothing of the stream depends on what a slot is filled with
    twin = AdaptiveBatchSampler(
        TASK_OF_EXAMPLE, 10, Restless(), tasks=NAMES, num_batches=50, update_every=5, delay=0, max_epochs=None
    )
    twin._decisions.ledger, twin._decisions.engine = sampler.ledger, new_engine(twin._settings, sampler.ledger)
    for entry in sampler.ledger:
        twin._decisions.engine.commit(entry.effective_at, entry.weights)
    assert [np.sort(TASK_OF_EXAMPLE[rows]).tolist() for rows in [*twin, *twin]] == batches


def test_what_can_be_known_of_a_stream() -> None:
    states: list[Any] = []

    class Keeps(Restless):
        def weights(self, report: Any, state: Any) -> Any:
            states.append(state)
            return super().weights(report, state)

    sampler = build(policy=Keeps())
    train(sampler, 20)
    assert {state.sizes is None and state.epochs is None for state in states} == {True}
    assert states[0].natural == pytest.approx(NATURAL) and not states[0].natural.flags.writeable
    assert states[-1].realised.sum() == pytest.approx(1)
    realised = sampler.realised()
    assert realised.epochs is None and realised.batches == 20 and realised.capped == ()
    lines = str(realised).splitlines()
    assert lines[0] == "20 batches" and lines[1].split() == [
        "task",
        "examples",
        "share",
        "intended",
        "epochs",
        "probes",
    ]
    assert [line.split()[0] for line in lines[2:]] == list(NAMES)
    assert [line.split()[4] for line in lines[2:]] == ["-"] * 4
    assert len({len(line) for line in lines[1:]}) == 1


def test_loss_weight_is_share_over_probability() -> None:
    sampler = build(policy=tg.policies.Static([0.25] * 4))
    next(iter(sampler))
    assert sampler.loss_weight(0) == pytest.approx(NATURAL / 0.25)
    assert sampler.loss_weight(0, "poetry") == sampler.loss_weight(0, 3) == pytest.approx(0.08)


def test_guards_hold() -> None:
    sampler = build(policy=Restless(), budget=0.3, min_weight={"poetry": 0.05}, max_change=1.5, pinned="legal")
    train(sampler, 60)
    weights = np.stack([entry.weights for entry in sampler.ledger]) / 2**40
    assert (np.abs(weights - NATURAL).sum(1) / 2 <= 0.3 + 0.05 + 1e-9).all() and weights[:, 3].min() > 0.0499
    probing = build(policy=tg.policies.Static([1, 0, 0, 0]), probe_every=8)
    list(probing)
    assert (probing.realised().probes[1:] >= 6).all()
    assert str(probing.realised()).splitlines()[-1].split()[-1] == str(probing.realised().probes[3])


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_every_batch(ranks: int) -> None:
    whole = build(batch_size=30)
    parts = [build(batch_size=30 // ranks, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    counts = np.zeros((ranks, 4), dtype=int)
    for k, (batch, *rows) in enumerate(zip(whole, *parts, strict=True)):
        assert sorted(itertools.chain(*rows)) == batch
        for rank, row in enumerate(rows):
            assert parts[0].task_ids(k, rank).tolist() == row == parts[rank].task_ids(k).tolist()
            assert parts[rank].task_ids(k, "global").tolist() == batch
            counts[rank] += np.bincount(row, minlength=4)
    assert (counts.max(0) - counts.min(0) <= 4).all()
    assert len({part.ledger.digest() for part in (whole, *parts)}) == 1


@pytest.mark.parametrize("stop", [0, 1, 33, 50, 71])
def test_resume(stop: int) -> None:
    expected = train(build(policy=Restless()), 100)
    sampler = build(policy=Restless())
    rows = train(sampler, stop)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = build(policy=Restless())
    resumed.load_state_dict(state)
    assert rows + train(resumed, 100 - stop) == expected


def test_the_digest_covers_names_and_shares() -> None:
    found = {
        build(shares)._index.digest
        for shares in (
            SHARES,
            {**SHARES, "text": 0.71},
            {("prose" if name == "text" else name): share for name, share in SHARES.items()},
            dict(reversed(SHARES.items())),
        )
    }
    assert len(found) == 4 and all(digest.startswith("shares-sha256:") for digest in found)
    same = build({name: share * 100 for name, share in SHARES.items()})
    assert np.allclose(same._settings.natural, NATURAL)
    exact = build({name: share * 64 for name, share in SHARES.items()})
    assert exact._index.digest == build()._index.digest
    content = json.dumps([list(SHARES), build()._settings.natural.tolist()]).encode()
    assert build()._index.digest == f"shares-sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize("other", [{**SHARES, "text": 0.71}, dict(reversed(SHARES.items()))])
def test_a_state_of_other_shares_is_refused_and_names_rebase(other: dict[str, float]) -> None:
    sampler = build()
    train(sampler, 7)
    state = sampler.state_dict()
    with pytest.raises(ValueError, match=r"rebase\(state\)"):
        build(other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rebase\(state\)"):
        AdaptiveBatchSampler([0, 1, 2, 3], 10, tg.policies.Proportional(), num_batches=50).load_state_dict(state)


def test_rebase_from_sizes_to_shares_to_other_shares_and_back() -> None:
    sized = AdaptiveBatchSampler(TASK_OF_EXAMPLE, 10, Restless(), tasks=NAMES, num_batches=8, update_every=1, delay=0)
    train(sized, 11)
    stream = build(policy=Restless())
    stream.rebase(json.loads(json.dumps(sized.state_dict())))
    assert stream.consumed == stream.ledger.start == 11 and stream.ledger.era == 1 and stream.epoch == 2
    assert stream.weights == pytest.approx(NATURAL)
    rows = train(stream, 9)
    assert {len(row) for row in rows} == {10} and stream.realised().batches == 9 and stream.realised().epochs is None
    grown = build({**SHARES, "song": 0.1}, policy=Restless())
    grown.rebase(json.loads(json.dumps(stream.state_dict())))
    assert grown.consumed == 20 and [past["tasks"] for past in grown.ledger.past] == [list(NAMES)] * 2
    first = train(grown, 5)
    resumed = build({**SHARES, "song": 0.1}, policy=Restless())
    resumed.load_state_dict(json.loads(json.dumps(grown.state_dict())))
    assert train(resumed, 6) == train(grown, 6) != first
    back = AdaptiveBatchSampler(TASK_OF_EXAMPLE, 10, Restless(), tasks=NAMES, num_batches=8)
    back.rebase(grown.state_dict())
    assert back.ledger.era == 3 and max(next(iter(back))) > 4


NEEDS_SIZES = {"UniMax"}


@pytest.mark.parametrize("name, policy", POLICIES, ids=[name for name, _ in POLICIES])
def test_every_policy_runs_or_says_at_construction_why_not(name: str, policy: Any) -> None:
    shares = dict(zip(TASKS, (0.7, 0.2, 0.06, 0.04), strict=True))

    def make() -> AdaptiveBatchSampler:
        own = policy
        if name == "Replay":  # of a run on the same stream
            run = build(shares, policy=Restless(), num_batches=9)
            train(run, 20)
            own = tg.policies.Replay(run.ledger, batches=20)
        return build(shares, policy=own, num_batches=9, horizon=27)

    if name in NEEDS_SIZES:
        with pytest.raises(ValueError, match=f"{name} counts passes over .*not known with shares"):
            make()
        return
    sampler = make()
    reported(sampler, 12)
    sampler.observe([1.0, 2.0, 3.0, 0.5])
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert reported(resumed, 12) == reported(sampler, 12)
    assert sampler.realised().epochs is None and "-" in str(sampler.realised())


def test_one_task() -> None:
    sampler = build({"all": 3})
    assert list(sampler) == [[0] * 10] * 50
    train(sampler, 3)
    assert sampler.weights.tolist() == [1.0]
    resumed = build({"all": 1.5})
    resumed.load_state_dict(sampler.state_dict())


def test_the_form_of_examples() -> None:
    sampler = AdaptiveSampler(shares=SHARES, batch_size=10, num_batches=50, policy=tg.policies.Proportional())
    assert len(sampler) == 500
    flat = list(sampler)
    assert flat == list(itertools.chain(*build()))
    assert sampler.task_ids(3).tolist() == flat[30:40]


class Slots(Dataset[tuple[Tensor, int]]):
    """Fills a slot with the next example of an endless stream of its task."""

    def __init__(self) -> None:
        self.streams = [self.stream(task) for task in range(4)]

    @staticmethod
    def stream(task: int) -> Iterator[Tensor]:
        rng = torch.Generator().manual_seed(task)
        while True:
            yield torch.randn(3, generator=rng) + task

    def __getitem__(self, task: int) -> tuple[Tensor, int]:
        return next(self.streams[task]), task


def test_a_tracker_that_is_followed_over_iterators() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tracker = tg.track(model, NAMES, optimizer, verify=False)
    sampler = build(policy=Follower(), delay=8)
    sampler.follow(tracker)
    for epoch in range(2):
        for x, ids in DataLoader(Slots(), batch_sampler=sampler):
            assert ids.tolist() == sampler.task_ids(sampler.consumed).tolist()
            with tracker.batch(ids):
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert sampler.consumed == 50 * (epoch + 1)
    assert len(sampler.ledger) > 50 and sampler.realised().examples.sum() == 1000
    other = tg.track(nn.Linear(3, 1), ["text", "code"], verify=False)
    with pytest.raises(ValueError, match="the tracker is on the tasks"):
        sampler.follow(other)


def test_workers_change_nothing() -> None:
    batches = []
    for workers in (0, 2):
        sampler = build(policy=Restless(), delay=9)
        batches.append(list(trained(loader(sampler, workers), sampler, 50)))
    assert batches[0] == batches[1]


@pytest.mark.parametrize(
    "shares", [{"a": Fraction(1, 3), "b": Fraction(2, 3)}, {"a": np.float32(1), "b": np.int8(2)}, {"a": 1, "b": 2},
               {"a": 0.85e308, "b": 1.7e308}],
)  # fmt: skip
def test_numbers_of_any_kind(shares: dict[str, Any]) -> None:
    natural = build(shares)._settings.natural
    assert natural.sum() == pytest.approx(1) and 0.3 < natural[0] < 0.4
    assert int(to_units(natural).sum()) == 2**40


@pytest.mark.parametrize(
    "shares, error, message",
    [
        ({}, ValueError, "shares must name at least one task"),
        ([("a", 1)], TypeError, "shares must be a mapping"),
        ("text", TypeError, "shares must be a mapping"),
        ({1: 0.5}, TypeError, r"shares must have the names of tasks as its keys, got \[1\]"),
        ({"a": 0}, ValueError, r"shares must be positive and finite, got {'a': 0.0}: leave out a task"),
        ({"a": 0.5, "b": -0.5}, ValueError, r"got {'b': -0.5}"),
        ({"a": float("nan")}, ValueError, r"got {'a': nan}"),
        ({"a": float("inf"), "b": 1}, ValueError, r"got {'a': inf}"),
        ({"a": 10**400, "b": 1}, ValueError, r"got {'a': inf}"),
        ({"a": 5e-324, "b": 1e308}, ValueError, r"shares of \['a'\] are so small beside the others"),
        ({"a": "0.5"}, TypeError, r"shares must be numbers, got {'a': 'str'}"),
        ({"a": None}, TypeError, r"got {'a': 'NoneType'}"),
        ({"a": True}, TypeError, r"got {'a': 'bool'}"),
        ({"a": 1j}, TypeError, r"got {'a': 'complex'}"),
        ({"a": [0.5]}, TypeError, r"got {'a': 'list'}"),
        ({"a": torch.tensor(0.5)}, TypeError, r"got {'a': 'Tensor'}"),
    ],
)
def test_bad_shares(shares: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(shares)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"task_of_example": [0, 1]}, TypeError, "pass task_of_example.*or, for a stream"),
        ({"dataset": range(5)}, TypeError, "dataset is checked against task_of_example; with shares"),
        ({"num_batches": None}, ValueError, "with shares an epoch has no length of its own: pass num_batches="),
        ({"num_batches": 0}, ValueError, "num_batches must be at least 1"),
        ({"max_epochs": 3}, ValueError, "max_epochs counts passes .* not known with shares: leave it out"),
        (
            {"tasks": ["code", "text", "legal", "poetry"]},
            ValueError,
            "tasks must be the names in shares, in their order",
        ),
        ({"tasks": ["text"]}, ValueError, "tasks must be the names in shares"),
        ({"tasks": "text"}, TypeError, "tasks must be a sequence of names"),
        ({"pinned": "verse"}, ValueError, "pinned names unknown tasks"),
        ({"probe_every": 1, "batch_size": 4}, ValueError, "probe_every=1 is too small"),
    ],
)
def test_what_does_not_go_with_shares(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**options)
    build(tasks=NAMES)


def test_a_policy_whose_guards_count_passes() -> None:
    class Capped(Restless):
        guard_defaults = {"max_epochs": 4.0}  # noqa: RUF012

    with pytest.raises(ValueError, match="max_epochs counts passes"):
        build(policy=Capped())
