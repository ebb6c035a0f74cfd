"""``memory_dot`` on a CPU, by the kernel in force and by the reference, and interpreted, against fp64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.ops import _native, memory_dot

module = sys.modules["taskgrad.ops.memory_dot"]  # the attribute of taskgrad.ops is the function

# 512 columns are a chunk, 4 x 2 rows a tile, 65536 elements a stripe of the CPU kernel: below, at and above each
SHAPES = [(1, 1, 1), (2, 3, 511), (4, 2, 512), (5, 6, 513), (8, 9, 30011), (17, 18, 1025), (65, 66, 700)]
DTYPES = [torch.float32, torch.float64]


def check(dots: Tensor, memory: Tensor, stats: Tensor, tolerance: float = 1e-13) -> None:
    a, b = memory.double(), stats.double()
    assert dots.dtype == torch.float64 and dots.shape == (len(a), len(b))
    assert ((dots - a @ b.mT).abs() <= tolerance * a.norm(dim=1)[:, None] * b.norm(dim=1)[None, :] + 1e-300).all()


@pytest.mark.parametrize("function", [memory_dot, module.reference], ids=["in force", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(function, dtype, shape):
    T, S, K = shape
    memory, stats = torch.randn(T, K, dtype=dtype), torch.randn(S, K, dtype=dtype)
    check(function(memory, stats), memory, stats)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 2000), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_shape(T, S, K, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    memory, stats = (torch.randn(n, K, dtype=dtype, generator=generator) for n in (T, S))
    check(memory_dot(memory, stats), memory, stats)


def test_any_strides():
    memory, stats = torch.randn(700, 3).mT, torch.randn(10, 1400)[::2, ::2]
    check(memory_dot(memory, stats), memory, stats)
    check(memory_dot(stats[:, 3:100], memory[:, :97]), stats[:, 3:100], memory[:, :97])


def test_nan_stays_in_its_row_and_column():
    memory, stats = torch.randn(5, 600), torch.randn(7, 600)
    memory[1, 3], stats[4, 599] = float("nan"), float("inf")
    broken = ~memory_dot(memory, stats).isfinite()
    assert broken[1].all() and broken[:, 4].all() and broken.sum() == 7 + 5 - 1


def test_same_bits_for_any_number_of_threads():
    if _native.status().kind == "reference":
        pytest.skip("the reference leaves the order to the BLAS library")
    memory, stats = torch.randn(8, 100_001), torch.randn(9, 100_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(memory_dot(memory, stats))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_opcheck():
    for dtype in DTYPES:
        sample = torch.randn(3, 70, dtype=dtype), torch.randn(4, 70, dtype=dtype)
        torch.library.opcheck(torch.ops.taskgrad.memory_dot.default, sample)
    torch.library.opcheck(torch.ops.taskgrad.memory_dot.default, (torch.randn(70, 3).mT, torch.randn(0, 70)))


@pytest.mark.parametrize(
    ("memory", "stats", "error", "message"),
    [
        (torch.zeros(2, 3).half(), torch.zeros(2, 3).half(), TypeError, "float32 or float64, got torch.float16"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), TypeError, "stats must be float32, got torch.float64"),
        (torch.zeros(2, 3, device="meta"), torch.zeros(2, 3), TypeError, "stats must be on meta as memory is, got cpu"),
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, r"\[S, K\], got \[2, 3\] and \[2, 4\]"),
    ],
)
def test_wrong_input_says_what_is_needed(memory, stats, error, message):
    with pytest.raises(error, match=message):
        memory_dot(memory, stats)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 9, 300_007), (130, 131, 5000), (0, 2, 3), (2, 2, 0)], ids=str)
def test_cuda(dtype, shape):
    """Against fp64; no synchronisation, and the same bits 20 times."""
    T, S, K = shape
    memory, stats = torch.randn(T, K, dtype=dtype).cuda(), torch.randn(S, K, dtype=dtype).cuda()
    first = memory_dot(memory, stats)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [memory_dot(memory, stats) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in again)
    check(first.cpu(), memory.cpu(), stats.cpu(), 1e-6)
