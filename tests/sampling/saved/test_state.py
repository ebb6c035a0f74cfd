"""Saved states that were damaged, by chance or by a hand that knows the digests: refused by name, or harmless."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taskgrad as tg
from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling import ledger as ledger_module
from taskgrad.sampling import policies as p
from taskgrad.sampling.engine.quota import to_units
from taskgrad.sampling.saved.resume import new_engine
from taskgrad.sampling.saved.state import _FIELDS as FIELDS
from tests.sampling.helpers import NAMES, SIZES, TASK_OF_EXAMPLE, Report, Restless, sealed_again

LENGTH = 25
MUTATIONS = 130
"""Of every state, plain ones and as many that are sealed again: 16 x 2 x 130 = 4,160."""


@functools.cache
def reports() -> tuple[Any, ...]:
    """Reports of a real tracker, with losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = tg.track(model, NAMES, optimizer, verify=False)
    x, ids = torch.randn(24, 3), torch.arange(24) % 4
    found = []
    for _ in range(30):
        with tracker.batch(ids.sort().values) as batch:
            losses = (model(x).squeeze(1) - x.sum(1)).square()
            batch.losses(losses)
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(tracker.report())
    tracker.remove()
    return tuple(found)


def train(sampler: AdaptiveBatchSampler, count: int) -> list[list[int]]:
    """Batches, each followed by a report."""
    out: list[list[int]] = []
    while len(out) < count:
        for batch in islice(sampler, count - len(out)):
            out.append(batch)
            done = sampler._stream.uncounted
            if isinstance(sampler.policy, Restless):
                sampler.update(Report(step=done + 1, value=float(sum(batch)), tasks=sampler.tasks))
            else:
                sampler.update(replace(reports()[done % 30], step=done + 1, tasks=sampler.tasks), lr=0.1)
    return out


def build(policy: Callable[[], Any] = Restless, **options: Any) -> AdaptiveBatchSampler:
    data = {} if "shares" in options else {"task_of_example": TASK_OF_EXAMPLE, "tasks": NAMES}
    options = {"batch_size": 12, "num_batches": LENGTH, "update_every": 3, "delay": 4, **data, **options}
    return AdaptiveBatchSampler(policy=policy(), **options)


def broken_epochs(sampler: AdaptiveBatchSampler) -> None:
    for length in (7, 7, 3, LENGTH, 11, 2, 2, 2):
        train(sampler, length)
        sampler._stream._drawings.clear()
    train(sampler, 4)


def rewound(sampler: AdaptiveBatchSampler) -> None:
    train(sampler, 2 * LENGTH + 5)
    sampler.rewind(0)
    train(sampler, 9)


def observed(sampler: AdaptiveBatchSampler) -> None:
    train(sampler, 8)
    sampler.observe([1.5, 2.5, 0.25, 3.0])
    train(sampler, 30)


def rebased(sampler: AdaptiveBatchSampler) -> None:
    old = AdaptiveBatchSampler({"text": 90, "song": 9}, 6, Restless(), num_batches=8, update_every=1, delay=0)
    train(old, 13)
    older = AdaptiveBatchSampler(shares={"a": 1, "b": 2, "c": 3}, policy=Restless(), num_batches=5, batch_size=3)
    older.rebase(old.state_dict())
    train(older, 3)
    sampler.rebase(json.loads(json.dumps(older.state_dict())))
    train(sampler, 31)


def long(sampler: AdaptiveBatchSampler) -> None:
    for _ in range(2):
        list(sampler)


def after(count: int) -> Callable[[AdaptiveBatchSampler], None]:
    def go(sampler: AdaptiveBatchSampler) -> None:
        train(sampler, count)

    return go


Case = tuple[Callable[[], AdaptiveBatchSampler], Callable[[AdaptiveBatchSampler], None]]
CASES: dict[str, Case] = {
    "fresh": (build, lambda _: None),
    "waiting": (lambda: build(update_every=10, delay=14), after(33)),
    "unnamed": (lambda: build(tasks=None), after(LENGTH)),
    "guards": (lambda: build(budget=0.6, max_change=3.0, probe_every=6, max_epochs=60), after(38)),
    "replay": (lambda: build(resume="replay"), after(LENGTH + 8)),
    "broken epochs": (build, broken_epochs),
    "rewound": (build, rewound),
    "eras": (build, rebased),
    "replicas": (lambda: build(batch_size=4, num_replicas=3, rank=1), after(40)),
    "snapshots": (
        lambda: build(p.Uniform, num_batches=1100, num_replicas=2, rank=0, probe_every=9, resume="replay"),
        long,
    ),
    "observed": (lambda: build(lambda: p.ShearedLlama(dict.fromkeys(NAMES, 1.0))), observed),
    "shares": (
        lambda: build(shares={name: float(size) for name, size in zip(NAMES, SIZES, strict=True)}),
        after(40),
    ),
    "OverwriteBoost": (lambda: build(p.OverwriteBoost), after(40)),
    "PiKE": (lambda: build(lambda: p.PiKE(1.0, 1.0, every=2)), after(40)),
    "Exp3": (lambda: build(p.Exp3), after(40)),
    "ADO": (lambda: build(lambda: p.ADO(start=2, fit_every=9, skip=0)), after(40)),
}


@functools.cache
def text_of(case: str) -> str:
    make, go = CASES[case]
    sampler = make()
    go(sampler)
    return json.dumps(sampler.state_dict())


def nested(depth: int) -> Any:
    out: Any = 1
    for _ in range(depth):
        out = [out]
    return out


WRONG: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 1 << 40, (1 << 40) + 1, 10**12, 1 << 62, 1 << 64, 10**400, 10**5000, -(10**20),
    0.0, 0.5, -0.5, 1e300, -1e300, 5e-324, float("nan"), float("inf"), float("-inf"), "", "x", "0", "\0", "\ud800",
    "\n", "y" * 300, [], [None], [[]], {}, {"": None}, {"x": 1}, {1: 2, "1": 3}, b"x", (), (1,), np.int64(3),
    np.array([1, 2]), torch.tensor(1.0), object(), {3},
    *(functools.partial(nested, depth) for depth in (5, 200, 600, 100_000)),
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) in ``value``."""
    for key, inner in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def numbers_near(value: int, rng: random.Random) -> int:
    return value + rng.choice([-1, 1, -2, 2, 7, -value, value, 1 << 20, 1 << 40, 10**12])


def mutate(state: dict[str, Any], rng: random.Random) -> str:
    """One change of any kind, anywhere in ``state``; returns the field."""
    names = [name for name in state if name != "ledger"] if rng.random() < 0.8 else list(state)
    field = rng.choice(names)
    where: list[tuple[Any, Any]] = [(state, field)]
    if isinstance(state[field], dict | list) and rng.random() < 0.9:
        where = list(places(state[field])) or where
    container, key = rng.choice(where)
    kind = rng.randrange(7)
    value = container[key]
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(rng.choice(container)))
    elif kind == 1:
        key = rng.choice(["extra", "format", "batch", "consumed", 3])
        container[key] = copy.deepcopy(value)
    elif kind == 2 and isinstance(container, list):
        other = rng.randrange(len(container))
        container[key], container[other] = container[other], container[key]
    elif kind in (2, 3) and type(value) is int:
        container[key] = numbers_near(value, rng)
    elif kind in (2, 3) and type(value) is float:
        container[key] = value * rng.choice([-1, 0, 0.5, 2, 1e30]) + rng.choice([0, 1e-3, -1e-3])
    elif kind in (2, 3) and type(value) is str and value:
        at = rng.randrange(len(value))
        container[key] = value[:at] + rng.choice(["", "a", "0", "\n", value[at] * 2]) + value[at + 1 :]
    else:
        wrong = rng.choice(WRONG)
        container[key] = wrong() if isinstance(wrong, functools.partial) else wrong
    return str(key) if container is state else field


def equal(a: Any, b: Any) -> bool:
    try:
        return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False


def refused(sampler: AdaptiveBatchSampler, state: Any, before: str) -> Exception | None:
    """What loading raised; then nothing has changed."""
    try:
        sampler.load_state_dict(state)
    except (TypeError, KeyError, ValueError) as error:
        assert json.dumps(sampler.state_dict()) == before
        return error
    return None


NAMED = [
    *FIELDS, "digests", "format", "field", "ledger", "batches of", "the sampler differs",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_mutation_is_refused_and_nothing_is_replaced(case: str) -> None:
    rng = random.Random(case)
    sampler = CASES[case][0]()
    sampler.load_state_dict(json.loads(text_of(case)))
    before = json.dumps(sampler.state_dict())
    assert json.loads(before)["ledger"] == json.loads(text_of(case))["ledger"]
    survived = 0
    for _ in range(MUTATIONS):
        state = json.loads(text_of(case))
        field = mutate(state, rng)
        same = equal(state, json.loads(text_of(case)))
        error = refused(sampler, state, before)
        if error is None:  # only what changed nothing, and missing snapshots
            survived += 1
            if state["snapshots"] == []:
                state["snapshots"], state["digests"] = (json.loads(text_of(case))[n] for n in ("snapshots", "digests"))
            assert equal(state, json.loads(text_of(case)))
        else:
            assert not same
            assert field in str(error) or (field == "digests" and "the field " in str(error)), error  # whose it is
    assert survived < MUTATIONS / 4
    expected = CASES[case][0]()
    expected.load_state_dict(json.loads(text_of(case)))
    assert list(islice(sampler, 10)) == list(islice(expected, 10))


def ledger_again(state: dict[str, Any], rng: random.Random) -> None:
    """A ledger with another entry at times, and with checksums that fit what was tampered with."""
    if rng.random() < 0.2:
        ledger = ledger_module.Ledger.from_dict(state["ledger"])
        weights = to_units(np.array([rng.random() for _ in ledger.sizes]))
        ledger.append(ledger[-1].effective_at + rng.choice([1, 5, 70, 1 << 30, 1 << 40, 1 << 61]), weights, "x")
        state["ledger"] = ledger.to_dict()
    past = state["ledger"]["past"]
    for number, earlier in enumerate(past):
        earlier["checksum"] = ledger_module._checksum(earlier, past[:number])
    state["ledger"]["checksum"] = ledger_module._checksum(state["ledger"], state["ledger"]["past"])


@pytest.mark.parametrize("case", CASES)
def test_what_is_sealed_again_is_refused_or_harmless(case: str) -> None:
    rng = random.Random(f"sealed {case}")
    sampler = CASES[case][0]()
    sampler.load_state_dict(json.loads(text_of(case)))
    before = json.dumps(sampler.state_dict())
    loaded = 0
    for _ in range(MUTATIONS):
        state = json.loads(text_of(case))
        memory = json.dumps(state["memory"])
        mutate(state, rng)
        try:
            if rng.random() < 0.9 and isinstance(state.get("ledger"), dict):
                ledger_again(state, rng)
        except (TypeError, ValueError, KeyError, RecursionError, AttributeError, IndexError):
            pass
        try:
            state = sealed_again(state)
        except (TypeError, ValueError, RecursionError):
            continue  # JSON cannot hold it, so it has no digest
        error = refused(sampler, state, before)
        if error is not None:
            assert any(name in str(error) for name in NAMED), error
            continue
        loaded += 1
        if json.dumps(state["memory"], default=str) == memory:  # what a policy keeps, only the policy can judge
            goes_on(sampler, state)
        sampler = CASES[case][0]()
        sampler.load_state_dict(json.loads(text_of(case)))
    assert loaded


def goes_on(sampler: AdaptiveBatchSampler, state: dict[str, Any]) -> None:
    """Batches follow, with updates, and they are those of the ledger; what is saved then can be loaded."""
    before = sampler.ledger.digest()
    assert before == state["ledger"]["digest"]
    stream = sampler._stream
    first = stream.span()[1] if stream.replay and stream._resumed else sampler.consumed
    batches = train(sampler, 100) if not stream.replay else list(islice(sampler, 100))
    again = by_definition(sampler)
    for k, batch in enumerate(batches):
        assert batch == again(first + k)
    saved = json.loads(json.dumps(sampler.state_dict()))
    copy.deepcopy(sampler).load_state_dict(saved)


def by_definition(sampler: AdaptiveBatchSampler) -> Callable[[int], list[int]]:
    """Batch k by the definition: a fresh engine, given nothing but the ledger."""
    engine = new_engine(sampler._settings, sampler.ledger)
    for entry in sampler.ledger:
        engine.commit(entry.effective_at, entry.weights)

    def batch(k: int) -> list[int]:
        if sampler._settings.fresh:
            counts, _offset = engine.counts(k)
            tasks: list[int] = np.repeat(np.arange(len(counts)), counts).tolist()
            return tasks
        return sampler._index.examples(engine, k, sampler.rank)  # type: ignore[union-attr]

    return batch


STEPS = st.one_of(
    st.tuples(st.sampled_from(["iter", "drop", "update", "report", "rewind", "observe", "load", "copy"]), st.just(0)),
    st.tuples(st.sampled_from(["next", "next", "next", "advance"]), st.integers(1, 30)),
)


@pytest.mark.filterwarnings("ignore:taskgrad.*run through")
@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(STEPS, st.integers(0, 3)), max_size=25),
    every=st.sampled_from([1, 3, 10]),
    delay=st.sampled_from([0, 4, 40]),
)
def test_whatever_was_done_its_state_can_be_loaded(steps: list[Any], every: int, delay: int) -> None:
    sampler = build(update_every=every, delay=delay, num_batches=9)
    iterations: list[Any] = []
    for (what, count), which in steps:
        stream = sampler._stream
        if what == "iter":
            iterations.append(iter(sampler))
        elif what == "drop" and iterations:
            del iterations[which % len(iterations)]
        elif what == "next" and iterations:
            list(islice(iterations[which % len(iterations)], count))
        elif what == "advance":
            sampler.advance(min(count, stream.drawn - stream.uncounted))
        elif what in ("update", "report") and stream.uncounted < stream.drawn:
            step = 1 + max(sampler._decisions._newest or 0, stream.drawn)
            slot = sampler._decisions._due(stream.uncounted)
            sampler.update(Report(step=step, value=1.0) if what == "report" and slot >= stream.drawn else None)
        elif what == "rewind":
            sampler.rewind(which % (sampler.epoch + 1))
            iterations = []
        elif what == "observe":
            sampler.observe([float(which)] * 4)
        elif what == "load":
            state = json.loads(json.dumps(sampler.state_dict()))
            sampler = build(update_every=[1, 3, 10, 3][which], delay=[0, 4, 40, 7][which], num_batches=9)
            sampler.load_state_dict(state)
            iterations = []
        elif what == "copy":
            sampler, iterations = copy.deepcopy(sampler), []
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = build(update_every=every, delay=delay, num_batches=9)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    again = by_definition(sampler)
    iterations.clear()
    for other in (resumed, copy.deepcopy(sampler)):
        assert other.consumed == sampler.consumed
        assert next(iter(other)) == again(sampler.consumed)


def test_a_replay_without_end_is_refused() -> None:
    sampler = build()
    state = json.loads(json.dumps(sampler.state_dict()))
    at = 10**12
    far = sealed_again({**state, "consumed": at, "most": at, "epoch": [at // LENGTH, at, at + LENGTH]})
    before = json.dumps(sampler.state_dict())
    error = refused(sampler, far, before)
    assert error is not None and "field 'consumed'" in str(error) and "the state of no run" in str(error)


def test_a_rebase_that_is_refused_changes_nothing() -> None:
    class Refuses(Restless):
        calls = 0

        def initial(self, state: p.PolicyState) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise ValueError("not these data")
            return super().initial(state)

    old, sampler = build(), build(Refuses)
    train(old, 30)
    train(sampler, 7)
    before = json.dumps(sampler.state_dict())
    with pytest.raises(ValueError, match="not these data"):
        sampler.rebase(old.state_dict())
    assert json.dumps(sampler.state_dict()) == before


def test_a_decision_that_waits_longer_than_the_next_ones_does() -> None:
    saved = build(update_every=10, delay=14)
    train(saved, 9)
    resumed = build(update_every=1, delay=0)
    resumed.load_state_dict(saved.state_dict())
    train(resumed, 26)
    ledger = [(entry.effective_at, entry.cause) for entry in resumed.ledger]
    assert ledger[:3] == [(0, "initial"), (20, "report on batch 5"), (30, "report on batch 29")]
    build(update_every=1, delay=0).load_state_dict(resumed.state_dict())


def test_counted_beyond_the_epoch_under_way() -> None:
    sampler = build(p.Uniform)
    first, second = iter(sampler), iter(sampler)
    list(islice(first, 5))
    sampler.advance(5)
    list(second)
    list(first)
    del second
    sampler.advance(LENGTH)
    assert sampler.consumed == LENGTH + 5 and sampler.epoch == 1
    state = sampler.state_dict()
    assert state["epoch"] == [1, LENGTH, 2 * LENGTH]
    resumed = build(p.Uniform)
    resumed.load_state_dict(state)
    assert len(list(resumed)) == LENGTH - 5


@pytest.mark.parametrize("name", ["num_batches", "update_every", "delay"])
def test_more_batches_than_any_run_has(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at most 2\*\*40"):
        build(**{name: 2**63 - 1})
    sampler = build(**{name: 2**40})
    train(sampler, 5)
    build(**{name: 2**40}).load_state_dict(sampler.state_dict())


def test_the_snapshot_of_an_epoch_that_began_elsewhere_is_saved() -> None:
    sampler = build(p.Uniform, num_batches=3000, resume="replay")
    train(sampler, 1100)
    list(islice(sampler, 1200))
    sampler.advance(1200)
    assert sampler.epoch == 1
    assert [snapshot["batch"] for snapshot in sampler.state_dict()["snapshots"]] == [1024, 2048]


def test_a_decision_of_several_ranks_that_is_late_where_one_goes_on_alone() -> None:
    saved = build()
    train(saved, 14)
    state = json.loads(json.dumps(saved.state_dict()))
    last = saved.ledger[-1].effective_at
    decisions = [[last + 1, [0.1, 0.2, 0.3, 0.4], "report on batch 9", ""]]
    decisions.append([last + 2, [0.4, 0.3, 0.2, 0.1], "report on batch 10", ""])
    resumed = build()
    resumed.load_state_dict(sealed_again({**state, "consumed": 23, "most": 23, "waiting": decisions}))
    assert last + 2 < 23
    rows = list(islice(resumed, 2))
    entry = resumed.ledger[-1]
    assert (entry.effective_at, entry.cause) == (24, "report on batch 10") and len(rows) == 2
    batch = by_definition(resumed)
    assert [batch(23 + k) for k in range(2)] == rows
