"""``wgrad_sketch``: its checks, its reference, and (marked ``gpu``) its CUDA path. Its CPU path: ``test_split_ops``."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.ops import wgrad_sketch
from tests.utils.rows import COUNTS, make_rows

module = sys.modules["taskgrad.ops.wgrad_sketch"]  # the attribute of taskgrad.ops is the function


def signs(d, r):
    return torch.randint(0, 2, (d, r)).float() * 2 - 1 if r else None


def expected(dy, x, task, segments, left, right):
    parts = torch.stack(
        [torch.einsum("nro,nri->oi", dy[task == s].double(), x[task == s].double()) for s in range(segments)]
    )
    stats = parts if left is None else left.double().mT @ parts
    return parts.sum(0), stats if right is None else stats @ right.double()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    st.integers(1, 5),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.booleans(),
)
def test_reference(counts, rows, size, ranks, shuffled):
    task, order, offsets = make_rows(counts, shuffled)
    dy, x = (torch.randn(len(task), rows, d, dtype=torch.float64) for d in size)
    sides = [signs(d, r) for d, r in zip(size, ranks, strict=True)]
    got = module.reference(dy, x, order, offsets, *sides)
    for a, b in zip(got, expected(dy, x, task, len(counts), *sides), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_accumulated_in_float32(dtype):
    task, order, offsets = make_rows([20, 0, 1, 40], True)
    dy, x = (torch.randn(len(task), 3, d).to(dtype) for d in (30, 20))
    for sides in ((signs(30, 4), signs(20, 4)), (None, signs(20, 4)), (None, None)):
        dw, stats = wgrad_sketch(dy, x, order, offsets, *sides)
        want = expected(dy, x, task, 4, *sides)
        assert dw.dtype == dtype and stats.dtype == torch.float32
        torch.testing.assert_close(stats.double(), want[1], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(dw.double(), want[0], rtol=2 * torch.finfo(dtype).eps, atol=0.05)


WRONG = [
    ({"dy": torch.zeros(5, 2, 3).long()}, TypeError, r"dy must be float32.*got torch\.int64"),
    ({"x": torch.zeros(5, 2, 4).half()}, TypeError, r"x must be float32, got torch\.float16"),
    ({"x": torch.zeros(5, 2, 4, device="meta")}, TypeError, r"x must be on cpu as dy is, got meta"),
    ({"offsets": torch.tensor([0.0, 5.0])}, TypeError, r"offsets must be int64 or int32, got torch\.float32"),
    ({"order": torch.arange(5).int()}, TypeError, r"order must be int64"),
    ({"x": torch.zeros(5, 3, 4)}, ValueError, r"dy and x must have shapes.*got \[5, 2, 3\] and \[5, 3, 4\]"),
    ({"order": torch.arange(4)}, ValueError, r"order must have shape \[5\], every entry once, got \[4\]"),
    ({"offsets": torch.tensor([0, 2])}, ValueError, r"offsets must rise from 0 to 5"),
    ({"order": torch.tensor([0, 1, 2, 3, 5])}, ValueError, r"from 0 to 4 once, got values from 0 to 5"),
    ({"order": torch.tensor([0, 1, 2, 3, 3])}, ValueError, r"from 0 to 4 once, got 3 more than once"),
    ({"left": torch.zeros(4, 2)}, ValueError, r"left must have shape \[3, r\], got \[4, 2\]"),
    ({"right": torch.zeros(3, 2)}, ValueError, r"right must have shape \[4, r\], got \[3, 2\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_says_what_is_needed(change, error, message):
    arguments = {"dy": torch.zeros(5, 2, 3), "x": torch.zeros(5, 2, 4), "offsets": torch.tensor([0, 5])}
    arguments |= {"order": None, "left": None, "right": None}
    with pytest.raises(error, match=message):
        wgrad_sketch(**(arguments | change))


def test_no_gradient_flows_through_it():
    dy, x = torch.zeros(5, 2, 3, requires_grad=True), torch.zeros(5, 2, 4)
    assert not any(t.requires_grad for t in wgrad_sketch(dy, x, None, torch.tensor([0, 5]), None, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    @pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
    @pytest.mark.parametrize("ranks", [(32, 32), (0, 16), (64, 0), (0, 0), (5, 100)], ids=str)
    @pytest.mark.parametrize("size", [(768, 512), (333, 100)], ids=str)
    @pytest.mark.parametrize("counts", [*COUNTS, [60, 0, 1, 42], [3] * 40], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_matches_fp64(self, dtype, counts, size, ranks, shuffled):
        task, order, offsets = make_rows(counts, shuffled)
        dy, x = (torch.randn(len(task), 37, d).to(dtype) for d in size)
        sides = [signs(d, r) for d, r in zip(size, ranks, strict=True)]
        inputs = [None if t is None else t.cuda() for t in (dy, x, order, offsets, *sides)]
        got = wgrad_sketch(*inputs)
        for result, want in zip(got, expected(dy, x, task, len(counts), *sides), strict=True):
            eps = torch.finfo(result.dtype).eps if result is got[0] else torch.finfo(torch.float32).eps
            assert (result.cpu().double() - want).norm() <= max(4 * eps, 1e-5) * want.norm()
        on_the_host = wgrad_sketch(*inputs[:3], offsets, *inputs[4:])
        assert all(torch.equal(a, b) for a, b in zip(got, on_the_host, strict=True))

    @pytest.mark.parametrize("ranks", [(32, 32), (0, 0)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_and_no_waiting(self, dtype, ranks):
        _, order, offsets = make_rows([60, 0, 1, 42], True)
        dy, x = (torch.randn(103, 20, 256).to(dtype).cuda() for _ in range(2))
        left, right = (None if r == 0 else signs(256, r).cuda() for r in ranks)
        inputs = (dy, x, order.cuda(), offsets.cuda(), left, right)
        first = wgrad_sketch(*inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [wgrad_sketch(*inputs) for _ in range(20)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
