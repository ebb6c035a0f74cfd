"""The index engine under pytest-benchmark; ``benchmarks.index_engine`` has the table and the largest sizes.

pytest benchmarks/test_index_engine.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from taskgrad.sampling import TaskIndex
from taskgrad.sampling.data.arguments import group_by_task

from .index_engine import draws, engines, far_seek, lists, make, sizes_of

EACH_ENGINE = pytest.mark.parametrize("name", list(engines()))


@EACH_ENGINE
@pytest.mark.parametrize("probe_every", [0, 30])
@pytest.mark.parametrize("tasks, batch_size", [(32, 64), (1000, 256), (1000, 4096)])
def test_draw(benchmark: Any, name: str, tasks: int, batch_size: int, probe_every: int) -> None:
    """10 batches."""
    benchmark(draws(make(engines()[name], tasks, batch_size, probe_every), 10))


@pytest.mark.parametrize("name", [name for name in engines() if name == "cpp"])
def test_seek(benchmark: Any, name: str) -> None:
    """To the batch farthest from a snapshot, 1,000 tasks."""
    benchmark(far_seek(make(engines()[name], 1000, 256)))


@pytest.mark.parametrize("batch_size", [256, 4096])
def test_batch_sampler(benchmark: Any, batch_size: int) -> None:
    """10 lists of indices, 10**9 examples in 1,000 ranges."""
    benchmark(lists({str(t): int(n) for t, n in enumerate(sizes_of(1000))}, batch_size, 10))


def test_ranges(benchmark: Any) -> None:
    """Grouping 10**9 examples in 1,000 ranges."""
    benchmark(group_by_task, {str(t): int(n) for t, n in enumerate(sizes_of(1000))}, None)


def test_build_index_file(benchmark: Any, tmp_path: Any) -> None:
    """5 million ids in random order."""
    ids = np.random.default_rng(0).integers(0, 1000, 5_000_000).astype(np.int16)
    path = tmp_path / "x"

    def build() -> None:
        path.unlink(missing_ok=True)
        TaskIndex.build(path, ids)

    benchmark.pedantic(build, rounds=3)


def test_open_index_file(benchmark: Any, tmp_path: Any) -> None:
    """1,000 tasks."""
    TaskIndex.build(tmp_path / "x", np.arange(100_000) % 1000)
    benchmark(TaskIndex.open, tmp_path / "x")
