"""The Triton kernel of ``sketch_params`` on CPU tensors: ``TRITON_INTERPRET=1 pytest
tests/ops/test_sketch_params_triton.py``.

It proves indexing and masking, nothing about concurrency, and knows no bfloat16. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401

kernel = importlib.import_module("taskgrad.ops.triton.sketch_params")

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def check(theta, r0, r1):
    left, right = (torch.randint(0, 2, (d, r)).float() * 2 - 1 for d, r in zip(theta.shape, (r0, r1), strict=True))
    got = kernel.launch(theta, left, right)
    want = left.double().mT @ theta.double() @ right.double()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (31, 33, 32, 31), (32, 64, 33, 1), (70, 45, 40, 17), (17, 130, 3, 65)], ids=str
)
def test_matches_fp64(dtype, shape):
    d0, d1, r0, r1 = shape
    check(torch.randn(d0, d1).to(dtype), r0, r1)
    check(torch.randn(d1, d0).to(dtype).mT, r0, r1)


def test_several_tiles_per_stripe(monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 4)
    check(torch.randn(65, 200), 5, 6)
