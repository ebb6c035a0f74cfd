from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from taskgrad.sampling.inputs import group_by_task, known, per_task

IDS = [1, 0, 0, 2, 1, 0]


@pytest.mark.parametrize(
    "ids",
    [IDS, tuple(IDS), np.array(IDS), np.array(IDS, dtype=np.uint8), torch.tensor(IDS), torch.tensor(IDS).int()],
)
def test_ids_of_every_kind(ids: Any) -> None:
    index = group_by_task(ids, None)
    assert index.tasks == ("0", "1", "2") and not index.named
    assert index.sizes.tolist() == [3, 2, 1]
    assert index.examples(np.array([2, 1, 1]), np.array([0, 2, 1, 0])) == [1, 5, 4, 3]


def test_names() -> None:
    index = group_by_task(["b", "a", "b"], ["b", "a"], dataset=range(3))
    assert index.named and index.sizes.tolist() == [2, 1]
    assert index.examples(np.array([2, 1]), np.array([1, 0, 0])) == [2, 0, 1]


def test_sorted_data_need_no_order() -> None:
    index = group_by_task([0, 0, 1, 1, 1], None)
    assert index.order is None
    assert index.examples(np.array([1, 2]), np.array([1, 0, 2])) == [1, 2, 4]


@pytest.mark.parametrize(
    "ids, tasks, error, message",
    [
        ([[0, 1]], None, ValueError, r"one task per example, got shape \(1, 2\); ids per token are for the tracker"),
        ([], None, ValueError, r"got shape \(0,\)"),
        ([0.0, 1.0], None, TypeError, "integers or names, got float64"),
        ([0, -1, -2], None, ValueError, r"2 negative ids \(lowest -2\).*one of their own, for instance 'rest'"),
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
