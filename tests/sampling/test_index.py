from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.index import MAX_BATCH_SIZE, Draw, IndexEngine
from taskgrad.sampling.quota import ONE, to_units

SIZES = np.array([5000, 300, 40, 7, 1])


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


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 700), min_size=1, max_size=12))
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


def test_the_number_of_snapshots_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskgrad.sampling.index._SNAPSHOTS", 8)
    monkeypatch.setattr("taskgrad.sampling.index._RECENT", 4)
    thin, full = engine(), engine(seed=3)
    for k in range(6000):
        thin.totals(k)
    assert len(thin._snapshots) <= 9
    assert np.array_equal(thin.totals(1234), full.totals(1234))


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


def test_the_largest_batch_does_not_overflow() -> None:
    e = IndexEngine(0, np.array([30_000, 10_000]), MAX_BATCH_SIZE)
    e.commit(0, weights(3, 1))
    assert e.draw(2).counts.tolist() == [MAX_BATCH_SIZE * 3 // 4, MAX_BATCH_SIZE // 4]


def test_fixed_stream_so_that_it_never_changes_unnoticed() -> None:
    e = engine(np.array([6, 3]), batch_size=4, seed=5)
    assert [(d.counts.tolist(), d.positions.tolist()) for d in map(e.draw, range(3))] == [
        ([3, 1], [2, 3, 0, 0]),
        ([2, 2], [4, 5, 2, 1]),
        ([3, 1], [1, 0, 3, 0]),
    ]
