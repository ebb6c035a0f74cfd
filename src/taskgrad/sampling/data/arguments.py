"""The data that a user passes to a sampler, whichever way they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .ids import check_ids, check_names
from .shares import TaskShares
from .task_index import TaskIndex, from_ids, from_ranges


def data_of(
    task_of_example: Any, shares: Mapping[str, float] | None, tasks: Sequence[str] | None, dataset: Any
) -> TaskIndex | TaskShares:
    """The examples grouped by task, or, of a stream, the tasks' shares: one of the first two is None. Raises TypeError
    or ValueError."""
    if (task_of_example is None) == (shares is None):
        raise TypeError(
            "pass task_of_example, the task of every example, or, for a stream whose examples nobody has counted, "
            "shares={name: share of the stream}"
        )
    if shares is None:
        return group_by_task(task_of_example, tasks, dataset)
    if dataset is not None:
        raise TypeError("dataset is checked against task_of_example; with shares there is nothing to check")
    return TaskShares.build(shares, tasks)


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
