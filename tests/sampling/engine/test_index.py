from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.engine import index_numpy, native
from taskgrad.sampling.engine.index import MAX_BATCHES, MAX_TASKS, Draw, IndexEngine
from taskgrad.sampling.engine.index_numpy import MAX_BATCH_SIZE
from taskgrad.sampling.engine.quota import ONE, to_units
from tests.sampling.helpers import ENGINES, with_engine

SIZES = np.array([5000, 300, 40, 7, 1])


implementation = pytest.fixture(scope="module", params=ENGINES, autouse=True)(with_engine)


def weights(*values: float) -> np.ndarray:
    array = np.array(values)
    return to_units(array / array.sum())


def engine(sizes: np.ndarray = SIZES, batch_size: int = 16, seed: int = 3, **options: object) -> IndexEngine:
    out = IndexEngine(seed, sizes, batch_size, **options)  # type: ignore[arg-type]
    out.commit(int(options.get("first_batch", 0)), to_units(sizes / sizes.sum()))  # type: ignore[call-overload]
    return out


def same(a: Draw, b: Draw) -> bool:
    return bool(np.array_equal(a.counts, b.counts) and np.array_equal(a.positions, b.positions))


def test_batches_are_full_sorted_by_task_and_in_range() -> None:
    e = engine()
    for k in range(200):
        draw = e.draw(k)
        assert draw.counts.sum() == 16 == len(draw.positions)
        tasks = np.repeat(np.arange(5), draw.counts)
        assert (draw.positions >= 0).all() and (draw.positions < SIZES[tasks]).all()


def test_each_pass_holds_every_example_once_and_passes_differ() -> None:
    e = engine(sizes := np.array([90, 30, 12]), batch_size=11)
    drawn: list[list[int]] = [[], [], []]
    for k in range(120):
        draw = e.draw(k)
        for t, part in enumerate(np.split(draw.positions, np.cumsum(draw.counts)[:-1])):
            drawn[t] += part.tolist()
    for t, size in enumerate(sizes):
        passes = [drawn[t][i : i + size] for i in range(0, len(drawn[t]) - size + 1, size)]
        assert len(passes) >= 9
        assert all(sorted(p) == list(range(size)) for p in passes)
        assert all(a != b for a, b in itertools.combinations(passes, 2))


def test_large_tasks_walk_through_windows_of_the_same_permutation() -> None:
    e = engine(np.array([9000]), batch_size=100)
    drawn = [int(p) for k in range(90) for p in e.draw(k).positions]
    assert sorted(drawn) == list(range(9000))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 400), min_size=1, max_size=12))
def test_any_batch_at_any_time_is_the_same(seed: int, order: list[int]) -> None:
    changes = [(5, weights(1, 1, 1, 1, 1)), (300, weights(0, 0, 5, 1, 2)), (301, weights(9, 0, 0, 0, 1))]
    straight, jumping = engine(seed=seed, probe_every=9), engine(seed=seed, probe_every=9)
    for at, w in changes:
        straight.commit(at, w)
        jumping.commit(at, w)
    batches = [straight.draw(k) for k in range(max(order) + 1)]
    assert all(same(jumping.draw(k), batches[k]) for k in order)


def test_far_seeks_use_snapshots_and_agree() -> None:
    straight, jumping = engine(), engine()
    last = [straight.draw(k) for k in range(3000)][-1]
    assert same(jumping.draw(2999), last)
    assert same(straight.draw(2999), jumping.draw(2999))
    assert same(straight.draw(17), jumping.draw(17))
    assert np.array_equal(straight.totals(1500), jumping.totals(1500))


def test_snapshots_are_thinned_out_and_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_numpy, "SNAPSHOT_BYTES", 0)
    monkeypatch.setattr(index_numpy, "SNAPSHOT_EVERY", 64)
    monkeypatch.setattr(native, "engine_class", lambda: index_numpy.Engine)
    thin = engine()
    thin.totals(3000)
    monkeypatch.undo()
    full = engine()
    assert len(thin._core._snapshots) <= 17
    assert all(np.array_equal(thin.totals(k), full.totals(k)) for k in (2999, 1234, 63, 0, 3001))


def test_a_change_drops_what_was_derived_beyond_it() -> None:
    e, fresh = engine(), engine()
    for k in range(700):
        e.draw(k)
    for x in (e, fresh):
        x.commit(100, weights(1, 1, 1, 1, 1))
    assert all(same(e.draw(k), fresh.draw(k)) for k in (99, 100, 101, 500, 650))


def test_seeds_and_eras_give_other_orders_for_the_same_mix() -> None:
    streams = [
        [e.draw(k).positions.tolist() for k in range(20)]
        for e in (engine(seed=1), engine(seed=2), engine(seed=1, era=1), engine(seed=2**64 - 1))
    ]
    assert all(a != b for a, b in itertools.combinations(streams, 2))


def test_realised_counts_follow_the_weights_to_less_than_one_example() -> None:
    e = engine()
    target = np.zeros(5, dtype=object)
    mixes = [to_units(SIZES / SIZES.sum()), weights(1, 2, 3, 4, 5)]
    e.commit(64, mixes[1])
    for k in range(200):
        target = target + mixes[k >= 64].astype(object) * 16
        off = np.abs(e.totals(k + 1).astype(object) * ONE - target).max() / ONE
        assert off < (1 if k < 64 else 1 + math.log(5))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, 6), st.integers(1, 12))),
    st.integers(0, 2**32),
)
def test_no_task_stays_unseen_for_longer_than_probe_every(shape: tuple[int, int, int], seed: int) -> None:
    tasks, batch_size, probe_every = shape
    if tasks > probe_every * batch_size:
        probe_every = -(-tasks // batch_size)
    rng = np.random.default_rng(seed)
    e = engine(np.full(tasks, 50), batch_size, probe_every=probe_every)
    seen = np.full(tasks, -1)
    for k in range(120):
        if k % 7 == 1:
            e.commit(k, to_units(rng.dirichlet(np.full(tasks, 0.1))))
        seen = np.where(e.draw(k).counts > 0, k, seen)
        assert (k - seen < probe_every).all()


def test_probes_are_counted_and_leave_no_debt() -> None:
    e = engine(np.array([1000, 1000]), batch_size=8, probe_every=5)
    e.commit(1, weights(1, 1e-6))
    for k in range(500):
        e.draw(k)
    before = e.totals(500)
    assert 95 <= e.probes(500)[1] <= 105
    e.commit(500, weights(1, 1))
    assert abs(int((e.totals(510) - before)[1]) - 40) <= 1  # its share is back at once


def test_probe_every_that_cannot_be_kept_raises() -> None:
    with pytest.raises(ValueError, match=r"probe_every=2 is too small: 9 tasks .* at least 3"):
        IndexEngine(0, np.full(9, 5), 4, probe_every=2)


@pytest.mark.parametrize("batch_size", [10, 400])
def test_used_up_tasks_give_their_share_to_the_others_in_proportion(batch_size: int) -> None:
    sizes = np.array([40_000, 20_000, 97, *[3] * 40])
    e = engine(sizes, batch_size, max_draws=sizes * 2)
    e.commit(1, weights(4, 2, 3, *[0.05] * 40))
    start = e.totals(1)
    for k in range(2, 60_000 // batch_size):
        totals = e.totals(k) - start
        assert abs(int(totals[0] - 2 * totals[1])) <= 6
    assert (totals + start)[2:].tolist() == [194, *[6] * 40]


def test_every_task_reaches_its_cap_exactly_and_then_no_batch_can_be_filled() -> None:
    sizes = np.array([33, 20, 11])
    e = engine(sizes, batch_size=8, max_draws=sizes * 3)
    for k in range(24):
        e.draw(k)
    assert e.totals(24).tolist() == [99, 60, 33]
    with pytest.raises(RuntimeError, match=r"batch 24 cannot be filled.*raise max_epochs"):
        e.draw(24)


def test_a_cap_does_not_wake_tasks_of_weight_zero() -> None:
    e = engine(np.array([100, 10]), batch_size=4, max_draws=np.array([100, 10]))
    e.commit(1, weights(0, 1))
    with pytest.raises(RuntimeError, match="give other tasks some weight"):
        for k in range(30):
            e.draw(k)
    assert e.totals(2)[0] <= 5


def test_the_cap_is_stronger_than_the_probe() -> None:
    e = engine(np.array([1000, 3]), batch_size=4, probe_every=2, max_draws=np.array([1000, 3]))
    for k in range(100):
        e.draw(k)
    assert e.totals(100).tolist() == [397, 3]


def test_changes_come_in_order_and_batches_before_the_first_are_refused() -> None:
    e = engine(first_batch=40)
    with pytest.raises(ValueError, match="batch 40 is not after the last change"):
        e.commit(40, weights(1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="before batch 40"):
        e.draw(39)
    assert e.draw(40).counts.sum() == 16


@pytest.mark.parametrize("batch_size", [0, MAX_BATCH_SIZE + 1])
def test_batch_size_is_checked(batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size must be between"):
        IndexEngine(0, SIZES, batch_size)


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        (np.array([], dtype=np.int64), {}, "between 1 and 1048576 tasks, got 0"),
        (np.ones(MAX_TASKS + 1, dtype=np.int64), {}, "between 1 and 1048576 tasks, got 1048577"),
        (np.array([3, 0]), {}, "sizes must be positive"),
        (np.array([2**62, 2**62, 2**62]), {}, r"sum to at most 2\*\*48"),
        (np.array([3.0, 1.0]), {}, "sizes must be int64, one per task, got float64"),
        (np.array([[3, 1]]), {}, r"sizes must be int64, one per task, got int64 of shape \(1, 2\)"),
        (SIZES, {"first_batch": -1}, "first_batch must be between"),
        (SIZES, {"first_batch": MAX_BATCHES}, "first_batch must be between"),
        (SIZES, {"max_draws": np.ones(4, dtype=np.int64)}, r"max_draws must be int64, shape \(5,\)"),
        (SIZES, {"max_draws": np.array([1, 1, 1, 1, -1])}, "max_draws must not be negative, got -1"),
    ],
)
def test_limits_are_checked(sizes: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexEngine(0, sizes, 16, **options)


def test_batches_and_weights_are_checked() -> None:
    e = engine()
    with pytest.raises(ValueError, match="beyond the limit of 2"):
        e.draw(MAX_BATCHES + 1)
    for bad in (weights(1, 1), np.full(5, 0.2), np.array([ONE + 1, -1, 0, 0, 0]), np.full(5, ONE)):
        with pytest.raises(ValueError, match="weights must"):
            e.commit(3, bad)
    fresh = IndexEngine(0, SIZES, 4, first_batch=7)
    with pytest.raises(RuntimeError, match="no weights are committed for batch 7 yet"):
        fresh.draw(7)
    assert fresh.totals(7).tolist() == [0] * 5
    with pytest.raises(ValueError, match="the first weights must be for batch 7, got batch 8"):
        fresh.commit(8, weights(1, 1, 1, 1, 1))


def test_huge_sizes_and_caps_do_not_overflow() -> None:
    sizes = np.array([2**47, 2**46, 3])
    e = IndexEngine(2**64 - 1, sizes, MAX_BATCH_SIZE, era=2**70, max_draws=sizes * 2, probe_every=3)
    e.commit(0, weights(1, 1, 1))
    for k in range(8):
        draw = e.draw(k)
        assert draw.counts.sum() == MAX_BATCH_SIZE and (draw.counts >= 0).all()
        assert (draw.positions >= 0).all() and (draw.positions < np.repeat(sizes, draw.counts)).all()
    assert e.totals(8).tolist() == [MAX_BATCH_SIZE * 4 - 3, MAX_BATCH_SIZE * 4 - 3, 6]


def test_the_largest_batch_does_not_overflow() -> None:
    e = IndexEngine(0, np.array([30_000, 10_000]), MAX_BATCH_SIZE)
    e.commit(0, weights(3, 1))
    assert e.draw(2).counts.tolist() == [MAX_BATCH_SIZE * 3 // 4, MAX_BATCH_SIZE // 4]


GUARDS: dict[str, Any] = {"probe_every": 9, "max_draws": SIZES * 4000}


def moved(**options: Any) -> IndexEngine:
    e = engine(**options)
    e.commit(700, weights(1, 2, 3, 0.01, 1e-7))
    e.commit(2500, weights(5, 1, 1, 1, 1))
    return e


@pytest.mark.parametrize("options", [{}, GUARDS, {"first_batch": 40, "era": 2}])
def test_a_snapshot_spares_the_replay_and_can_be_checked(options: dict[str, Any]) -> None:
    straight = moved(**options)
    first = straight._first
    saved = json.loads(json.dumps(straight.snapshot(first + 2200)))
    assert saved["batch"] == first + 2048
    assert straight.snapshot(first + 1023)["batch"] == first
    resumed = moved(**options)
    resumed.restore(saved)
    assert same(resumed.draw(first + 2200), straight.draw(first + 2200))
    assert same(resumed.draw(first + 5), straight.draw(first + 5))
    assert same(resumed.draw(first + 2600), straight.draw(first + 2600))
    moved(**options).check(saved)


def test_a_restored_snapshot_makes_far_batches_cheap(implementation: str) -> None:
    far = 20_000 if implementation == "NumPy" else 1_000_000
    straight, resumed = engine(), engine()
    start = time.perf_counter()
    straight.totals(far)
    replay = time.perf_counter() - start
    saved = straight.snapshot(far)
    start = time.perf_counter()
    resumed.restore(saved)
    draw = resumed.draw(far)
    assert time.perf_counter() - start < replay / 4
    assert same(draw, straight.draw(far))


def test_a_snapshot_that_was_changed_is_refused() -> None:
    e = moved(**GUARDS)
    saved = e.snapshot(1500)
    for name in ("credit", "drawn", "last_seen", "probes"):
        for change in ({0: 1}, {0: 1, 1: -1}):
            bad = copy.deepcopy(saved)
            for task, by in change.items():
                bad[name][task] += by
            with pytest.raises(ValueError, match="snapshot in the saved state was changed or belongs to another"):
                moved(**GUARDS).restore(bad)
    for bad in (
        {**saved, "batch": 2048},
        {**saved, "credit": saved["credit"][:-1]},
        {**saved, "drawn": [10**30] * 5},
        {name: saved[name] for name in saved if name != "probes"},
    ):
        with pytest.raises(ValueError, match="changed or belongs to another stream"):
            moved(**GUARDS).restore(bad)


def test_a_snapshot_of_another_stream_is_refused() -> None:
    saved = moved().snapshot(1500)
    other = engine()
    other.commit(700, weights(1, 1, 1, 1, 1))
    for e in (moved(seed=4), moved(era=1), moved(batch_size=17), other):
        with pytest.raises(ValueError, match="belongs to another stream: its digest"):
            e.restore(saved)
    later = engine()  # what comes after the snapshot does not matter
    later.commit(700, weights(1, 2, 3, 0.01, 1e-7))
    later.restore(saved)


def test_check_finds_a_forged_snapshot_whose_digest_is_right() -> None:
    e = moved()
    forged = e.snapshot(1500)
    forged["drawn"][0] += 1
    forged["drawn"][1] -= 1
    forged["digest"] = e._digest(1024, 1, [np.array(forged["credit"]), np.array(forged["drawn"])])
    moved().restore(forged)
    with pytest.raises(ValueError, match="is not what replaying the batches before it gives"):
        moved().check(forged)


def test_weights_committed_before_a_restored_snapshot_drop_it() -> None:
    e, fresh = engine(), engine()
    e.restore(engine().snapshot(2100))
    for x in (e, fresh):
        x.commit(1000, weights(1, 1, 1, 1, 1))
    assert same(e.draw(2100), fresh.draw(2100))


def test_copies_draw_the_same_and_go_their_own_way() -> None:
    e = moved(**GUARDS)
    e.draw(50)
    for twin in (copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert same(twin.draw(1000), e.draw(1000))
        twin.commit(2600, weights(1, 1, 1, 1, 1))
    e.commit(2501, weights(1, 1, 1, 1, 1))


def test_threads_get_the_batches_that_one_would() -> None:
    sizes = np.random.default_rng(1).integers(1, 3000, 200)
    options: dict[str, Any] = {"sizes": sizes, "batch_size": 64, "probe_every": 30}
    alone, shared = engine(**options), engine(**options)
    count = 120
    expected = [alone.draw(k) for k in range(count)]
    wrong: list[int] = []

    def work(offset: int) -> None:
        order = [(k * 7 + offset * 31) % count if offset % 2 else k for k in range(count)]
        for k in order:
            draw, totals = shared.draw(k), shared.totals(k)
            if not same(draw, expected[k]) or int(totals.sum()) != 64 * k:
                wrong.append(k)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_fixed_stream_so_that_it_never_changes_unnoticed() -> None:
    e = engine(np.array([6, 3]), batch_size=4, seed=5)
    assert [(d.counts.tolist(), d.positions.tolist()) for d in map(e.draw, range(3))] == [
        ([3, 1], [1, 4, 5, 0]),
        ([2, 2], [0, 2, 1, 2]),
        ([3, 1], [3, 3, 1, 1]),
    ]
