"""The Triton kernel of ``embedding_stats`` on CPU tensors: ``TRITON_INTERPRET=1 pytest
tests/ops/test_embedding_stats_triton.py``.

It proves indexing and masking, nothing about concurrency. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401
from tests.utils.rows import COUNTS, make_rows  # noqa: E402

kernel = importlib.import_module("taskgrad.ops.triton.embedding_stats")
module = sys.modules["taskgrad.ops.embedding_stats"]

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.mark.parametrize("int_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("ranks", [(4, 2), (33, 17)], ids=str)
@pytest.mark.parametrize("counts", [*COUNTS, [3, 0, 0, 30, 1, 0, 7, 0]], ids=str)
def test_matches_fp64(counts, ranks, int_dtype, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_N", 4)  # few rows a program: segments cross programs, and the reverse
    monkeypatch.setattr(kernel, "rows_per_program", lambda *_: 8)
    _, order, offsets = make_rows(counts, ranks == (4, 2))
    index = torch.randint(0, 7, (sum(counts), 3)).to(int_dtype)
    dy = torch.randn(sum(counts), 3, 5)
    left, right = (torch.randint(0, 2, (d, r)).float() * 2 - 1 for d, r in zip((7, 5), ranks, strict=True))
    v = module._projected(dy, index, 3, right)
    got = kernel.launch(v, index, order, offsets.to(int_dtype), left)
    want = module.stats_reference(dy.double(), index, order, offsets, 7, 3, left, right)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_sizes_in_use():
    _, order, offsets = make_rows([5, 0, 27], True)
    index, dy = torch.randint(0, 7, (32, 5)), torch.randn(32, 5, 20)
    left = torch.randint(0, 2, (7, 20)).float() * 2 - 1
    got = kernel.launch(dy, index, order, offsets, left)
    torch.testing.assert_close(got, module.stats_reference(dy, index, order, offsets, 7, -1, left, None))
