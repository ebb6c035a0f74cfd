"""What a user passes to a sampler, checked and brought into arrays."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .arrays import FloatArray, to_numpy
from .ids import check_ids, check_names
from .task_index import TaskIndex, from_ids, from_ranges


def group_by_task(task_of_example: Any, tasks: Sequence[str] | None, dataset: Any = None) -> TaskIndex:
    """Group examples by task.

    ``task_of_example``: one task index (integers; list, array or tensor) or one task name (strings, with ``tasks``)
    per example; a mapping from names to numbers of examples or ranges, for tasks that lie in one piece each; or a
    ``TaskIndex``. ``dataset``: anything with a length, to check against. Raises TypeError or ValueError.
    """
    names = None if tasks is None else check_names(tasks)
    if isinstance(task_of_example, TaskIndex):
        index = _with_names(task_of_example, names)
    elif isinstance(task_of_example, Mapping):
        index = from_ranges(task_of_example, names)
    else:
        index = from_ids(check_ids("task_of_example", task_of_example, names), names)
    if dataset is not None:
        _check_length(index, len(dataset), task_of_example)
    return index


def per_task(name: str, value: Any, tasks: Sequence[str], default: float) -> FloatArray:
    """One number per task, float64 [T], from a number for all, a mapping (others: ``default``), or a sequence."""
    if value is None:
        return np.full(len(tasks), default)
    if isinstance(value, Mapping):
        out = np.full(len(tasks), default)
        for task, number in zip(known(name, value, tasks), _floats(name, list(value.values())), strict=True):
            out[list(tasks).index(task)] = number
    else:
        array = _floats(name, value)
        if array.ndim and array.shape != (len(tasks),):
            raise ValueError(f"{name} must be a number or one per task ({len(tasks)}), got shape {array.shape}")
        out = np.broadcast_to(array, (len(tasks),)).copy()
    if not np.isfinite(out).all():
        raise ValueError(f"{name} must be finite, got {out.tolist()}")
    return out


def _floats(name: str, value: Any) -> FloatArray:
    try:
        array = to_numpy(value)
        if array.dtype.kind not in "biufO":  # texts and complex numbers would be converted
            raise TypeError
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold numbers, got {value!r}") from None


def known(name: str, given: Any, tasks: Sequence[str]) -> list[str]:
    """Task names in ``given``; raises ValueError for those that are no task."""
    names = [str(task) for task in given]
    unknown = sorted(set(names) - set(tasks))
    if unknown:
        raise ValueError(f"{name} names unknown tasks {unknown}; the tasks are {list(tasks)}")
    return names


def count_of(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``; raises TypeError or ValueError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # a tensor of a float has an __index__ too, which raises
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _with_names(index: TaskIndex, names: tuple[str, ...] | None) -> TaskIndex:
    if names is None or names == index.tasks:
        return index
    if index.named or len(names) != len(index.tasks):
        raise ValueError(f"tasks are {list(names)}, but the TaskIndex has {list(index.tasks)}: leave tasks out")
    return replace(index, tasks=names, named=True)


def _check_length(index: TaskIndex, length: int, task_of_example: Any) -> None:
    if isinstance(task_of_example, Mapping):
        last = int((index.offsets + index.sizes).max())
        may_leave_out = all(isinstance(piece, range) for piece in task_of_example.values())
        if last > length or (last < length and not may_leave_out):
            raise ValueError(f"the tasks of task_of_example end at example {last}, the dataset has {length} examples")
    elif len(index) != length:
        raise ValueError(f"task_of_example has {len(index)} entries, the dataset has {length} examples")
