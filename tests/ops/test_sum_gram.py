"""``sum_gram`` on a CPU, by the kernel that is in force and by the reference, against fp64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import taskgrad.ops
from taskgrad.ops import _native, sum_gram

module = sys.modules["taskgrad.ops.sum_gram"]  # the attribute of taskgrad.ops is the function

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# 512 columns are a chunk, 4 rows a tile, 65536 elements a stripe: below, at and above each
SHAPES = [(1, 1), (2, 3), (3, 511), (4, 512), (5, 513), (8, 8191), (9, 30011), (17, 1025), (65, 700)]


def make_block(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


def check(block: Tensor, result: tuple[Tensor, Tensor]) -> None:
    total, gram = result
    exact = block.double()
    norms = exact.norm(dim=1)
    # the Gram is fp64 throughout, so its error is measured against the product of the norms
    assert ((gram - exact @ exact.mT).abs() <= 1e-13 * norms[:, None] * norms[None, :] + 1e-300).all()
    assert torch.equal(gram, gram.mT)
    assert gram.dtype == torch.float64
    assert total.dtype == block.dtype
    accumulated_in = torch.float64 if block.dtype == torch.float64 else torch.float32
    rounding = torch.finfo(block.dtype).eps + block.shape[0] * torch.finfo(accumulated_in).eps
    assert ((total.double() - exact.sum(0)).abs() <= rounding * exact.abs().sum(0)).all()


@pytest.mark.parametrize("function", [sum_gram, module.reference], ids=["in force", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(function, dtype, shape):
    block = make_block(*shape, dtype)
    check(block, function(block))


@pytest.mark.parametrize("function", [sum_gram, module.reference], ids=["in force", "reference"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)], ids=str)
def test_empty_is_zero(function, shape):
    total, gram = function(torch.empty(shape))
    assert torch.equal(total, torch.zeros(shape[1]))
    assert torch.equal(gram, torch.zeros(shape[0], shape[0], dtype=torch.float64))


STRIDED = {
    "transposed": lambda: make_block(700, 6).mT,
    "every second column": lambda: make_block(6, 1400)[:, ::2],
    "every second row": lambda: make_block(12, 700)[::2],
    "slice of columns": lambda: make_block(6, 900)[:, 101:801],
    "one column": lambda: make_block(6, 900)[:, 5:6],
    "expanded row": lambda: make_block(1, 700).expand(6, 700),
    "expanded column": lambda: make_block(6, 1).expand(6, 700),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_any_strides(make):
    block = make()
    before = block.clone()
    check(block, sum_gram(block))
    assert torch.equal(block, before)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3000), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_shape(rows, columns, dtype, seed):
    block = make_block(rows, columns, dtype, seed)
    check(block, sum_gram(block))


def test_every_float16_value_is_read_exactly():
    values = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(torch.float16)
    total, _ = sum_gram(values.reshape(1, -1))
    torch.testing.assert_close(total, values, rtol=0, atol=0, equal_nan=True)
    finite = torch.where(values.isfinite(), values, 0).reshape(2, -1)
    check(finite, sum_gram(finite))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row_and_column(dtype):
    block = make_block(5, 1000, dtype)
    block[1, 3], block[3, 700] = float("nan"), float("inf")
    total, gram = sum_gram(block)
    broken = ~gram.isfinite()
    assert broken[[1, 3]].all() and broken[:, [1, 3]].all()
    assert gram[0][[0, 2, 4]].isfinite().all()
    assert total[3].isnan() and total[700] == float("inf") and total.isfinite().sum() == 998


def test_squares_beyond_float32_do_not_overflow():
    block = torch.tensor([[1e30, 1e-30], [0.0, 1e-30]])
    _, gram = sum_gram(block)
    torch.testing.assert_close(gram, block.double() @ block.double().mT, rtol=1e-14, atol=0)


def test_same_bits_for_any_number_of_threads():
    if _native.status().kind == "reference":
        pytest.skip("the reference leaves the order to the BLAS library")
    block = make_block(8, 200_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(sum_gram(block))
    finally:
        torch.set_num_threads(threads)
    for total, gram in results[1:]:
        assert torch.equal(total, results[0][0])
        assert torch.equal(gram, results[0][1])


def test_opcheck():
    for dtype in DTYPES:
        torch.library.opcheck(torch.ops.taskgrad.sum_gram.default, (make_block(3, 70, dtype),))
    torch.library.opcheck(torch.ops.taskgrad.sum_gram.default, (make_block(70, 3).mT,))
    torch.library.opcheck(torch.ops.taskgrad.sum_gram.default, (torch.empty(0, 3),))


def test_no_gradient_flows_through_it():
    total, gram = sum_gram(make_block(3, 70).requires_grad_())
    assert not total.requires_grad and not gram.requires_grad


def test_is_exported():
    assert taskgrad.ops.sum_gram is sum_gram


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            r"block must be float32.*got torch\.int64: convert it",
        ),
        (
            torch.zeros(2, 3, dtype=torch.complex64),
            TypeError,
            r"block must be float32.*complex64: convert it",
        ),
        (
            torch.zeros(2, 3, device="meta"),
            TypeError,
            r"block must be on a cpu or cuda device, got meta: move it",
        ),
        (torch.zeros(3), ValueError, r"block must have shape \[T, M\].*got \[3\]: reshape it"),
        (torch.zeros(2, 3, 4), ValueError, r"block must have shape \[T, M\].*got \[2, 3, 4\]: reshape it"),
    ],
)
def test_wrong_input_says_what_is_needed(block, error, message):
    with pytest.raises(error, match=message):
        sum_gram(block)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 300_007), (64, 100_001), (2, 0), (0, 2)], ids=str)
def test_cuda_matches_fp64(dtype, shape):
    block = make_block(*shape, dtype).cuda()
    total, gram = sum_gram(block)
    exact = block.double()
    norms = exact.norm(dim=1)
    assert ((gram - exact @ exact.mT).abs() <= 1e-6 * norms[:, None] * norms[None, :]).all()
    again = sum_gram(block)
    assert torch.equal(total, again[0]) and torch.equal(gram, again[1])
    torch.testing.assert_close(total, module.reference(block)[0])
