"""What all ops share: which ``order`` and ``offsets`` they take, and what there is without rows."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from taskgrad import ops
from taskgrad.ops import _register, segments


def strided(order: Tensor) -> Tensor:
    """The same numbers with gaps between them, which hold other entries."""
    wide = torch.zeros(3 * len(order), dtype=order.dtype)
    wide[1::3] = order
    return wide[1::3]


@pytest.mark.parametrize("through", ["function", "op"])
def test_a_strided_order_is_read_as_what_it_says(through):
    order, offsets = torch.tensor([4, 0, 3, 1, 2]), torch.tensor([0, 2, 2, 5])
    dy, x, rstd = torch.randn(5, 2, 3), torch.randn(5, 2, 3), torch.rand(5, 2)
    module = ops if through == "function" else torch.ops.taskgrad
    want = torch.stack([dy[[4, 0]].sum((0, 1)), torch.zeros(3), dy[[3, 1, 2]].sum((0, 1))])
    torch.testing.assert_close(module.segment_sum(dy, strided(order), strided(offsets)), want)
    got = module.norm_segment_sum(dy, x, None, rstd.mT.contiguous().mT, strided(order), offsets.int())
    torch.testing.assert_close(got, module.norm_segment_sum(dy, x, None, rstd, order, offsets))
    torch.testing.assert_close(got[1], want)


def test_a_short_rstd_is_refused_by_the_op_too():
    dy = torch.ones(4, 1, 2)
    with pytest.raises(RuntimeError, match=r"rstd must have shape \[E, M\]"):
        torch.ops.taskgrad.norm_segment_sum(dy, dy, None, torch.ones(1, 1), None, torch.tensor([0, 4]))


def test_the_kernel_and_plain_torch_find_the_same_faults():
    rng = random.Random(0)
    found = []
    for _ in range(2000):
        entries = rng.randint(0, 5)
        bounds = [0, *sorted(rng.randint(0, entries) for _ in range(rng.randint(0, 3))), entries]
        order = rng.sample(range(entries), entries) if rng.random() < 0.7 else None
        for numbers in filter(None, (bounds, order)):
            if rng.random() < 0.3:
                numbers[rng.randrange(len(numbers))] = rng.choice((-1, 0, 1, entries, entries + 1, 2**40, -(2**63)))
        as_tensors = None if order is None else torch.tensor(order, dtype=torch.int64), torch.tensor(bounds)
        wrong = bool(segments.fault(*as_tensors, entries))
        assert torch.ops.taskgrad.segments_hold(*as_tensors, entries) == (not wrong), (order, bounds)
        found.append(wrong)
    assert 500 < sum(found) < 1500


def test_results_of_malformed_segments_on_a_gpu_are_nan_and_others_untouched():
    out = torch.ones(2, 3)
    assert _register.spoiled(out, None) is out
    assert _register.spoiled(out, torch.tensor(False)).eq(1).all()
    assert _register.spoiled(out, torch.tensor(True)).isnan().all()


OFFSETS = torch.zeros(4, dtype=torch.int64)
NONE = torch.zeros(0, dtype=torch.int64)
EMPTY = {
    "segment_sum": lambda order: ops.segment_sum(torch.zeros(0, 2, 3), order, OFFSETS),
    "segment_sum of numbers": lambda order: ops.segment_sum(torch.zeros(0), order, OFFSETS),
    "norm_segment_sum": lambda order: ops.norm_segment_sum(
        torch.zeros(0, 2, 3), torch.zeros(0, 2, 3), torch.zeros(0, 2), torch.zeros(0, 2), order, OFFSETS
    ),
    "wgrad_gram": lambda order: ops.wgrad_gram(torch.zeros(0, 3), torch.zeros(0, 4), OFFSETS),
    "ghost_gram": lambda order: ops.ghost_gram(torch.zeros(0, 3), torch.zeros(0, 4), OFFSETS),
    "wgrad_sketch": lambda order: ops.wgrad_sketch(
        torch.zeros(0, 2, 3), torch.zeros(0, 2, 4), order, OFFSETS, torch.ones(3, 2), torch.ones(4, 2)
    ),
    "wgrad_sketch, whole": lambda order: ops.wgrad_sketch(
        torch.zeros(0, 2, 3), torch.zeros(0, 2, 4), order, OFFSETS, None, None
    ),
    **{
        f"wgrad_stats, {strategy}": lambda order, strategy=strategy: ops.wgrad_stats(
            torch.zeros(0, 2, 3), torch.zeros(0, 2, 4), order, OFFSETS, torch.ones(3, 2), torch.ones(4, 2), strategy
        )
        for strategy in (None, "fused", "ghost", "materialise")
    },
    "conv_sketch": lambda order: ops.conv_sketch(
        torch.zeros(0, 3, 4), torch.zeros(0, 2, 6), torch.ones(3, 2, 3), [1], [0], [1], 1, order, OFFSETS, None, None
    ),
    "embedding_stats": lambda order: ops.embedding_stats(
        torch.zeros(0, 2, 3), torch.zeros(0, 2).long(), order, OFFSETS, 5, -1, torch.ones(5, 2), None
    ),
    "embedding_gram": lambda order: ops.embedding_gram(
        torch.zeros(0, 2, 3), torch.zeros(0, 2).long(), order, OFFSETS, 5
    ),
}


@pytest.mark.parametrize("order", [None, NONE], ids=["sorted", "ordered"])
@pytest.mark.parametrize("name", EMPTY)
def test_without_rows_there_are_zeros(name, order):
    out = EMPTY[name](order)
    for result in (out,) if isinstance(out, Tensor) else out:
        assert result.numel() > 0 and result.eq(0).all()
