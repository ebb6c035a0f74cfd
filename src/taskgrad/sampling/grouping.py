"""Task ids of a data set, read a chunk at a time: checked, counted, digested, and sorted by task.

``ids`` is always a one-dimensional integer array of any dtype, in memory or memory-mapped; nothing here holds more
than a chunk of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import native
from .arrays import IntArray
from .index import MAX_TASKS

_CHUNK = 1 << 22


class Survey(NamedTuple):
    """``sizes`` int64 [T]; ``digest`` of the ids, the same for every dtype; ``is_sorted``: ids never decrease."""

    sizes: IntArray
    digest: str
    is_sorted: bool


def survey(ids: npt.NDArray[Any], tasks: int | None) -> Survey:
    """Read all ids once. ``tasks``: how many there are, None: one more than the largest id.

    Raises ValueError for ids that are negative or name no task.
    """
    most = MAX_TASKS if tasks is None else tasks
    sizes = np.zeros(tasks or 0, dtype=np.int64)
    digest = hashlib.sha256()
    last, is_sorted = 0, True
    for first, chunk in _chunks(ids):
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0:
            at = first + int(np.argmax(chunk < 0))
            raise ValueError(
                f"task_of_example has negative ids, the first at example {at}; every example needs a task to be "
                "sampled: give examples of no task one of their own, for instance 'rest'"
            )
        if high >= most:
            known = f"there are only {tasks} tasks" if tasks is not None else f"a sampler takes up to {MAX_TASKS} tasks"
            raise ValueError(f"task_of_example has the id {high}, but {known}")
        canonical = _canonical(chunk)
        found = np.bincount(canonical, minlength=len(sizes))
        found[: len(sizes)] += sizes
        sizes = found.astype(np.int64, copy=False)
        digest.update(canonical.data)
        is_sorted = is_sorted and int(chunk[0]) >= last and bool((chunk[1:] >= chunk[:-1]).all())
        last = int(chunk[-1])
    return Survey(sizes, f"ids-sha256:{digest.hexdigest()}", is_sorted)


def sort_by_task(ids: npt.NDArray[Any], sizes: IntArray, out: npt.NDArray[Any]) -> None:
    """Write the examples 0, 1, ... into ``out`` (uint32 or uint64), sorted by task, and in order within a task.

    ``sizes`` int64 [T]: as ``survey`` counted them.
    """
    following = np.cumsum(sizes) - sizes
    module, _ = native.load()
    for first, chunk in _chunks(ids):
        canonical = _canonical(chunk)
        if module is not None:
            module.scatter(canonical, first, following, out)
            continue
        order = np.argsort(canonical, kind="stable")
        found = np.bincount(canonical, minlength=len(sizes))
        begin = np.cumsum(found) - found
        places = np.arange(len(chunk)) + np.repeat(following - begin, found)
        out[places] = first + order
        following += found


def order_dtype(examples: int) -> npt.DTypeLike:
    """The type of an order of so many examples: 4 bytes up to 2**32 of them, else 8."""
    return np.dtype("<u4" if examples <= 1 << 32 else "<u8")


def _chunks(ids: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    for first in range(0, len(ids), _CHUNK):
        yield first, np.ascontiguousarray(ids[first : first + _CHUNK])


def _canonical(chunk: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    return chunk.astype("<u4", copy=False)
