"""The Triton kernels of ``segment_sum`` on CPU tensors: ``TRITON_INTERPRET=1 pytest
tests/ops/test_segment_sum_triton.py``.

It proves indexing and masking, nothing about concurrency, and knows no bfloat16. ``test_resources.py`` compiles them.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401
from tests.utils.rows import COUNTS, make_rows  # noqa: E402

kernel = importlib.import_module("taskgrad.ops.triton.segment_sum")
module = sys.modules["taskgrad.ops.segment_sum"]

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    # Triton 3.6 converts loop bounds in a way that NumPy deprecates (and refuses from 2.4 on)
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def many_programs(monkeypatch):
    """Few rows for each program, so that segments cross programs and programs cross segments."""
    monkeypatch.setattr(kernel, "tile_config", lambda d, norm: (4, min(16, triton.next_power_of_2(d))))


def check(got, dy, x, mean, rstd, order, offsets):
    want = module.norm_reference(*(None if t is None else t.double() for t in (dy, x, mean, rstd)), order, offsets)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("counts", [*COUNTS, [3, 0, 0, 30, 1, 0, 7, 0], [8, 8, 8]], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 17)], ids=str)
def test_matches_fp64(dtype, shuffled, counts, size):
    task, order, offsets = make_rows(counts, shuffled)
    dy, x = (torch.randn(len(task), *size).to(dtype) for _ in range(2))
    mean, rstd = torch.randn(len(task), size[0]), torch.rand(len(task), size[0]) + 0.5
    check(kernel.launch_norm(dy, x, mean, rstd, order, offsets), dy, x, mean, rstd, order, offsets)
    torch.testing.assert_close(
        kernel.launch(dy, order, offsets), module.reference(dy, order, offsets), rtol=1e-5, atol=1e-4
    )


def test_rms_norm_with_any_strides_and_int32_offsets():
    _, order, offsets = make_rows([5, 0, 7], True)
    dy, x = torch.randn(9, 3, 12).permute(2, 1, 0), torch.randn(12, 6, 9)[:, ::2]
    rstd = torch.rand(3, 12).mT
    offsets = offsets.int()
    check(kernel.launch_norm(dy, x, None, rstd, order, offsets), dy, x, None, rstd, order, offsets)


def test_nan_stays_in_its_segment():
    task, order, offsets = make_rows([5, 1, 7], True)
    values = torch.randn(13, 1, 3)
    values[task == 1] = float("nan")
    out = kernel.launch(values, order, offsets)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_tile_configs_in_use(monkeypatch):
    monkeypatch.undo()
    for d in (1, 40, 200):
        _, order, offsets = make_rows([5, 0, 7], True)
        values = torch.randn(12, 1, d)
        torch.testing.assert_close(kernel.launch(values, order, offsets), module.reference(values, order, offsets))
