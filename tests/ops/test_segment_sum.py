"""``segment_sum`` and ``norm_segment_sum`` on a CPU, by the kernel in force and by the reference, against fp64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.ops import _native, norm_segment_sum, segment_sum
from tests.utils.rows import COUNTS, make_rows

module = sys.modules["taskgrad.ops.segment_sum"]  # the attribute of taskgrad.ops is the function

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# 256 rows are a piece of the CPU kernel, 4 are added at a time, 1024 columns a chunk: below, at and above each
SIZES = [(1, 1), (3, 5), (86, 1023), (1, 1024), (2, 1025)]


def want(values: Tensor, task: Tensor, segments: int) -> Tensor:
    return torch.stack([values.double()[task == s].sum((0, 1)) for s in range(segments)])


def close(got: Tensor, values: Tensor, task: Tensor, segments: int) -> None:
    """Within fp32's rounding of the sum of magnitudes (a sum of a thousand terms loses less than six bits)."""
    eps = torch.finfo(got.dtype).eps
    assert got.dtype == module.stat_dtype(values)
    error = (got.double() - want(values, task, segments)).abs()
    assert (error <= 64 * eps * want(values.abs(), task, segments)).all()


def normed(values: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    return (values.double() - (0 if mean is None else mean.double()[..., None])) * rstd.double()[..., None]


def make_norm(entries: int, rows: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, x = (torch.randn(entries, rows, d, dtype=torch.float64).to(dtype) for _ in range(2))
    wide = module.stat_dtype(dy)
    return dy, x, torch.randn(entries, rows, dtype=wide), torch.rand(entries, rows, dtype=wide) + 0.5


@pytest.mark.parametrize("function", [segment_sum, module.reference], ids=["in force", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_fp64(function, dtype, shuffled, counts, size):
    task, order, offsets = make_rows(counts, shuffled)
    values = torch.randn(len(task), *size, dtype=torch.float64).to(dtype)
    close(function(values, order, offsets), values, task, len(counts))


@pytest.mark.parametrize("function", [norm_segment_sum, module.norm_reference], ids=["in force", "reference"])
@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norm_matches_fp64(function, centred, dtype, counts, size):
    task, order, offsets = make_rows(counts, True)
    dy, x, mean, rstd = make_norm(len(task), *size, dtype)
    mean = mean if centred else None
    gamma, beta = function(dy, x, mean, rstd, order, offsets)
    close(beta, dy, task, len(counts))
    products = dy.double() * normed(x, mean, rstd)
    error = (gamma.double() - want(products, task, len(counts))).abs()
    # x − mean rounds relative to x and mean, not to their difference
    scale = dy.double().abs() * (x.double().abs() + (0 if mean is None else mean.double().abs()[..., None])) * 1.5
    assert (error <= 64 * torch.finfo(gamma.dtype).eps * want(scale, task, len(counts))).all()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(counts, rows, d, dtype, shuffled, seed):
    torch.manual_seed(seed)
    task, order, offsets = make_rows(counts, shuffled)
    dy, x, mean, rstd = make_norm(len(task), rows, d, dtype)
    close(segment_sum(dy, order, offsets), dy, task, len(counts))
    gamma, beta = norm_segment_sum(dy, x, mean, rstd, order, offsets)
    close(beta, dy, task, len(counts))
    torch.testing.assert_close(gamma, module.norm_reference(dy, x, mean, rstd, order, offsets)[0], rtol=1e-3, atol=1e-3)


def test_one_number_or_one_row_per_entry():
    task, order, offsets = make_rows([2, 0, 3], True)
    loss = torch.randn(5)
    torch.testing.assert_close(segment_sum(loss, order, offsets), want(loss[:, None, None], task, 3)[:, 0].float())
    rows = torch.randn(5, 7)
    torch.testing.assert_close(segment_sum(rows, order, offsets), want(rows[:, None], task, 3).float())


STRIDED = {
    "transposed": lambda: torch.randn(7, 3, 6).permute(2, 1, 0),
    "every second column": lambda: torch.randn(6, 3, 14)[..., ::2],
    "slice of rows": lambda: torch.randn(6, 9, 7)[:, 2:5],
    "expanded rows": lambda: torch.randn(6, 1, 7).expand(6, 3, 7),
    "expanded": lambda: torch.randn(()).expand(6, 3, 7),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_any_strides(make):
    task, order, offsets = make_rows([2, 0, 1, 3], True)
    values = make()
    close(segment_sum(values, order, offsets), values, task, 4)
    gamma, _ = norm_segment_sum(values, values, None, torch.ones(6, 3), order, offsets)
    torch.testing.assert_close(gamma, want(values.double().square(), task, 4).float())


def test_nan_stays_in_its_segment():
    task, order, offsets = make_rows([2, 0, 1, 3], True)
    dy, x, mean, rstd = make_norm(6, 3, 5, torch.float32)
    broken = int(task[0])
    dy[0, 1, 2] = float("nan")
    others = [s for s in range(4) if s != broken]
    for out in (segment_sum(dy, order, offsets), *norm_segment_sum(dy, x, mean, rstd, order, offsets)):
        assert out[others].isfinite().all() and out[broken, 2].isnan() and out[broken].isnan().sum() == 1


def test_no_entries_are_zeros():
    offsets = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(segment_sum(torch.empty(0, 2, 5), None, offsets), torch.zeros(3, 5))


def test_same_bits_for_any_number_of_threads():
    if _native.status().kind == "reference":
        pytest.skip("the reference leaves the order to torch")
    _, order, offsets = make_rows([20, 3, 0, 40], True)
    norm = make_norm(63, 50, 70, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(norm_segment_sum(*norm, order, offsets))
    finally:
        torch.set_num_threads(threads)
    for gamma, beta in results[1:]:
        assert torch.equal(gamma, results[0][0]) and torch.equal(beta, results[0][1])


@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, shuffled):
    _, order, offsets = make_rows([2, 0, 3], shuffled)
    dy, x, mean, rstd = make_norm(5, 3, 4, dtype)
    torch.library.opcheck(torch.ops.taskgrad.segment_sum.default, (dy, order, offsets))
    torch.library.opcheck(torch.ops.taskgrad.norm_segment_sum.default, (dy, x, mean, rstd, order, offsets))
    torch.library.opcheck(torch.ops.taskgrad.norm_segment_sum.default, (dy, x, None, rstd, order, offsets))


@pytest.mark.parametrize(
    ("values", "offsets", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 2]), TypeError, "values must be float32.*int64"),
        (torch.zeros(2, 3, device="meta"), torch.tensor([0, 2]), TypeError, "cpu or cuda device, got meta"),
        (torch.zeros(2, 3), torch.tensor([0.0, 2.0]), TypeError, "offsets must be int64 or int32, got torch.float"),
        (torch.zeros(2, 3), torch.zeros(0).long(), ValueError, r"offsets must have shape \[S \+ 1\], got \[0\]"),
        (torch.zeros(2, 3), torch.tensor([0]), ValueError, r"offsets must rise from 0 to 2, .*got \[0\]"),
        (torch.zeros(4), torch.tensor([0, 200_000_000, 4]), ValueError, r"offsets must rise from 0 to 4"),
        (torch.zeros(4), torch.tensor([0, 3, 1, 4]), ValueError, r"offsets must rise from 0 to 4"),
        (torch.zeros(4), torch.tensor([0, 3]), ValueError, r"offsets must rise from 0 to 4"),
        (torch.zeros(2, 3, 4, 5), torch.tensor([0, 2]), ValueError, r"\[E, M, d\], got \[2, 3, 4, 5\]"),
    ],
)
def test_wrong_input_says_what_is_needed(values, offsets, error, message):
    with pytest.raises(error, match=message):
        segment_sum(values, None, offsets)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [*COUNTS, [700, 1, 0, 299]], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (7, 768)], ids=str)
def test_cuda(dtype, counts, size):
    """Against fp64; no synchronisation, and the same bits 20 times."""
    task, order, offsets = make_rows(counts, True)
    dy, x, mean, rstd = make_norm(len(task), *size, dtype)
    on_device = [t.cuda() for t in (dy, x, mean, rstd, order, offsets)]
    first = [segment_sum(on_device[0], *on_device[4:]), *norm_segment_sum(*on_device)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            again = [segment_sum(on_device[0], *on_device[4:]), *norm_segment_sum(*on_device)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    close(first[0].cpu(), dy, task, len(counts))
    close(first[2].cpu(), dy, task, len(counts))
    torch.testing.assert_close(
        first[1].cpu().double(), want(dy.double() * normed(x, mean, rstd), task, len(counts)), rtol=1e-3, atol=1e-2
    )
