"""The Triton kernel of ``sum_gram`` without a GPU.

``TRITON_INTERPRET=1 pytest tests/ops/test_sum_gram_triton.py`` runs the kernel on CPU tensors. It proves indexing and
masking, nothing about concurrency, and knows no bfloat16. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401

kernel = importlib.import_module("taskgrad.ops.triton.sum_gram")
module = sys.modules["taskgrad.ops.sum_gram"]

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
# Triton 3.6 converts loop bounds in a way that NumPy deprecates (and refuses from 2.4 on)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

SHAPES = [(1, 1), (2, 127), (3, 128), (7, 129), (16, 300), (17, 130), (64, 257)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernel_matches_fp64(dtype, shape):
    block = torch.randn(shape).to(dtype)
    total, gram = kernel.launch(block)
    exact = block.double()
    norms = exact.norm(dim=1)
    assert ((gram - exact @ exact.mT).abs() <= 1e-6 * norms[:, None] * norms[None, :]).all()
    assert torch.equal(gram, gram.mT)
    assert total.dtype == dtype
    torch.testing.assert_close(total, module.reference(block)[0])


@interpreted
def test_interpreted_kernel_takes_several_tiles_per_program():
    columns = 256 * kernel.tile_config(torch.float32, 64)[0] + 5  # at 64 rows there are at most 256 programs
    block = torch.randn(64, columns)
    total, gram = kernel.launch(block)
    torch.testing.assert_close(gram, block.double() @ block.double().mT, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(total, module.reference(block)[0])


@interpreted
@pytest.mark.parametrize(
    "block",
    [
        torch.randn(200, 5).mT,
        torch.randn(5, 400)[:, ::2],
        torch.randn(10, 200)[::2],
        torch.randn(5, 400)[:, 7:207],
    ],
    ids=["transposed", "every second column", "every second row", "slice"],
)
def test_interpreted_kernel_takes_any_strides(block):
    total, gram = kernel.launch(block)
    torch.testing.assert_close(gram, block.double() @ block.double().mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total, module.reference(block)[0])
