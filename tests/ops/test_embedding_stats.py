"""``embedding_stats`` and ``embedding_gram`` on a CPU, against per-task gradients in float64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.ops import embedding_gram, embedding_stats
from tests.utils.rows import COUNTS, make_rows

module = sys.modules["taskgrad.ops.embedding_stats"]  # the attribute of taskgrad.ops is the function

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).double() * 2 - 1


def gradients(dy: Tensor, index: Tensor, task: Tensor, segments: int, vocabulary: int, padding: int) -> Tensor:
    """G_s [S, V, d] in float64, row by row."""
    parts = torch.zeros(segments, vocabulary, dy.shape[-1], dtype=torch.float64)
    for entry in range(dy.shape[0]):
        for row in range(dy.shape[1]):
            if index[entry, row] != padding:
                parts[task[entry], index[entry, row]] += dy[entry, row].double()
    return parts


@pytest.mark.parametrize("function", ["in force", "reference"])
@pytest.mark.parametrize("padding", [-1, 3])
@pytest.mark.parametrize("ranks", [(0, 0), (4, 0), (0, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_stats(function: str, counts: list[int], ranks: tuple[int, int], padding: int) -> None:
    task, order, offsets = make_rows(counts, True)
    index = torch.randint(0, 7, (len(task), 4))
    dy = torch.randn(len(task), 4, 5, dtype=torch.float64)
    left, right = (signs(d, r) if r else None for d, r in zip((7, 5), ranks, strict=True))
    parts = gradients(dy, index, task, len(counts), 7, padding)
    how = embedding_stats if function == "in force" else module.reference
    dw, stats = how(dy, index.int(), order, offsets, 7, padding, left, right)
    torch.testing.assert_close(dw, parts.sum(0))
    want = parts if left is None else left.mT @ parts
    torch.testing.assert_close(stats, want if right is None else want @ right)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from([-1, 0]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_gram(counts, rows, vocabulary, d, padding, dtype, shuffled, seed):
    torch.manual_seed(seed)
    task, order, offsets = make_rows(counts, shuffled)
    index = torch.randint(0, vocabulary, (len(task), rows))
    dy = torch.randn(len(task), rows, d).to(dtype)
    parts = gradients(dy, index, task, len(counts), vocabulary, padding).flatten(1)
    gram = embedding_gram(dy, index, order, offsets, vocabulary, padding)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.mT)
    norms = parts.norm(dim=1)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    # cancelling sums are rounded relative to what was summed
    norms += dy.double().norm() * 0.1
    assert ((gram - parts @ parts.mT).abs() <= tolerance * norms[:, None] * norms[None, :]).all()


def test_nan_stays_in_its_segment():
    task, order, offsets = make_rows([2, 1, 3], True)
    dy, index = torch.randn(6, 2, 5), torch.randint(0, 7, (6, 2))
    dy[task == 1] = float("nan")
    _, stats = embedding_stats(dy, index, order, offsets, 7, -1, signs(7, 4).float(), None)
    assert stats[1].isnan().all() and stats[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, shuffled: bool) -> None:
    _, order, offsets = make_rows([2, 0, 3], shuffled)
    dy, index = torch.randn(5, 3, 4).to(dtype), torch.randint(0, 9, (5, 3))
    for left, right in ((None, None), (signs(9, 2).float(), signs(4, 2).float())):
        torch.library.opcheck(
            torch.ops.taskgrad.embedding_stats.default, (dy, index, order, offsets, 9, -1, left, right)
        )


@pytest.mark.parametrize(
    ("index", "left", "error", "message"),
    [
        (torch.zeros(2, 3), None, TypeError, "index must be int64 or int32, got torch.float32"),
        (torch.zeros(2, 4, dtype=torch.int64), None, ValueError, r"index \[E, M\], got \[2, 3, 5\] and \[2, 4\]"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(8, 2), ValueError, r"left must have shape \[7, r\]"),
    ],
)
def test_wrong_input_says_what_is_needed(index, left, error, message):
    with pytest.raises(error, match=message):
        embedding_stats(torch.zeros(2, 3, 5), index, None, torch.tensor([0, 2]), 7, -1, left, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [*COUNTS, [90, 0, 1, 200]], ids=str)
def test_cuda(dtype, counts):
    """Against the CPU in float64; no synchronisation, and the same bits 20 times."""
    _, order, offsets = make_rows(counts, True)
    entries = sum(counts)
    dy, index = torch.randn(entries, 9, 40).to(dtype), torch.randint(0, 300, (entries, 9))
    left, right = signs(300, 24), signs(40, 33)
    dw, stats = embedding_stats(dy.double(), index, order, offsets, 300, 0, left, right)
    gram = embedding_gram(dy.double(), index, order, offsets, 300, 0)
    on_device = [t.cuda() for t in (dy, index, order, offsets)]
    maps = left.float().cuda(), right.float().cuda()

    def run() -> list[Tensor]:
        sketch = embedding_stats(*on_device, 300, 0, *maps)[1]
        return [sketch, embedding_gram(*on_device, 300, 0), embedding_stats(*on_device, 300, 0, None, None)[1]]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [run() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True))
    torch.testing.assert_close(first[0].cpu().double(), stats, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(first[1].cpu(), gram, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(first[2].sum(0).cpu().double(), dw, rtol=1e-4, atol=1e-3)
