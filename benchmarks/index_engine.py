"""The sampler's index engine: how many indices a second, how long to seek, build and open, C++ against NumPy.

Sizes are drawn unevenly and sum to 10**9 examples; everything runs on one core. ``draw`` is the engine alone,
``one of 8 replicas`` the list that one of eight ranks gets of each batch, ``batch sampler`` what a DataLoader gets:
lists of data set indices, from ranges or through an index file.

    python -m benchmarks.index_engine [--rounds 7] [--file-examples 1000000000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from taskgrad.sampling import AdaptiveBatchSampler, TaskIndex
from taskgrad.sampling.engine import index_numpy, native
from taskgrad.sampling.engine.quota import to_units
from taskgrad.sampling.policies import Proportional

from . import timing

EXAMPLES = 10**9
SHAPES = [(32, 64), (1000, 256), (1000, 4096), (100_000, 4096)]


def sizes_of(tasks: int, examples: int = EXAMPLES) -> np.ndarray:
    """Uneven sizes, int64 [tasks]: the largest about three times the smallest."""
    share = np.random.default_rng(tasks).uniform(0.5, 1.5, tasks)
    sizes = np.maximum((share / share.sum() * examples).astype(np.int64), 1)
    sizes[0] += examples - int(sizes.sum())
    return sizes


def engines() -> dict[str, Any]:
    module, _ = native.load()
    return {"numpy": index_numpy.Engine} if module is None else {"cpp": module.Engine, "numpy": index_numpy.Engine}


def make(engine: Any, tasks: int, batch_size: int, probe_every: int = 0, replicas: int = 1) -> Any:
    sizes = sizes_of(tasks)
    out = engine(0, sizes, batch_size, 0, 0, probe_every, None, replicas)
    out.commit(0, to_units(sizes / sizes.sum()))
    return out


def draws(engine: Any, count: int) -> Callable[[], None]:
    """Draws the next ``count`` batches each time it is called."""
    position = iter(range(sys.maxsize))

    def call() -> None:
        for _ in range(count):
            engine.draw(next(position))

    return call


def shares(engine: Any, tasks: int, count: int) -> Callable[[], None]:
    """Takes one replica's rows of the next ``count`` batches each time it is called."""
    starts = np.cumsum(sizes_of(tasks)) - sizes_of(tasks)
    position = iter(range(sys.maxsize))

    def call() -> None:
        for _ in range(count):
            engine.examples(next(position), starts, None, 3)

    return call


def lists(index: Any, batch_size: int, count: int) -> Callable[[], None]:
    """Takes the next ``count`` batches of an ``AdaptiveBatchSampler`` each time it is called."""
    sampler = AdaptiveBatchSampler(index, batch_size, Proportional())
    batches: Iterator[list[int]] = iter(sampler)

    def call() -> None:
        for _ in range(count):
            next(batches)

    return call


def far_seek(engine: Any) -> Callable[[], None]:
    """Draws the last batch before the next snapshot, in another place each time: the farthest from any snapshot."""
    covered = 64 * 1024
    engine.totals(covered)
    places = np.random.default_rng(0).permutation(63)
    position = iter(range(sys.maxsize))
    return lambda: engine.draw(int(places[next(position) % 63]) * 1024 + 1023)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--file-examples", type=int, default=10**8, help="examples in the index file, int16 ids")
    parser.add_argument("--folder", type=Path, help="where the ids and the index file are written for the time being")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"index engine: {native.load()[1]}")
    rows = [*drawing(args.rounds), *seeking(args.rounds), *grouping(args.rounds)]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows += index_file(Path(folder), args.file_examples, args.rounds)
    table = Table(title="index engine, medians")
    for column in ("what", "engine", "examples", "T", "batch", "time", "examples/s"):
        table.add_column(column, justify="left" if column in ("what", "engine") else "right")
    for row in rows:
        middle = row["ms"][1]
        rate = f"{row['count'] / middle / 1e3:.1f} M" if row.get("count") else ""
        shown = (
            f"{middle * 1e3:.1f} us" if middle < 1 else f"{middle:.1f} ms" if middle < 1e4 else f"{middle / 1e3:.1f} s"
        )
        cells = (row["what"], row["engine"], f"{row['examples']:.0e}", row["T"], row.get("batch", ""), shown, rate)
        table.add_row(*map(str, cells))
    Console(width=120).print(table)
    print(f"written to {timing.save('index_engine', torch.device('cpu'), rows)}")


def drawing(rounds: int) -> Iterator[dict[str, Any]]:
    for tasks, batch_size in SHAPES:
        count = max(1, min(200, 10**7 // (tasks * 20 + batch_size * 10)))
        calls = {name: draws(make(engine, tasks, batch_size), count) for name, engine in engines().items()}
        yield from rows_of("draw", calls, rounds, count, T=tasks, batch=batch_size, examples=EXAMPLES)
        if tasks == 1000:
            probing = {name: draws(make(e, tasks, batch_size, 20), count) for name, e in engines().items()}
            yield from rows_of(
                "draw, probe_every=20", probing, rounds, count, T=tasks, batch=batch_size, examples=EXAMPLES
            )
            dealt = {name: shares(make(e, tasks, batch_size, 0, 8), tasks, count) for name, e in engines().items()}
            yield from rows_of(
                "one of 8 replicas", dealt, rounds, count, T=tasks, batch=batch_size, examples=EXAMPLES, rate=False
            )
            ranges = {str(t): int(n) for t, n in enumerate(sizes_of(tasks))}
            sampler = {name_in_force(): lists(ranges, batch_size, count)}
            yield from rows_of(
                "batch sampler, ranges", sampler, rounds, count, T=tasks, batch=batch_size, examples=EXAMPLES
            )


def seeking(rounds: int) -> Iterator[dict[str, Any]]:
    tasks, batch_size = 1000, 256
    calls = {name: far_seek(make(engine, tasks, batch_size)) for name, engine in engines().items()}
    yield from rows_of(
        "seek, snapshots there", calls, rounds, 1, T=tasks, batch=batch_size, examples=EXAMPLES, rate=False
    )
    if "cpp" in engines():
        far = 10**6
        calls = {"cpp": lambda: make(engines()["cpp"], tasks, batch_size).totals(far)}
        yield from rows_of(
            "seek to batch 10**6, no snapshot",
            calls,
            2,
            1,
            warmup=0,
            T=tasks,
            batch=batch_size,
            examples=EXAMPLES,
            rate=False,
        )


def grouping(rounds: int) -> Iterator[dict[str, Any]]:
    ranges = {str(t): int(n) for t, n in enumerate(sizes_of(1000))}
    calls = {
        name_in_force(): lambda: AdaptiveBatchSampler(ranges, 256, Proportional()),
    }
    yield from rows_of("build sampler, ranges", calls, rounds, 1, T=1000, examples=EXAMPLES, rate=False)


def index_file(folder: Path, examples: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Ids in a memory-mapped file, in random order; built once, since that takes long."""
    tasks = 1000
    ids = np.lib.format.open_memmap(folder / "ids.npy", mode="w+", dtype=np.int16, shape=(examples,))
    rng = np.random.default_rng(0)
    for first in range(0, examples, 1 << 24):
        part = ids[first : first + (1 << 24)]
        part[:] = rng.integers(0, tasks, len(part), dtype=np.int16)
    ids.flush()
    path = folder / "examples.index"
    shape: dict[str, Any] = {"T": tasks, "examples": examples}
    start = time.perf_counter()
    TaskIndex.build(path, ids)
    milliseconds = (time.perf_counter() - start) * 1e3
    yield {"what": "build index file", "engine": name_in_force(), **shape, "count": examples, "ms": [milliseconds] * 3}
    calls = {name_in_force(): lambda: TaskIndex.open(path)}
    yield from rows_of("open index file", calls, rounds, 1, rate=False, **shape)
    index = TaskIndex.open(path)
    assert index.order is not None
    int(index.order.max())  # into the page cache
    before = anonymous_bytes()
    for batch_size in (256, 4096):
        count = 200_000 // batch_size * 4
        call = lists(index, batch_size, count)
        yield from rows_of(
            "batch sampler, index file", {name_in_force(): call}, rounds, count, batch=batch_size, **shape
        )
    grown = (anonymous_bytes() - before) / 2**20
    print(f"memory of its own that drawing from the index file took: {grown:.0f} MiB")


def rows_of(
    what: str,
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    count: int,
    *,
    rate: bool = True,
    warmup: int = 2,
    **shape: Any,
) -> Iterator[dict[str, Any]]:
    """Milliseconds per batch (quartiles over rounds) of calls that take ``count`` batches."""
    times = timing.interleaved(calls, torch.device("cpu"), rounds, warmup)
    for name, values in times.items():
        each = [round(value / count, 5) for value in timing.quartiles(values)]
        counted = {"count": shape["batch"]} if rate else {}
        yield {"what": what, "engine": name, **shape, **counted, "ms": each}


def name_in_force() -> str:
    return "cpp" if native.load()[0] is not None else "numpy"


def anonymous_bytes() -> int:
    """Memory that is not backed by files, where the system tells; else the peak of all of it."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["RssAnon"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
