"""The C++ engine and the NumPy one give the same batches, states and errors, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.engine import native
from taskgrad.sampling.engine.index_numpy import Engine
from taskgrad.sampling.engine.quota import to_units
from tests.sampling.helpers import needs_extension

pytestmark = needs_extension

some_sizes = st.lists(
    st.one_of(st.integers(1, 9), st.integers(250, 262), st.integers(1, 2**40)), min_size=1, max_size=30
)


def both(*arguments: Any) -> tuple[Any, Any]:
    module, _ = native.load()
    assert module is not None
    return Engine(*arguments), module.Engine(*arguments)


def answer(engine: Any, method: str, *arguments: Any) -> list[Any]:
    """What a call gives, as lists, or what it raises."""
    try:
        out = getattr(engine, method)(*arguments)
    except RuntimeError as error:
        return [str(error)]
    return [np.asarray(part).tolist() for part in out] if isinstance(out, tuple) else np.asarray(out).tolist()


def mix(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Natural, uneven, with tasks of weight zero, of the least weight, or one task alone."""
    kind, tasks = rng.integers(5), len(sizes)
    if kind == 0:
        return to_units(sizes / sizes.sum())
    if kind == 1:
        return to_units(np.eye(tasks)[rng.integers(tasks)])
    weights = rng.dirichlet(np.full(tasks, 0.3)) + 1e-9
    if kind == 2:
        weights = np.where(rng.random(tasks) < 0.5, 1e-12, weights)
    if kind == 3:
        weights[rng.random(tasks) < 0.5] = 0
        weights[rng.integers(tasks)] += 0.1
    return to_units(weights / weights.sum())


@settings(max_examples=250, deadline=None)
@given(
    sizes=some_sizes,
    rows=st.one_of(st.integers(1, 70), st.integers(1, 1000)),
    replicas=st.just(1) | st.integers(2, 20),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 1000),
    spare=st.none() | st.integers(0, 12),
    passes=st.none() | st.integers(1, 5),
    moves=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2**32)), max_size=8),
    order=st.lists(
        st.tuples(
            st.sampled_from(["draw", "totals", "probes", "state", "counts", "examples", "draw"]), st.integers(0, 120)
        ),
        min_size=1,
        max_size=25,
    ),
)
def test_any_stream_at_any_batch(
    sizes: list[int],
    rows: int,
    replicas: int,
    seed: int,
    first: int,
    spare: int | None,
    passes: int | None,
    moves: list[tuple[int, int]],
    order: list[tuple[str, int]],
) -> None:
    array, batch_size = np.array(sizes), rows * replicas
    probe_every = 0 if spare is None else -(-len(sizes) // batch_size) + spare
    max_draws = None if passes is None else array * passes
    numpy, native_engine = engines = both(seed, array, batch_size, first, 0, probe_every, max_draws, replicas)
    at = first
    for gap, mix_seed in [(0, seed), *moves]:
        at += gap
        units = mix(np.random.default_rng(mix_seed), array)
        for engine in engines:
            engine.commit(at, units)
    starts = np.cumsum(array) - array
    for method, k in order:
        arguments = (first + k, *((starts, None, k % replicas) if method == "examples" else ()))
        assert answer(numpy, method, *arguments) == answer(native_engine, method, *arguments)


def test_many_tasks_with_probes_and_caps_over_many_batches() -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 60, 700)
    numpy, native_engine = engines = both(3, sizes, 48, 0, 0, 25, sizes * 3)
    for k in range(0, 900, 60):
        units = mix(rng, sizes)
        for engine in engines:
            engine.commit(k, units)
        answers = [[answer(engine, "draw", i) for i in range(k, k + 60)] for engine in engines]
        assert answers[0] == answers[1]
        assert answer(numpy, "state", k) == answer(native_engine, "state", k)


def test_far_seeks_and_snapshots() -> None:
    rng = np.random.default_rng(6)
    sizes = rng.integers(200, 10**6, 50)
    numpy, native_engine = engines = both(9, sizes, 32, 5, 1, 0, None)
    for engine in engines:
        engine.commit(5, mix(np.random.default_rng(1), sizes))
    for k in (5000, 17, 3100, 3099, 6000, 1029, 1030):
        assert answer(numpy, "draw", k) == answer(native_engine, "draw", k)
        assert numpy.snapshot_at(k) == native_engine.snapshot_at(k) == 5 + (k - 5) // 1024 * 1024


def test_the_extension_refuses_what_would_corrupt_memory() -> None:
    module, _ = native.load()
    assert module is not None
    sizes = np.array([5, 6])
    for bad_sizes, batch_size, max_draws in ((np.array([0, 1]), 4, None), (sizes, 0, None), (sizes, 4, sizes[:1])):
        with pytest.raises(ValueError, match=r"positive|out of range|one per task"):
            module.Engine(0, bad_sizes, batch_size, 0, 0, 0, max_draws)
    engine = module.Engine(0, sizes, 4, 3, 0, 0, None)
    for weights in ([1 << 40], [1, 1], [(1 << 40) + 1, -1]):
        with pytest.raises(ValueError, match="weights must"):
            engine.commit(3, np.array(weights))
    halves = np.array([1 << 39, 1 << 39])
    with pytest.raises(ValueError, match="first batch"):
        engine.commit(4, halves)
    for k in (2, 3):
        with pytest.raises(IndexError):
            engine.draw(k)
    none, order = np.empty(0, dtype=np.int64), np.arange(11, dtype=np.uint32)
    for state in ((sizes[:1], sizes, sizes, sizes, none), (sizes, sizes, sizes, sizes, sizes)):
        with pytest.raises(ValueError, match=r"one value per task|another number of replicas"):
            engine.restore(3, *state)
    engine.commit(3, halves)
    for starts, rank in ((sizes[:1], 0), (sizes, 1), (sizes, -1)):
        with pytest.raises(ValueError, match=r"one per task|below the number of replicas"):
            engine.examples(3, starts, order, rank)
    for starts in (np.array([0, 8]), np.array([0, -9]), np.array([-(2**63), 2**62])):
        with pytest.raises(IndexError, match="beyond the order"):
            engine.examples(3, starts, order, 0)
    for other in (order[::2], order.astype(np.int64), order.astype(np.float32), order.tolist()):
        with pytest.raises(TypeError):
            engine.examples(3, np.array([0, 5]), other, 0)
    out = np.zeros(3, dtype=np.uint32)
    for ids in ([0, 1, 2], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="the task ids changed"):
            module.scatter(np.array(ids, dtype=np.uint32), 0, np.array([0, 2]), out)
