from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from taskgrad.sampling.inputs import group_by_task, known, per_task
from taskgrad.sampling.task_index import TaskIndex

IDS = [1, 0, 0, 2, 1, 0]


def examples(index: TaskIndex, counts: np.ndarray, positions: np.ndarray) -> list[int]:
    """Data set indices of the examples at ``positions`` [N] of their tasks, ``counts`` [T] of each, sorted by task."""
    rows = np.repeat(index.offsets, counts) + positions
    found: list[int] = (rows if index.order is None else index.order[rows]).tolist()
    return found


@pytest.mark.parametrize(
    "ids",
    [IDS, tuple(IDS), np.array(IDS), np.array(IDS, dtype=np.uint8), torch.tensor(IDS), torch.tensor(IDS).int()],
)
def test_ids_of_every_kind(ids: Any) -> None:
    index = group_by_task(ids, None)
    assert index.tasks == ("0", "1", "2") and not index.named
    assert index.sizes.tolist() == [3, 2, 1]
    assert examples(index, np.array([2, 1, 1]), np.array([0, 2, 1, 0])) == [1, 5, 4, 3]


def test_names() -> None:
    index = group_by_task(["b", "a", "b"], ["b", "a"], dataset=range(3))
    assert index.named and index.sizes.tolist() == [2, 1]
    assert examples(index, np.array([2, 1]), np.array([1, 0, 0])) == [2, 0, 1]


def test_sorted_data_need_no_order() -> None:
    index = group_by_task([0, 0, 1, 1, 1], None)
    assert index.order is None
    assert examples(index, np.array([1, 2]), np.array([1, 0, 2])) == [1, 2, 4]


@pytest.mark.parametrize(
    "ids, tasks, error, message",
    [
        ([[0, 1]], None, ValueError, r"one task per example, got shape \(1, 2\); ids per token are for the tracker"),
        ([], None, ValueError, r"got shape \(0,\)"),
        ([0.0, 1.0], None, TypeError, "integers or names, got float64"),
        (
            [0, -1, -2],
            None,
            ValueError,
            r"negative ids, the first at example 1;.*for instance 'rest'",
        ),
        ([0, 2], None, ValueError, r"no examples: \['1'\]"),
        ([0, 1], ["a", "b", "c"], ValueError, r"no examples: \['c'\]; leave them out"),
        ([0, 3], ["a", "b"], ValueError, "has the id 3, but there are only 2 tasks"),
        (["a", "b"], None, ValueError, r"holds names: pass tasks="),
        (["a", "x"], ["a", "b"], ValueError, r"unknown tasks \['x'\]"),
        ([0, 1], ["a", "a"], ValueError, "distinct names"),
        ([0, 1], "ab", TypeError, "sequence of names"),
        ([0, 1], [0, 1], TypeError, "sequence of names"),
    ],
)
def test_bad_input_raises(ids: Any, tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_by_task(ids, tasks)


def test_tasks_that_lie_one_after_the_other() -> None:
    index = group_by_task({"a": 3, "b": np.int32(2), "c": 4}, None, dataset=range(9))
    assert index.named and index.tasks == ("a", "b", "c") and index.order is None
    assert index.sizes.tolist() == [3, 2, 4]
    assert examples(index, np.array([1, 1, 2]), np.array([2, 0, 0, 3])) == [2, 3, 5, 8]
    turned = group_by_task({"a": 3, "b": 2, "c": 4}, ["c", "a", "b"])
    assert turned.tasks == ("c", "a", "b") and turned.sizes.tolist() == [4, 3, 2]
    assert examples(turned, np.array([2, 1, 1]), np.array([0, 3, 2, 0])) == [5, 8, 2, 3]


def test_tasks_in_ranges_may_leave_gaps_and_come_in_any_order() -> None:
    index = group_by_task({"a": range(10, 15), "b": range(2, 4)}, None, dataset=range(20))
    assert index.sizes.tolist() == [5, 2]
    assert examples(index, np.array([1, 2]), np.array([4, 1, 0])) == [14, 3, 2]


def test_the_same_data_have_the_same_digest_and_other_data_another() -> None:
    same = [group_by_task(ids, None).digest for ids in (IDS, np.array(IDS, dtype=np.int16), torch.tensor(IDS))]
    assert len(set(same)) == 1
    ranges = [{"a": 3, "b": 2}, {"a": range(0, 3), "b": range(3, 5)}, {"x": 3, "y": 2}]
    assert len({group_by_task(r, None).digest for r in ranges}) == 1
    others = [IDS[::-1], [*IDS, 0], {"a": 3, "b": 2}, {"a": 2, "b": 3}, {"a": range(0, 3), "b": range(4, 6)}]
    assert len({same[0], *(group_by_task(o, None).digest for o in others)}) == 6


def test_a_billion_examples_in_a_thousand_ranges_are_grouped_at_once() -> None:
    start = time.perf_counter()
    index = group_by_task({f"task {t}": 10**6 for t in range(1000)}, None)
    assert time.perf_counter() - start < 1
    assert len(index) == 10**9
    counts = np.zeros(1000, dtype=np.int64)
    counts[999] = 1
    assert examples(index, counts, np.array([10**6 - 1])) == [10**9 - 1]


@pytest.mark.parametrize(
    "pieces, tasks, error, message",
    [
        ({}, None, ValueError, "at least one"),
        ({"a": 0, "b": 1}, None, ValueError, r"no examples: \['a'\]"),
        ({"a": range(3, 3), "b": range(0, 3)}, None, ValueError, r"no examples: \['a'\]"),
        ({"a": -1, "b": 1}, None, ValueError, "task 'a' has -1 examples"),
        ({"a": 1.5}, None, TypeError, r"number of examples, or each its range\(start, stop\); task 'a' has 1.5"),
        ({"a": True}, None, TypeError, "task 'a' has True"),
        ({"a": range(0, 3), "b": 2}, None, TypeError, r"task 'a' has range\(0, 3\)"),
        ({"a": [0, 1]}, None, TypeError, r"task 'a' has \[0, 1\]"),
        ({0: 3}, None, TypeError, "sequence of names"),
        ({"a": range(0, 6, 2), "b": range(7, 9)}, None, ValueError, r"step 1 and begin at 0 or later: \['a'\]"),
        ({"a": range(-1, 6)}, None, ValueError, "begin at 0 or later"),
        ({"a": range(0, 6), "b": range(5, 9)}, None, ValueError, "ranges of tasks 'a' and 'b' overlap at example 5"),
        ({"a": 1, "b": 1}, ["a", "c"], ValueError, r"same tasks as task_of_example: \['a', 'c'\], \['a', 'b'\]"),
        ({"a": 1, "b": 1}, ["a"], ValueError, "same tasks"),
    ],
)
def test_bad_ranges_raise(pieces: Any, tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_by_task(pieces, tasks)


@pytest.mark.parametrize("pieces", [{"a": 4, "b": 3}, {"a": 4, "b": 1}, {"a": range(3, 7)}])
def test_ranges_must_fit_the_data_set(pieces: Any) -> None:
    with pytest.raises(ValueError, match=r"end at example \d, the dataset has 6 examples"):
        group_by_task(pieces, None, dataset=range(6))


def test_ids_that_name_too_many_tasks_raise() -> None:
    with pytest.raises(ValueError, match="has the id 1048576, but a sampler takes up to 1048576 tasks"):
        group_by_task([0, 1 << 20], None)


def test_the_data_set_must_have_as_many_examples() -> None:
    with pytest.raises(ValueError, match="task_of_example has 6 entries, the dataset has 7 examples"):
        group_by_task(IDS, None, dataset=range(7))


def test_numbers_per_task() -> None:
    tasks = ("a", "b")
    assert per_task("x", None, tasks, 2.0).tolist() == [2, 2]
    assert per_task("x", 0.5, tasks, 2.0).tolist() == [0.5, 0.5]
    assert per_task("x", {"b": 1}, tasks, 2.0).tolist() == [2, 1]
    assert per_task("x", torch.tensor([3.0, 4.0]), tasks, 2.0).tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"x must be a number or one per task \(2\), got shape \(3,\)"):
        per_task("x", [1, 2, 3], tasks, 0.0)
    with pytest.raises(ValueError, match="x must be finite"):
        per_task("x", float("nan"), tasks, 0.0)
    with pytest.raises(ValueError, match=r"x names unknown tasks \['c'\]; the tasks are \['a', 'b'\]"):
        known("x", ["a", "c"], tasks)
