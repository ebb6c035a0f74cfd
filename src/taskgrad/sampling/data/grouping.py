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

from ..arrays import IntArray
from ..engine import native
from ..engine.index import MAX_TASKS

_CHUNK = 1 << 22


class Survey(NamedTuple):
    """``sizes`` int64 [T]; ``digest`` of the ids, the same for every dtype; ``is_sorted``: ids never decrease."""

    sizes: IntArray
    digest: str
    is_sorted: bool


def survey(argument: str, ids: npt.NDArray[Any], tasks: int | None) -> Survey:
    """Read all ids once. ``argument``: what the user calls them. ``tasks``: how many there are, None: one more than the
    largest id.

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
                f"{argument} has negative ids, the first at example {at}; every example needs a task to be "
                "sampled: give examples of no task one of their own, for instance 'rest'"
            )
        if high >= most:
            known = f"there are only {tasks} tasks" if tasks is not None else f"a sampler takes up to {MAX_TASKS} tasks"
            raise ValueError(f"{argument} has the id {high}, but {known}")
        canonical = _canonical(chunk)
        found = np.bincount(canonical, minlength=len(sizes))
        found[: len(sizes)] += sizes
        sizes = found.astype(np.int64, copy=False)
        digest.update(canonical.data)
        is_sorted = is_sorted and int(chunk[0]) >= last and bool((chunk[1:] >= chunk[:-1]).all())
        last = int(chunk[-1])
    return Survey(sizes, _scheme(digest), is_sorted)


def sort_by_task(ids: npt.NDArray[Any], found: Survey, out: npt.NDArray[Any]) -> None:
    """Write the examples 0, 1, ... into ``out`` (uint32 or uint64), sorted by task, and in order within a task.

    ``found``: what ``survey`` made of the same ids. Raises ValueError if they are others by now.
    """
    following = np.cumsum(found.sizes) - found.sizes
    ends = np.cumsum(found.sizes)
    digest = hashlib.sha256()
    module, _ = native.load()
    for first, chunk in _chunks(ids):
        canonical = _canonical(chunk)
        digest.update(canonical.data)
        if module is not None:
            module.scatter(canonical, first, following, out)  # raises ValueError itself where an id does not fit
            continue
        if canonical.max() >= len(ends):
            raise _changed()
        order = np.argsort(canonical, kind="stable")
        counts = np.bincount(canonical, minlength=len(ends))
        if (following + counts > ends).any():
            raise _changed()
        begin = np.cumsum(counts) - counts
        places = np.arange(len(chunk)) + np.repeat(following - begin, counts)
        out[places] = first + order
        following += counts
    if _scheme(digest) != found.digest:
        raise _changed()


def order_dtype(examples: int) -> np.dtype[Any]:
    """The type of an order of so many examples: 4 bytes up to 2**32 of them, else 8."""
    return np.dtype("<u4" if examples <= 1 << 32 else "<u8")


def _chunks(ids: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    for first in range(0, len(ids), _CHUNK):
        # a copy, so that what is counted is what is digested, even while something writes to a memory-mapped file
        yield first, np.array(ids[first : first + _CHUNK])


def _canonical(chunk: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    return chunk.astype("<u4", copy=False)


def _scheme(digest: Any) -> str:
    return f"ids-sha256:{digest.hexdigest()}"


def _changed() -> ValueError:
    return ValueError("the task ids changed between two readings: let nothing write to them meanwhile")
