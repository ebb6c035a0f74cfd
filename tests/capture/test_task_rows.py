"""Task ids as the kernels want them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskgrad.capture.task_rows import Rows
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


def test_wrong_ids_of_a_gpu_are_reported_when_they_arrive() -> None:
    values = {"valid": torch.tensor(False), "wrong": torch.tensor(True)}
    delivery = Delivery(("a", "b"), 7, values, None, lambda values: {}, print)
    with pytest.raises(ValueError, match=r"step 7: ids must lie in \[-1, 2\) for 2 tasks"):
        _ = delivery.report
