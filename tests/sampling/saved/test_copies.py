"""Copies of samplers, policies and ledgers: they go on alike, by themselves, and leave what they were made of alone."""

from __future__ import annotations

import copy
import inspect
import json
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import taskgrad as tg
from taskgrad.sampling import AdaptiveBatchSampler, AdaptiveSampler, Ledger, TaskIndex
from tests.sampling.helpers import NAMES, TASK_OF_EXAMPLE, Restless
from tests.sampling.policies.test_every_policy import CASES as POLICIES
from tests.sampling.policies.test_every_policy import SIZES, TASKS
from tests.sampling.saved.test_state import build, rebased, reports, train


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def pickled_by(name: str) -> Callable[[Any], Any]:
    def go(value: Any) -> Any:
        module = pytest.importorskip(name)
        return module.loads(module.dumps(value))

    return go


def all_protocols(value: Any) -> Any:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        value = pickle.loads(pickle.dumps(value, protocol))
    return value


COPIES = {
    "copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled, "protocols": all_protocols,
    "twice": lambda value: copy.copy(pickled(value)), "cloudpickle": pickled_by("cloudpickle"),
    "dill": pickled_by("dill"),
}  # fmt: skip


def followed(sampler: AdaptiveBatchSampler) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = tg.track(model, NAMES, optimizer, verify=False)
    sampler.follow(tracker)
    x = torch.randn(len(TASK_OF_EXAMPLE), 3)
    for rows in islice(sampler, 7):
        with tracker.batch(torch.from_numpy(TASK_OF_EXAMPLE[rows])) as batch:
            losses = model(x[rows]).squeeze(1).square()
            batch.losses(losses)
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sampler.consumed == 7


def after(count: int) -> Callable[[AdaptiveBatchSampler], None]:
    def go(sampler: AdaptiveBatchSampler) -> None:
        train(sampler, count)

    return go


def without_epochs(sampler: AdaptiveBatchSampler) -> dict[str, Any]:
    """A copy first goes through the rest of the epoch, as after a load; a loop that was left begins another."""
    return {name: v for name, v in sampler.state_dict().items() if name not in ("epoch", "epochs", "digests")}


def reported(sampler: AdaptiveBatchSampler, count: int) -> list[list[int]]:
    """Batches, each followed by a report on the tasks of the policies' tests."""
    rows: list[list[int]] = []
    while len(rows) < count:
        for batch in islice(sampler, count - len(rows)):
            rows.append(batch)
            done = sampler._stream.uncounted
            sampler.update(replace(reports()[done % 30], step=done + 1, tasks=TASKS), lr=0.1)
    return rows


SAMPLERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "fresh": (build, lambda _: None),
    "in the middle of an epoch": (build, after(33)),
    "with a decision that waits": (lambda: build(update_every=10, delay=14), after(33)),
    "replicas": (lambda: build(num_replicas=3, rank=2, batch_size=4), after(12)),
    "shares": (lambda: build(shares={"text": 0.9, "code": 0.1}), after(30)),
    "rebased": (build, rebased),
    "followed": (lambda: build(tg.policies.OverwriteBoost), followed),
    "unnamed": (lambda: build(tasks=None), after(8)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", SAMPLERS)
def test_a_sampler(case: str, how: str) -> None:
    make, go = SAMPLERS[case]
    sampler = make()
    go(sampler)
    before = json.dumps(sampler.state_dict())
    twin = COPIES[how](sampler)
    assert type(twin) is type(sampler) and twin._following.tracker is None
    assert json.dumps(twin.state_dict()) == before and twin.policy is not sampler.policy
    for owner in (twin._settings, twin._settings.guards):
        arrays = [value for value in vars(owner).values() if isinstance(value, np.ndarray)]
        assert arrays and not any(array.flags.writeable for array in arrays)
    rows = train(twin, 40)
    assert json.dumps(sampler.state_dict()) == before
    if case != "followed":
        assert train(sampler, 40) == rows
        assert without_epochs(sampler) == without_epochs(twin)


@pytest.mark.parametrize("how", COPIES)
def test_the_form_of_examples(how: str) -> None:
    sampler = AdaptiveSampler(TASK_OF_EXAMPLE, 12, Restless(), tasks=NAMES, num_batches=9)
    assert len(list(islice(sampler, 30))) == 30
    twin = COPIES[how](sampler)
    assert len(twin) == 9 * 12
    assert list(islice(twin, 60)) == list(islice(sampler, 60))


@pytest.mark.parametrize("how", COPIES)
def test_what_reads_an_index_file(how: str, tmp_path: Path) -> None:
    index = TaskIndex.build(tmp_path / "index", TASK_OF_EXAMPLE, tasks=NAMES)
    sampler = AdaptiveBatchSampler(index, 12, Restless(), num_batches=9, update_every=1, delay=0)
    train(sampler, 4)
    twin = COPIES[how](sampler)
    assert twin._index.path == tmp_path / "index"
    assert train(twin, 20) == train(sampler, 20)


class Mine(AdaptiveBatchSampler):
    """With something of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.note, self.state = ["mine"], "of something else"


@pytest.mark.parametrize("how", COPIES)
def test_what_a_subclass_keeps(how: str) -> None:
    sampler = Mine(TASK_OF_EXAMPLE, 12, Restless(), tasks=NAMES)
    twin = COPIES[how](sampler)
    assert isinstance(twin, Mine) and (twin.note, twin.state) == (["mine"], "of something else")


def elsewhere(connection: Any, sampler: AdaptiveBatchSampler) -> None:
    rows = train(sampler, 15)
    connection.send((rows, sampler.state_dict()["ledger"]["digest"]))
    connection.close()


def from_here(method: str, result: Any) -> None:
    """A sampler goes on in a process begun by this one, and here."""
    sampler = build(update_every=10, delay=14)
    train(sampler, 33)
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=elsewhere, args=(there, sampler))
    process.start()
    there.close()
    assert here.poll(120)
    rows, digest = here.recv()
    process.join(60)
    assert process.exitcode == 0
    assert train(sampler, 15) == rows
    assert sampler.ledger.digest() == digest
    result.put("alike")


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_in_another_process(method: str) -> None:
    """Begun by a fresh one: pytest's own has threads, beside which a fork may hang."""
    result = multiprocessing.SimpleQueue()
    process = multiprocessing.Process(target=from_here, args=(method, result))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and result.get() == "alike"


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name, policy", POLICIES, ids=[name for name, _ in POLICIES])
def test_a_policy_goes_on_alike(name: str, policy: Any, how: str) -> None:
    data = dict(zip(TASKS, SIZES, strict=True))
    own = COPIES[how](policy)
    assert type(own) is type(policy)
    sampler = AdaptiveBatchSampler(data, 8, own, num_batches=9, update_every=1, delay=0, horizon=27)
    reported(sampler, 12)
    sampler.observe([1.0, 2.0, 3.0, 0.5])
    again = COPIES[how](sampler)
    assert reported(again, 15) == reported(sampler, 15)
    assert without_epochs(again) == without_epochs(sampler)


@pytest.mark.parametrize("how", COPIES)
def test_a_ledger(how: str) -> None:
    sampler = build()
    rebased(sampler)
    ledger = sampler.ledger
    before = json.dumps(ledger.to_dict())
    twin = COPIES[how](ledger)
    assert json.dumps(twin.to_dict()) == before and twin.digest() == ledger.digest()
    assert not twin[0].weights.flags.writeable
    assert [(entry.cause, entry.why) for entry in twin] == [(entry.cause, entry.why) for entry in ledger]
    twin.append(ledger[-1].effective_at + 1, ledger[0].weights, "of the copy")
    assert json.dumps(ledger.to_dict()) == before
    assert len(COPIES[how](Ledger((3, 4)))) == 0


def test_every_policy_that_is_exported_is_copied_here() -> None:
    exported = {name for name in tg.policies.__all__ if inspect.isclass(getattr(tg.policies, name))}
    assert exported - {"Policy", "PolicyState", "FixedPolicy", "ReportLike"} <= {name for name, _ in POLICIES}
