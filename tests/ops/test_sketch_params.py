"""``sketch_params`` on a CPU against fp64, and why it is in fp64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.ops import sketch_params

module = sys.modules["taskgrad.ops.sketch_params"]  # the attribute of taskgrad.ops is the function

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).float() * 2 - 1


def want(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    wide = theta.double() if left is None else torch.einsum("ar,ab->rb", left.double(), theta.double())
    return wide if right is None else torch.einsum("ab,br->ar", wide, right.double())


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_matches_fp64(d0, d1, r0, r1, dtype, transposed, seed):
    """A rank of 0 stands for the identity."""
    torch.manual_seed(seed)
    theta = torch.randn(d1, d0).to(dtype).mT if transposed else torch.randn(d0, d1).to(dtype)
    left, right = signs(d0, r0) if r0 else None, signs(d1, r1) if r1 else None
    got = sketch_params(theta, left, right)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want(theta, left, right), rtol=1e-12, atol=1e-11)


def test_several_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 100)
    theta, left, right = torch.randn(37, 23), signs(37, 5), signs(23, 4)
    torch.testing.assert_close(sketch_params(theta, left, right), want(theta, left, right))
    torch.testing.assert_close(sketch_params(theta, left, None), want(theta, left, None))


def test_an_update_a_millionth_of_the_parameter_comes_through():
    theta, left, right = torch.randn(300, 200), signs(300, 8), signs(200, 8)
    moved = theta + 1e-6 * torch.randn(300, 200)
    exact = want(moved.double() - theta.double(), left, right)
    difference = sketch_params(moved, left, right) - sketch_params(theta, left, right)
    assert (difference - exact).norm() < 1e-6 * exact.norm()
    single = (left.mT @ moved @ right - left.mT @ theta @ right).double()
    assert (single - exact).norm() > 1e-3 * exact.norm()


def test_opcheck():
    for dtype in DTYPES:
        for left, right in ((None, None), (signs(6, 2), None), (None, signs(5, 3)), (signs(6, 2), signs(5, 3))):
            sample = torch.randn(6, 5).to(dtype), left, right
            torch.library.opcheck(torch.ops.taskgrad.sketch_params.default, sample)


@pytest.mark.parametrize(
    ("theta", "left", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), None, TypeError, "theta must be float32.*int64: convert it"),
        (torch.zeros(2, 3, device="meta"), None, TypeError, "cpu or cuda device, got meta"),
        (torch.zeros(3), None, ValueError, r"theta must have shape \[d0, d1\], got \[3\]"),
        (torch.zeros(2, 3), torch.zeros(3, 1), ValueError, r"left must have shape \[2, r\], got \[3, 1\]"),
    ],
)
def test_wrong_input_says_what_is_needed(theta, left, error, message):
    with pytest.raises(error, match=message):
        sketch_params(theta, left, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (70, 45, 40, 17), (300, 4096, 32, 32), (5000, 33, 7, 100)], ids=str)
def test_cuda(dtype, shape):
    """Against fp64; no synchronisation, and the same bits 20 times."""
    d0, d1, r0, r1 = shape
    theta, left, right = torch.randn(d0, d1).to(dtype), signs(d0, r0), signs(d1, r1)
    on_device = [t.cuda() for t in (theta, left, right)]
    first = sketch_params(*on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [sketch_params(*on_device) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in again)
    torch.testing.assert_close(first.cpu(), want(theta, left, right), rtol=1e-11, atol=1e-9)
