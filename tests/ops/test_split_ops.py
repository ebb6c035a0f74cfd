"""The ops that split a weight gradient by task: against per-task sums in float64, and torch's own checks of an op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.ops import _native
from taskgrad.ops.conv_sketch import conv_sketch
from taskgrad.ops.wgrad_sketch import splits, wgrad_sketch
from tests.utils.rows import COUNTS, make_rows


def _signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).double() * 2 - 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
)
def test_wgrad_sketch(counts: list[int], rows: int, d_out: int, d_in: int, r0: int, r1: int, shuffled: bool) -> None:
    """Both ways to the sketch, whichever the sizes pick; a rank of 0 stands for the identity."""
    task, order, offsets = make_rows(counts, shuffled)
    dy, x = (torch.randn(len(task), rows, d, dtype=torch.float64) for d in (d_out, d_in))
    left = _signs(d_out, r0) if r0 else None
    right = _signs(d_in, r1) if r1 else None
    dw, stats = wgrad_sketch(dy, x, order, offsets, left, right)
    parts = torch.stack([torch.einsum("nro,nri->oi", dy[task == t], x[task == t]) for t in range(len(counts))])
    torch.testing.assert_close(dw, parts.sum(0))
    sketched = parts if left is None else left.mT @ parts
    torch.testing.assert_close(stats, sketched if right is None else sketched @ right)


def test_wgrad_sketch_takes_both_ways() -> None:
    """Few rows: dY and X are sketched; many rows: the tasks' gradients, unless the native kernel is there."""
    offsets = torch.tensor([0, 1, 2])
    left, right = _signs(64, 4), _signs(64, 4)
    few, many = (torch.randn(2, m, 64, dtype=torch.float64) for m in (4, 4096))
    assert not splits(few, few, offsets, left, right)
    assert splits(many, many, offsets, left, right) == (not _native.ready())
    for y in (few, many):
        dw, stats = wgrad_sketch(y, y, None, offsets, left, right)
        torch.testing.assert_close(stats.sum(0), left.mT @ dw @ right)


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_conv_sketch(counts: list[int], sketched: bool) -> None:
    task, order, offsets = make_rows(counts, True)
    x = torch.randn(len(task), 4, 9, 8, dtype=torch.float64)
    weight = torch.randn(6, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    options = ([2, 1], [1, 0], [1, 2], 2)
    out = torch.nn.functional.conv2d(x, weight, None, *options)
    dy = torch.randn_like(out)
    parts = [torch.autograd.grad((out * dy)[task == t].sum(), weight, retain_graph=True)[0] for t in range(len(counts))]
    want = torch.stack(parts)
    left, right = (_signs(6, 3), _signs(12, 5)) if sketched else (None, None)
    dw, stats = conv_sketch(dy, x, weight.detach(), *options, order, offsets, left, right)
    torch.testing.assert_close(dw, want.sum(0))
    matrix = want.flatten(2)
    torch.testing.assert_close(stats, matrix if left is None or right is None else left.mT @ matrix @ right)


@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, shuffled: bool) -> None:
    task, order, offsets = make_rows([2, 0, 3], shuffled)
    n = len(task)
    check = torch.library.opcheck
    for left, right in ((None, None), (_signs(6, 2).float(), _signs(4, 2).float())):
        check(
            torch.ops.taskgrad.wgrad_sketch.default,
            (torch.randn(n, 3, 6).to(dtype), torch.randn(n, 3, 4).to(dtype), order, offsets, left, right),
        )
    x, weight = torch.randn(n, 2, 8).to(dtype), torch.randn(4, 2, 3).to(dtype)
    dy = torch.nn.functional.conv1d(x, weight)
    check(torch.ops.taskgrad.conv_sketch.default, (dy, x, weight, [1], [0], [1], 1, order, offsets, None, None))
