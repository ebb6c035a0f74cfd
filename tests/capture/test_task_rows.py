"""Task ids as the kernels want them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from taskgrad.capture.task_rows import Rows, sent, sorted_by_task
from taskgrad.tracking.delivery import Delivery

CPU = torch.device("cpu")


@given(st.data())
def test_rows_are_sorted_counted_and_weighed(data: st.DataObject) -> None:
    tasks = data.draw(st.integers(1, 6))
    shape = data.draw(st.sampled_from([(1,), (7,), (3, 4), (1, 5)]))
    count = torch.Size(shape).numel()
    ids = torch.tensor(data.draw(st.lists(st.integers(-1, tasks - 1), min_size=count, max_size=count))).view(shape)
    weight = torch.tensor(data.draw(st.lists(st.floats(0, 5, width=32), min_size=count, max_size=count))).view(shape)
    rows = Rows(ids, tasks, CPU, weight)
    segment = [tasks if i < 0 else i for i in ids.flatten().tolist()]
    order = range(count) if rows.order is None else rows.order.tolist()
    assert list(order) == sorted(range(count), key=lambda i: segment[i])  # stable
    assert rows.offsets.tolist() == [sum(s < t for s in segment) for t in range(tasks + 2)]
    held = [set(torch.tensor(segment).view(shape)[e].flatten().tolist()) for e in range(shape[0])]
    assert rows.examples.tolist() == [sum(t in h for h in held) for t in range(tasks + 1)]
    sums = [sum(w for s, w in zip(segment, weight.flatten().tolist(), strict=True) if s == t) for t in range(tasks + 1)]
    torch.testing.assert_close(rows.weight, torch.tensor(sums, dtype=torch.float64))
    assert rows.wrong is None and rows.entries == count


@pytest.mark.parametrize("tasks", [1, 255, 256, 70_000])
@pytest.mark.parametrize("entries", [0, 1, 2, 5000])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_order_is_that_of_a_stable_sort(tasks: int, entries: int, dtype: torch.dtype) -> None:
    segment = torch.randint(0, min(tasks, torch.iinfo(dtype).max) + 1, (entries,)).to(dtype)
    by_task, order = torch.sort(segment, stable=True)
    found, offsets = sorted_by_task(segment, tasks)
    assert torch.equal(torch.arange(entries) if found is None else found, order)
    assert found is None or found.dtype == torch.int64
    assert torch.equal(offsets, torch.searchsorted(by_task.long(), torch.arange(tasks + 2)))
    again, same = sorted_by_task(by_task, tasks)
    assert again is None and torch.equal(same, offsets) and same.dtype == torch.int64


def test_what_is_sorted_is_not_sorted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(np, "argsort", refuse)
    monkeypatch.setattr(torch, "sort", refuse)
    assert Rows(torch.tensor([[0, 0, 1], [2, 2, -1]]), 3, CPU).order is None
    with pytest.raises(AssertionError, match="sorted"):
        Rows(torch.tensor([1, 0]), 3, CPU)


class Copies(TorchFunctionMode):
    """Records how tensors go from one device to another."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.pin_memory):
            self.seen.append((func.__name__, bool((kwargs or {}).get("non_blocking"))))
        if func is Tensor.pin_memory:  # fake tensors have none
            return args[0]
        return func(*args, **(kwargs or {}))


def test_to_a_gpu_from_pinned_memory_and_back_with_waiting() -> None:
    """A copy from pageable memory makes the host wait; one in the background to the host would be read too early."""
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(), Copies() as copies:
        there = sent(torch.zeros(3), gpu)
        assert there.device == gpu and copies.seen == [("pin_memory", False), ("to", True)]
        copies.seen.clear()
        assert sent(there, CPU).device == CPU and copies.seen == [("to", False)]
        copies.seen.clear()
        assert sent(there, gpu) is there and copies.seen == [("to", False)]


def test_wrong_ids_of_a_gpu_are_reported_when_they_arrive() -> None:
    values = {"valid": torch.tensor(False), "wrong": torch.tensor(True)}
    delivery = Delivery(("a", "b"), 7, values, None, lambda values: {}, print)
    with pytest.raises(ValueError, match=r"step 7: ids must lie in \[-1, 2\) for 2 tasks"):
        _ = delivery.report
