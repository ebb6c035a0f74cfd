"""Which examples belong to which task: in memory, as ranges, or in an index file for very large data sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import index_file
from .arrays import IntArray, to_numpy
from .grouping import Survey, order_dtype, sort_by_task, survey
from .index import IndexEngine


@dataclass(frozen=True, eq=False)
class TaskIndex:
    """Examples grouped by task.

    For very large data sets ``TaskIndex.build(path, task_ids)`` sorts them into a file once, and
    ``AdaptiveBatchSampler(TaskIndex.open(path), ...)`` then holds a few numbers per task in memory; the file's pages
    are the operating system's to cache.

    ``tasks``: names; ``named``: False where they are only the numbers "0", "1", ...; ``sizes`` int64 [T]; ``offsets``
    int64 [T]: where each task begins in ``order``; ``order`` [examples], the data set's indices sorted by task, or None
    where each task lies in one piece (offset + position = index); ``digest``: of which example is of which task.
    """

    tasks: tuple[str, ...]
    named: bool
    sizes: IntArray
    offsets: IntArray
    order: npt.NDArray[Any] | None
    digest: str
    path: Path | None = None

    @classmethod
    def build(cls, path: str | os.PathLike[str], task_ids: Any, *, tasks: Sequence[str] | None = None) -> TaskIndex:
        """Sort the examples by task into an index file at ``path``, and open it.

        ``task_ids``: one task index per example, integers of any kind; an array may be memory-mapped, it is read in
        chunks, twice. ``tasks``: names. The file takes 4 bytes an example (8 above 2**32 examples). It appears at
        ``path`` whole or not at all. An index file of the same ids and names there is opened as it is, one of others
        is replaced; any other file raises ValueError, as ids do that are negative or name no task.
        """
        path = Path(path)
        names = None if tasks is None else check_names(tasks)
        ids = check_ids(task_ids)
        found = count(ids, names)
        if path.exists() and index_file.read(path, whole=False)[:2] == (found.digest, names):
            try:
                return cls.open(path)
            except ValueError:  # cut short: made anew below
                pass
        dtype = order_dtype(len(ids))
        with index_file.create(path, found.digest, names, found.sizes, dtype) as order:
            sort_by_task(ids, found.sizes, order)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TaskIndex:
        """The index in the file at ``path``. Raises ValueError if it is no index file, cut short or changed."""
        path = Path(path)
        digest, names, sizes, order = index_file.read(path, whole=True)
        return cls(names or numbered(len(sizes)), names is not None, sizes, starts(sizes), order, digest, path)

    def examples(self, engine: IndexEngine, k: int, rank: int = 0) -> list[int]:
        """Data set indices of the rows of batch ``k`` that replica ``rank`` gets, sorted by task; draws the batch."""
        return engine.examples(k, self.offsets, self.order, rank)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __reduce__(self) -> tuple[Any, ...]:
        # A file is opened again, not copied.
        if self.path is not None:
            return _reopen, (self.path, self.tasks, self.named)
        return TaskIndex, (self.tasks, self.named, self.sizes, self.offsets, self.order, self.digest)


def _reopen(path: Path, tasks: tuple[str, ...], named: bool) -> TaskIndex:
    index = TaskIndex.open(path)
    return TaskIndex(tasks, named, index.sizes, index.offsets, index.order, index.digest, path)


def from_ids(ids: npt.NDArray[Any], names: tuple[str, ...] | None) -> TaskIndex:
    """Sorted in memory."""
    found = count(ids, names)
    order = None
    if not found.is_sorted:
        order = np.empty(len(ids), dtype=order_dtype(len(ids)))
        sort_by_task(ids, found.sizes, order)
    labels = names or numbered(len(found.sizes))
    return TaskIndex(labels, names is not None, found.sizes, starts(found.sizes), order, found.digest)


def from_ranges(pieces: Mapping[str, Any], names: tuple[str, ...] | None) -> TaskIndex:
    """Tasks that lie in one piece each: name -> number of examples (one task after the other), or name -> range."""
    given = check_names(list(pieces))
    if names is not None and set(names) != set(given):
        raise ValueError(f"tasks must name the same tasks as task_of_example: {list(names)}, {list(given)}")
    if all(isinstance(piece, range) for piece in pieces.values()):
        crooked = [name for name, piece in pieces.items() if piece.step != 1 or piece.start < 0]
        if crooked:
            raise ValueError(f"the ranges of these tasks must have step 1 and begin at 0 or later: {crooked}")
        begin = {name: (piece.start, len(piece)) for name, piece in pieces.items()}
        order = sorted((start, size, name) for name, (start, size) in begin.items() if size)
        for (start, size, name), (following, _, other) in pairwise(order):
            if start + size > following:
                raise ValueError(f"the ranges of tasks {name!r} and {other!r} overlap at example {following}")
    else:
        begin, at = {}, 0
        for name, piece in pieces.items():
            if isinstance(piece, bool) or not hasattr(piece, "__index__"):
                raise TypeError(
                    "a mapping task_of_example must give each task its number of examples, or each its "
                    f"range(start, stop); task {name!r} has {piece!r}"
                )
            if int(piece) < 0:
                raise ValueError(f"task {name!r} has {int(piece)} examples")
            begin[name] = (at, int(piece))
            at += int(piece)
    labels = given if names is None else names
    offsets = np.array([begin[name][0] for name in labels], dtype=np.int64)
    sizes = np.array([begin[name][1] for name in labels], dtype=np.int64)
    _refuse_empty(labels, sizes)
    digest = hashlib.sha256(np.stack([offsets, sizes]).astype("<i8").tobytes()).hexdigest()
    return TaskIndex(labels, True, sizes, offsets, None, f"ranges-sha256:{digest}")


def count(ids: npt.NDArray[Any], names: tuple[str, ...] | None) -> Survey:
    """Read and check all ids."""
    found = survey(ids, None if names is None else len(names))
    _refuse_empty(names or numbered(len(found.sizes)), found.sizes)
    return found


def check_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Distinct names, at least one; raises TypeError or ValueError."""
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(f"tasks must be a sequence of names, got {tasks!r}")
    names = tuple(tasks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be distinct names, at least one, got {list(names)}")
    return names


def check_ids(task_ids: Any) -> npt.NDArray[Any]:
    """One integer per example, as they are; raises TypeError or ValueError."""
    array = to_numpy(task_ids)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"task_of_example must hold one task per example, got shape {array.shape}; ids per token are for the "
            "tracker, a sampler needs one per example"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"task_of_example must hold integers or names, got {array.dtype}")
    return array


def numbered(tasks: int) -> tuple[str, ...]:
    """The names of tasks that have none."""
    return tuple(str(t) for t in range(tasks))


def starts(sizes: IntArray) -> IntArray:
    """Where each task begins, int64 [T], when they lie one after the other."""
    out: IntArray = np.cumsum(sizes) - sizes
    return out


def _refuse_empty(labels: Sequence[str], sizes: IntArray) -> None:
    empty = [labels[int(t)] for t in np.flatnonzero(sizes == 0)]
    if empty:
        raise ValueError(f"these tasks have no examples: {empty}; leave them out of tasks, or add examples")
