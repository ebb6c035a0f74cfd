"""Which examples belong to which task: in memory, as ranges, or in an index file for very large data sets."""

from __future__ import annotations

import errno
import hashlib
import operator
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import IntArray
from ..engine.index import IndexEngine
from . import index_file
from .grouping import Survey, order_dtype, sort_by_task, survey
from .ids import check_ids, check_names

_MOST_EXAMPLES = 1 << 62


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

        ``task_ids``: one task per example, integers of any kind or, with ``tasks``, names; an array of integers may be
        memory-mapped, it is read in chunks, twice. ``tasks``: names. The file takes 4 bytes an example (8 above 2**32
        examples). It appears at ``path`` whole or not at all, also where several processes build it at once. A sound
        index file of the same ids and names there is opened as it is; one of others, of another version or a damaged
        one is replaced.

        Raises:
            TypeError: ``task_ids`` or ``tasks`` are of the wrong kind.
            ValueError: any other file is at ``path``; ids are negative or name no task, or change while they are
                read; another process has built an index of other ids or names at ``path`` meanwhile.
            OSError: the file cannot be written, or there is no room for it.
        """
        path = _absolute(path)
        names = None if tasks is None else check_names(tasks)
        ids = check_ids("task_ids", task_ids, names)
        there = index_file.is_at(path)  # before all ids are read
        found = count("task_ids", ids, names)

        def is_wanted(index: TaskIndex) -> bool:
            has = index.tasks if index.named else None
            return has == names and _same_data(index, found.sizes, found.digest)

        if there:
            with suppress(ValueError, FileNotFoundError):  # damaged or of another version, or gone
                index = cls.open(path)
                if is_wanted(index):
                    return index
        with index_file.create(path, found.digest, names, found.sizes) as order:
            sort_by_task(ids, found, order)
        index = cls.open(path)
        if not is_wanted(index):
            raise ValueError(f"another process has built an index of other task ids or names at {path} meanwhile")
        return index

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TaskIndex:
        """The index in the file at ``path``.

        All of the file is read once and verified, before anything of it is used. From then on its pages are read as
        they are needed: write to it by nothing but ``build``, which puts another file in its place.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no index file, of another version, cut short or changed in any byte.
        """
        path = _absolute(path)
        digest, names, sizes, order = index_file.read(path)
        return cls(names or numbered(len(sizes)), names is not None, sizes, starts(sizes), order, digest, path)

    def examples(self, engine: IndexEngine, k: int, rank: int = 0) -> list[int]:
        """Data set indices of the rows of batch ``k`` that replica ``rank`` gets, sorted by task; draws the batch."""
        return engine.examples(k, self.offsets, self.order, rank)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __reduce__(self) -> tuple[Any, ...]:
        # A file is opened again, not copied.
        if self.path is not None:
            return _reopen, (self.path, self.sizes, self.digest, self.tasks, self.named)
        return TaskIndex, (self.tasks, self.named, self.sizes, self.offsets, self.order, self.digest)


def _reopen(path: Path, sizes: IntArray, digest: str, tasks: tuple[str, ...], named: bool) -> TaskIndex:
    try:
        index = TaskIndex.open(path)
    except FileNotFoundError:
        what = "a copy of a TaskIndex opens its index file again, which is not there"
        raise FileNotFoundError(errno.ENOENT, what, str(path)) from None
    if not _same_data(index, sizes, digest) or (index.named and index.tasks != tasks):
        raise ValueError(
            f"the index file {path} was replaced by one of other task ids or names since the TaskIndex was opened that "
            "this is a copy of: open it anew"
        )
    return replace(index, tasks=tasks, named=named)  # names may have been given to the copied one


def _same_data(index: TaskIndex, sizes: IntArray, digest: str) -> bool:
    return index.digest == digest and np.array_equal(index.sizes, sizes)


def _absolute(path: str | os.PathLike[str]) -> Path:
    # a process that opens a copy may have another working directory
    return Path(os.path.abspath(path))


def from_ids(ids: npt.NDArray[Any], names: tuple[str, ...] | None) -> TaskIndex:
    """Sorted in memory."""
    found = count("task_of_example", ids, names)
    order = None
    if not found.is_sorted:
        order = np.empty(len(ids), dtype=order_dtype(len(ids)))
        sort_by_task(ids, found, order)
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
        begin = {name: (piece.start, max(piece.stop - piece.start, 0)) for name, piece in pieces.items()}
        order = sorted((start, size, name) for name, (start, size) in begin.items() if size)
        for (start, size, name), (following, _, other) in pairwise(order):
            if start + size > following:
                raise ValueError(f"the ranges of tasks {name!r} and {other!r} overlap at example {following}")
    else:
        begin, at = {}, 0
        for name, piece in pieces.items():
            size = _examples(name, piece)
            begin[name] = (at, size)
            at += size
    end = max(start + size for start, size in begin.values())
    if end > _MOST_EXAMPLES:
        raise ValueError(f"the tasks of task_of_example end at example {end}, a sampler takes up to {_MOST_EXAMPLES}")
    labels = given if names is None else names
    offsets = np.array([begin[name][0] for name in labels], dtype=np.int64)
    sizes = np.array([begin[name][1] for name in labels], dtype=np.int64)
    _refuse_empty(labels, sizes)
    digest = hashlib.sha256(np.stack([offsets, sizes]).astype("<i8").tobytes()).hexdigest()
    return TaskIndex(labels, True, sizes, offsets, None, f"ranges-sha256:{digest}")


def _examples(name: str, piece: Any) -> int:
    needs = "a mapping task_of_example must give each task its number of examples, or each its range(start, stop)"
    try:
        if isinstance(piece, bool):
            raise TypeError
        size = operator.index(piece)
    except Exception:  # whatever it is that has been passed
        raise TypeError(f"{needs}; task {name!r} has {piece!r}") from None
    if size < 0:
        raise ValueError(f"task {name!r} has {size} examples")
    return size


def count(argument: str, ids: npt.NDArray[Any], names: tuple[str, ...] | None) -> Survey:
    """Read and check all ids, which the user calls ``argument``."""
    found = survey(argument, ids, None if names is None else len(names))
    _refuse_empty(names or numbered(len(found.sizes)), found.sizes)
    return found


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
