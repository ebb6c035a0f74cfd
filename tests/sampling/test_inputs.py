from __future__ import annotations

import numpy as np
import pytest
import torch

from taskgrad.sampling.inputs import count_of, known, per_task


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
    for value in ("0.5", ["0.5", "1"], {"a": "1"}, 1j, [1, None, "x"]):
        with pytest.raises(TypeError, match="x must hold numbers, got"):
            per_task("x", value, tasks, 0.0)


def test_counts() -> None:
    assert [count_of("x", value, 1) for value in (3, np.int64(3), np.array(3), torch.tensor(3))] == [3] * 4
    for value in (True, 3.0, "3", None, torch.tensor(3.7), np.array([1, 2]), np.array(3.0)):
        with pytest.raises(TypeError, match="x must be an integer, got"):
            count_of("x", value, 1)
    with pytest.raises(ValueError, match="x must be at least 1, got 0"):
        count_of("x", 0, 1)
