"""What a user passes to a sampler, checked and brought into arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import FloatArray, IntArray, to_numpy


@dataclass(frozen=True)
class TaskIndex:
    """Examples grouped by task.

    ``tasks``: names; ``named``: False where they are only the numbers "0", "1", ...; ``sizes`` int64 [T]; ``offsets``
    int64 [T]: where each task begins in ``order``; ``order`` int64 [examples], the data set's indices sorted by task,
    or None where the data set already is (position = index).
    """

    tasks: tuple[str, ...]
    named: bool
    sizes: IntArray
    offsets: IntArray
    order: IntArray | None

    def examples(self, counts: IntArray, positions: IntArray) -> list[int]:
        """Data set indices of a draw."""
        rows = np.repeat(self.offsets, counts) + positions
        found: list[int] = (rows if self.order is None else self.order[rows]).tolist()
        return found


def group_by_task(task_of_example: Any, tasks: Sequence[str] | None, dataset: Any = None) -> TaskIndex:
    """Group examples by task.

    ``task_of_example``: one task index (integers; list, array or tensor) or one task name (strings, with ``tasks``)
    per example. ``dataset``: anything with a length, to check against. Raises TypeError or ValueError.
    """
    names = None if tasks is None else _names(tasks)
    ids = _ids(task_of_example, names)
    if dataset is not None and len(dataset) != len(ids):
        raise ValueError(f"task_of_example has {len(ids)} entries, the dataset has {len(dataset)} examples")
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        count = int((ids < 0).sum())
        raise ValueError(
            f"task_of_example has {count} negative ids (lowest {low}); every example needs a task to be sampled: "
            "give examples of no task one of their own, for instance 'rest'"
        )
    if names is not None and high >= len(names):
        raise ValueError(f"task_of_example has the id {high}, but there are only {len(names)} tasks: {list(names)}")
    sizes = np.bincount(ids, minlength=len(names) if names is not None else 0).astype(np.int64)
    labels = names if names is not None else tuple(str(t) for t in range(len(sizes)))
    empty = [labels[t] for t in np.flatnonzero(sizes == 0)]
    if empty:
        raise ValueError(f"these tasks have no examples: {empty}; leave them out of tasks, or add examples")
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    is_sorted = bool((ids[1:] >= ids[:-1]).all())
    order = None if is_sorted else np.argsort(ids, kind="stable").astype(np.int64)
    return TaskIndex(labels, names is not None, sizes, offsets, order)


def per_task(name: str, value: Any, tasks: Sequence[str], default: float) -> FloatArray:
    """One number per task, float64 [T], from a number for all, a mapping (others: ``default``), or a sequence."""
    if value is None:
        return np.full(len(tasks), default)
    if isinstance(value, Mapping):
        out = np.full(len(tasks), default)
        for task in known(name, value, tasks):
            out[list(tasks).index(task)] = float(value[task])
    else:
        array = np.asarray(to_numpy(value), dtype=np.float64)
        if array.ndim and array.shape != (len(tasks),):
            raise ValueError(f"{name} must be a number or one per task ({len(tasks)}), got shape {array.shape}")
        out = np.broadcast_to(array, (len(tasks),)).copy()
    if not np.isfinite(out).all():
        raise ValueError(f"{name} must be finite, got {out.tolist()}")
    return out


def known(name: str, given: Any, tasks: Sequence[str]) -> list[str]:
    """Task names in ``given``; raises ValueError for those that are no task."""
    names = [str(task) for task in given]
    unknown = sorted(set(names) - set(tasks))
    if unknown:
        raise ValueError(f"{name} names unknown tasks {unknown}; the tasks are {list(tasks)}")
    return names


def count_of(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``; raises TypeError or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _names(tasks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(f"tasks must be a sequence of names, got {tasks!r}")
    names = tuple(tasks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be distinct names, at least one, got {list(names)}")
    return names


def _ids(task_of_example: Any, names: tuple[str, ...] | None) -> IntArray:
    array = to_numpy(task_of_example)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"task_of_example must hold one task per example, got shape {array.shape}; ids per token are for the "
            "tracker, a sampler needs one per example"
        )
    if array.dtype.kind in "US" or (array.dtype.kind == "O" and isinstance(array[0], str)):
        if names is None:
            raise ValueError("task_of_example holds names: pass tasks=[...] too, in the order the tracker has them")
        unique, inverse = np.unique(array.astype(str), return_inverse=True)
        known("task_of_example", unique, names)
        return np.array([names.index(str(name)) for name in unique], dtype=np.int64)[inverse]
    if array.dtype.kind not in "iu":
        raise TypeError(f"task_of_example must hold integers or names, got {array.dtype}")
    return array.astype(np.int64)
