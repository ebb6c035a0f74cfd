"""The Triton kernel of ``wgrad_sketch`` on CPU tensors:
``TRITON_INTERPRET=1 pytest tests/ops/test_wgrad_sketch_triton.py``.

It proves indexing and masking, nothing about concurrency, and knows no bfloat16. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401
from tests.utils import compile_cases, offline  # noqa: E402
from tests.utils.rows import COUNTS, make_rows  # noqa: E402
from tests.utils.segments import poison_memory  # noqa: E402

kernel = importlib.import_module("taskgrad.ops.triton.wgrad_sketch")
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the compiler")
# Triton 3.6 converts loop bounds in a way that NumPy deprecates (and refuses from 2.4 on)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many tiles, steps and splits for few rows."""
    monkeypatch.setattr(kernel, "tile_config", lambda dtype, r0, r1, major: kernel.Tile(16, 16, 16, 1, 1))
    monkeypatch.setattr(kernel, "SPLIT_ROWS", 20)


def run(u, v, order, offsets, processors):
    ordered = (u, v) if order is None else (u[order], v[order])
    want = [
        torch.einsum("nmi,nmj->ij", *(t[start:end].double() for t in ordered))
        for start, end in pairwise(offsets.tolist())
    ]
    got = kernel.launch(u.flatten(0, 1), v.flatten(0, 1), u.shape[1], order, offsets, processors, 9)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-5, atol=1e-4)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("counts", [*COUNTS, [3, 0, 0, 30, 1, 0, 7, 0], [1]], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 17, 5)], ids=str)
def test_interpreted_kernel_matches_fp64(size, counts, shuffled, dtype, monkeypatch):
    task, order, offsets = make_rows(counts, shuffled)
    u, v = (torch.randn(len(task), size[0], r).to(dtype) for r in size[1:])
    poison_memory(monkeypatch)
    run(u, v, order, offsets, 2)


@interpreted
@pytest.mark.parametrize("processors", [1, 3, 40])
def test_interpreted_kernel_splits_segments(processors):
    _, order, offsets = make_rows([90, 0, 1, 29], True)
    run(torch.randn(120, 2, 5), torch.randn(120, 2, 20), order, offsets.int(), processors)


@interpreted
def test_interpreted_kernel_takes_one_identity_side_in_half_precision():
    _, order, offsets = make_rows([5, 7], True)
    run(torch.randn(12, 2, 5), torch.randn(12, 2, 20).half(), order, offsets, 2)


@interpreted
def test_interpreted_kernel_takes_columns_that_are_not_adjacent():
    run(torch.randn(8, 1, 24)[:, :, ::2], torch.randn(8, 1, 30)[:, :, 3:20], None, torch.tensor([0, 3, 8]), 2)


@interpreted
def test_interpreted_kernel_keeps_nan_in_its_segment():
    u = torch.randn(20, 5)
    u[3, 2] = float("nan")
    out = kernel.launch(u, torch.randn(20, 4), 1, None, torch.tensor([0, 5, 20]), 2, 9)
    assert out[0, 2].isnan().all() and out[1].isfinite().all() and out[0, 3].isfinite().all()


@compiled
def test_compiles_when_every_size_is_one():
    """Triton compiles arguments that are 1 into the kernel."""
    case = next(case for case in compile_cases.wgrad_sketch() if case.constants["ORDERED"])
    ones = dict.fromkeys(("M", "r0", "r1", "u_stride", "v_stride"), 1)
    types = {name: kind for name, kind in case.types.items() if name not in ones}
    case = replace(case, types=types, constants={**case.constants, **ones}, aligned=())
    offline.check(replace(case, wgmma=False), 90, offline.compile_case(case, 90))
