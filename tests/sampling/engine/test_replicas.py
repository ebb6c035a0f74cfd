"""Who gets which rows of a batch: by the definition, in both engines, over whole runs and across saves."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.engine import index_numpy, native
from taskgrad.sampling.engine.index import IndexEngine
from taskgrad.sampling.engine.quota import to_units
from taskgrad.sampling.engine.replicas import deal
from tests.sampling.helpers import ENGINES, needs_extension, with_engine

SIZES = np.array([5000, 300, 40, 7, 1])


implementation = pytest.fixture(scope="module", params=ENGINES, autouse=True)(with_engine)


def shares(*values: float) -> np.ndarray:
    array = np.array(values)
    return to_units(array / array.sum())


def engine(replicas: int, rows: int = 4, sizes: np.ndarray = SIZES, seed: int = 3, **options: Any) -> IndexEngine:
    out = IndexEngine(seed, sizes, replicas * rows, num_replicas=replicas, **options)
    out.commit(options.get("first_batch", 0), to_units(sizes / sizes.sum()))
    return out


def restless(replicas: int, rows: int = 4, **options: Any) -> IndexEngine:
    """Weights move; task 4 has rows in few batches."""
    out = engine(replicas, rows, **options)
    out.commit(700, shares(1, 2, 3, 0.01, 1e-7))
    out.commit(2500, shares(5, 1, 1, 1, 1))
    return out


def dealt(counts: np.ndarray, offset: int, replicas: int) -> np.ndarray:
    """Rows of each task that each replica gets, int64 [replicas, T], straight from the definition."""
    task = np.repeat(np.arange(len(counts)), counts)
    each = [np.bincount(task[(r + offset) % replicas :: replicas], minlength=len(counts)) for r in range(replicas)]
    return np.array(each)


def best_offset(had: np.ndarray, counts: np.ndarray) -> int:
    """The smallest offset of the least sum of squared deviations; ``had`` int64 [replicas, T]: rows so far."""
    replicas = len(had)
    costs = []
    for offset in range(replicas):
        after = had + dealt(counts, offset, replicas)
        costs.append(int(((replicas * after - after.sum(axis=0)) ** 2).sum()))
    return costs.index(min(costs))


def gap(had: np.ndarray) -> int:
    return int((had.max(axis=0) - had.min(axis=0)).max())


@settings(max_examples=60, deadline=None)
@given(
    replicas=st.integers(2, 9),
    rows=st.integers(1, 5),
    tasks=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_offsets_are_those_of_the_definition(replicas: int, rows: int, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    e = IndexEngine(seed, rng.integers(1, 50, tasks), replicas * rows, num_replicas=replicas)
    had = np.zeros((replicas, tasks), dtype=np.int64)
    for k in range(25):
        if k % 8 == 0:
            e.commit(k, to_units(rng.dirichlet(np.full(tasks, 0.4))))
        counts, offset = e.counts(k)
        assert offset == best_offset(had, counts)
        had += dealt(counts, offset, replicas)


@settings(max_examples=60, deadline=None)
@given(
    replicas=st.integers(2, 12),
    batches=st.lists(st.lists(st.integers(0, 30), min_size=4, max_size=4), min_size=1, max_size=12),
)
def test_deviations_are_those_of_the_definition(replicas: int, batches: list[list[int]]) -> None:
    had, deviations = np.zeros((replicas, 4), dtype=np.int64), np.zeros((4, replicas), dtype=np.int64)
    for batch in batches:
        counts = np.array(batch)
        expected = best_offset(had, counts)
        offset, deviations = deal(counts, deviations)
        had += dealt(counts, offset, replicas)
        assert offset == expected
        assert np.array_equal(deviations.T, replicas * had - had.sum(axis=0))


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_the_replicas_rows_make_up_the_batch(replicas: int) -> None:
    e, alone = engine(replicas, 24 // replicas, probe_every=9), engine(1, 24, probe_every=9)
    starts = np.cumsum(SIZES) - SIZES + 10
    order = np.random.default_rng(0).permutation(int(SIZES.sum()) + 10).astype(np.uint32)
    for k in range(60):
        draw = e.draw(k)
        counts, offset = e.counts(k)
        assert np.array_equal(counts, draw.counts) and offset == draw.offset
        rows = np.repeat(starts, draw.counts) + draw.positions
        for r in range(replicas):
            mine = rows[(r + offset) % replicas :: replicas]
            assert e.examples(k, starts, None, r) == mine.tolist()
            assert e.examples(k, starts, order, r) == order[mine].tolist()
            assert e.examples(k, starts, order.astype(np.uint64), r) == order[mine].tolist()
        other = alone.draw(k)  # how many share it does not change the batch
        assert np.array_equal(draw.positions, other.positions) and other.offset == 0


def test_a_row_in_every_batch_goes_round() -> None:
    # 511 : 1 of 512 rows for 8 replicas, the batch of 64 each.
    for turned in (False, True):
        e = IndexEngine(0, np.array([511_000, 1000])[:: -1 if turned else 1], 512, num_replicas=8)
        e.commit(0, shares(*([1, 511] if turned else [511, 1])))
        rare = 0 if turned else 1
        owners = []
        for k in range(80):
            counts, offset = e.counts(k)
            assert counts[rare] == 1
            owners.append(int(dealt(counts, offset, 8)[:, rare].argmax()))
        assert all(sorted(owners[k : k + 8]) == list(range(8)) for k in range(0, 80, 8))


@pytest.mark.parametrize("replicas", [2, 3, 8, 16])
def test_a_row_in_every_nth_batch_goes_round_too(replicas: int) -> None:
    e = IndexEngine(0, np.array([10**6, 1000]), replicas * 4, num_replicas=replicas)
    e.commit(0, shares(4 * replicas**2 - 1, 1))
    had = np.zeros((replicas, 2), dtype=np.int64)
    for k in range(replicas**2 * 5):
        counts, offset = e.counts(k)
        had += dealt(counts, offset, replicas)
    assert had[:, 1].sum() == replicas * 5
    assert set(had[:, 1].tolist()) == {5}


MIXES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uneven": lambda rng, tasks: rng.dirichlet(np.full(tasks, 0.3)),
    "small ratios": lambda rng, tasks: rng.integers(1, 4, tasks).astype(float),  # periodic, and the hardest
    "one large task": lambda rng, tasks: np.where(np.arange(tasks) == 0, 50.0 * tasks, 1.0),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tasks", [2, 3, 4, 5, 8, 16, 60])
def test_counts_per_task_differ_little_between_replicas(implementation: str, tasks: int, mix: str) -> None:
    rng = np.random.default_rng(tasks)
    batches = 1500 if implementation == "C++" else 150
    for replicas in (2, 3, 5, 8, 13, 16):
        for moves in (False, True):
            rows = int(rng.choice([1, 3, 16]))
            e = IndexEngine(int(rng.integers(2**60)), np.full(tasks, 10**5), rows * replicas, num_replicas=replicas)
            had = np.zeros((replicas, tasks), dtype=np.int64)
            worst = 0
            for k in range(batches):
                if k == 0 or (moves and k % 50 == 0):
                    w = MIXES[mix](rng, tasks)
                    e.commit(k, to_units(w / w.sum()))
                counts, offset = e.counts(k)
                had += dealt(counts, offset, replicas)
                worst = max(worst, gap(had))
            assert worst <= 2 + tasks / 2 + math.log2(replicas)  # measured, see taskgrad.sampling.engine.replicas


@pytest.mark.parametrize("options", [{}, {"probe_every": 9}, {"first_batch": 40, "era": 2}])
def test_a_snapshot_carries_the_deviations(options: dict[str, Any]) -> None:
    straight = restless(6, **options)
    first = straight._first
    saved = json.loads(json.dumps(straight.snapshot(first + 2200)))
    assert saved["batch"] == first + 2048 and saved["replicas"] == 6 and len(saved["deviations"]) == 30
    resumed = restless(6, **options)
    assert resumed.restore(saved)
    for k in (2200, 5, 2600, 2048):
        a, b = straight.draw(first + k), resumed.draw(first + k)
        assert a.offset == b.offset and np.array_equal(a.positions, b.positions)
    restless(6, **options).check(saved)


def test_offsets_are_the_same_at_any_time() -> None:
    straight = restless(6)
    expected = [straight.counts(k)[1] for k in range(2700)]
    assert len(set(expected)) == 6
    jumping = restless(6)
    for k in (2699, 3, 1024, 2, 1025, 1023, 2500, 700, 699):
        assert jumping.draw(k).offset == jumping.counts(k)[1] == expected[k]
    changed = engine(6)
    for k in range(900):
        changed.counts(k)
    changed.commit(700, shares(1, 2, 3, 0.01, 1e-7))
    assert [changed.counts(k)[1] for k in range(690, 720)] == expected[690:720]


def test_a_snapshot_of_another_number_of_replicas_is_left_alone() -> None:
    for there, here in ((6, 4), (6, 1), (1, 6), (2, 12)):
        saved = restless(there, 24 // there).snapshot(1500)
        resumed, straight = restless(here, 24 // here), restless(here, 24 // here)
        assert resumed.restore(saved) is False
        for k in (1500, 3, 2600):
            assert resumed.counts(k)[1] == straight.counts(k)[1]
        restless(here, 24 // here).check(saved)  # it can be checked all the same
        bad = copy.deepcopy(saved)
        bad["credit"][0] += 1
        with pytest.raises(ValueError, match="was changed or belongs to another stream: its digest"):
            resumed.restore(bad)


def test_snapshots_without_replicas_are_as_before() -> None:
    assert set(restless(1).snapshot(1500)) == {"batch", "credit", "drawn", "digest"}
    digest = "7554a14a53922d78c10980a25f62f2ce26fa75d5a16630c7814966e848e8f863"
    assert restless(1).snapshot(1500)["digest"] == digest


def test_a_changed_snapshot_is_refused() -> None:
    saved = restless(6).snapshot(1500)
    for change in (
        {"deviations": [*saved["deviations"][:-1], saved["deviations"][-1] + 6]},
        {"deviations": saved["deviations"][:-1]},
        {"deviations": [saved["deviations"][i : i + 6] for i in range(0, 30, 6)]},
        {"deviations": None},
        *({"replicas": n} for n in (0, -6, 7, 2, 12, 2**70, 6.0, "6", True, None)),
    ):
        with pytest.raises(ValueError, match="changed or belongs to another stream"):
            restless(6).restore({**saved, **change})
    for missing in ("replicas", "deviations"):
        with pytest.raises(ValueError, match="changed or belongs to another stream"):
            restless(6).restore({name: value for name, value in saved.items() if name != missing})


@pytest.mark.parametrize(
    "by", [[6, 0], [6, -6], [1, -1], [10**12, -(10**12)]], ids=["sum", "a replica's rows", "no whole rows", "too many"]
)
def test_forged_deviations_are_refused_or_found_by_check(by: list[int]) -> None:
    e = restless(6)
    saved = e.snapshot(1500)
    forged = np.array(saved["deviations"]).reshape(5, 6)
    forged[0, :2] += by
    credit, drawn = np.array(saved["credit"]), np.array(saved["drawn"])
    digest = e._digest(1024, 6, [credit, drawn, forged.ravel()])
    with pytest.raises(ValueError, match="its counts do not add up"):
        restless(6).restore({**saved, "deviations": forged.ravel().tolist(), "digest": digest})
    forged[1, :2] -= by  # each replica has as many rows as before, of other tasks
    digest = e._digest(1024, 6, [credit, drawn, forged.ravel()])
    plausible = {**saved, "deviations": forged.ravel().tolist(), "digest": digest}
    if by == [6, -6]:
        restless(6).restore(plausible)
        with pytest.raises(ValueError, match="is not what replaying the batches before it gives"):
            restless(6).check(plausible)
    else:
        with pytest.raises(ValueError, match="its counts do not add up"):
            restless(6).restore(plausible)


def test_copies_deal_the_same() -> None:
    e = restless(6)
    for twin in (copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert [twin.counts(k)[1] for k in range(990, 1010)] == [e.counts(k)[1] for k in range(990, 1010)]
        assert twin.snapshot(1024) == e.snapshot(1024)


def test_counts_behind_another_cursor_replay_nothing(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "C++":
        pytest.skip("steps are counted in Python")
    steps = 0
    real = index_numpy.Engine._step

    def counted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return real(*args)

    monkeypatch.setattr(index_numpy.Engine, "_step", counted)
    e = engine(4)
    starts = np.zeros(5, dtype=np.int64)
    for k in range(200):
        e.examples(k, starts, None, 1)
        if k >= 64:
            e.counts(k - 64)
            e.totals(k - 63)
    assert steps == 200 + 136


@pytest.mark.parametrize(
    "batch_size, replicas, message",
    [
        (16, 0, "batch_size must be a multiple of num_replicas, got 16 rows for 0 replicas"),
        (16, -4, "got 16 rows for -4 replicas"),
        (16, 5, "got 16 rows for 5 replicas"),
        (16, 32, "got 16 rows for 32 replicas"),
    ],
)
def test_the_number_of_replicas_is_checked(batch_size: int, replicas: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexEngine(0, SIZES, batch_size, num_replicas=replicas)


def test_limits_of_replicas_ranks_and_orders() -> None:
    with pytest.raises(ValueError, match=r"num_replicas x tasks must be at most 2\*\*24, got 512 x 40000"):
        IndexEngine(0, np.ones(40_000, dtype=np.int64), 512, num_replicas=512)
    e = engine(4)
    starts = np.cumsum(SIZES) - SIZES
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank must be between 0 and 3, got {rank}"):
            e.examples(0, starts, None, rank)
    with pytest.raises(ValueError, match="starts must be one per task"):
        e.examples(0, starts[:-1], None, 0)
    with pytest.raises(IndexError):
        for k in range(9):
            e.examples(k, starts, np.arange(4000, dtype=np.uint32), 0)
    with pytest.raises(ValueError, match="lies before batch 0"):
        e.counts(-1)


@needs_extension
def test_many_replicas_in_both_engines() -> None:
    module, _ = native.load()
    assert module is not None
    sizes = np.random.default_rng(2).integers(1, 400, 90)
    engines = [make(7, sizes, 640, 0, 0, 12, None, 320) for make in (index_numpy.Engine, module.Engine)]
    for each in engines:
        each.commit(0, to_units(sizes / sizes.sum()))
        each.commit(30, to_units(np.ones(90) / 90))
    for k in range(80):
        (counts, offset), (others, other) = (each.counts(k) for each in engines)
        assert offset == other and np.array_equal(counts, others)
    assert all(np.array_equal(a, b) for a, b in zip(engines[0].state(80), engines[1].state(80), strict=True))
