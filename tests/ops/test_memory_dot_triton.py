"""The Triton kernel of ``memory_dot`` on CPU tensors: ``TRITON_INTERPRET=1 pytest
tests/ops/test_memory_dot_triton.py``.

It proves indexing and masking, nothing about concurrency. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401

kernel = importlib.import_module("taskgrad.ops.triton.memory_dot")

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 63), (16, 17, 64), (17, 16, 65), (33, 70, 130), (3, 40, 200)], ids=str
)
def test_matches_fp64(shape):
    T, S, K = shape
    memory, stats = torch.full((T, K + 300), torch.nan)[:, :K], torch.full((2 * S, K + 300), torch.nan)[::2, :K]
    memory.normal_(), stats.normal_()  # whoever reads beside them finds NaN
    dots = kernel.launch(memory, stats)
    a, b = memory.double(), stats.double()
    assert dots.shape == (T, S) and dots.dtype == torch.float64
    assert ((dots - a @ b.mT).abs() <= 1e-6 * a.norm(dim=1)[:, None] * b.norm(dim=1)[None, :]).all()


def test_any_strides():
    memory, stats = torch.randn(70, 3).mT, torch.randn(4, 140)[:, ::2]
    torch.testing.assert_close(kernel.launch(memory, stats), memory.double() @ stats.double().mT, rtol=1e-5, atol=1e-5)


def test_several_tiles_per_program():
    memory, stats = torch.randn(100, 32 * 150 + 5), torch.randn(101, 32 * 150 + 5)  # 103 programs at most
    want = memory.double() @ stats.double().mT
    torch.testing.assert_close(kernel.launch(memory, stats), want, rtol=1e-6, atol=1e-3)
