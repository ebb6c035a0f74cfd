"""The Triton kernel of ``ghost_gram`` on CPU tensors.

``TRITON_INTERPRET=1 pytest tests/ops/test_ghost_gram_triton.py``

It proves indexing and masking, nothing about concurrency, and knows no bfloat16. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401
from tests.utils import compile_cases, offline  # noqa: E402
from tests.utils.segments import COUNTS, LAYOUTS, make_problem, poison_memory  # noqa: E402

kernel = importlib.import_module("taskgrad.ops.triton.ghost_gram")
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the compiler")
# Triton 3.6 converts loop bounds in a way that NumPy deprecates (and refuses from 2.4 on)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def run(problem, programs=2):
    tile = kernel.Tile(16, 32, 2, 1)
    gram = kernel.launch(problem.dy, problem.x, problem.offsets, tile, programs, tf32=False)
    problem.check_gram(gram, 1e-6, by_rows=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [c for c in COUNTS if sum(c)], ids=str)
def test_interpreted_kernel_matches_fp64(counts, dtype, monkeypatch):
    problem = make_problem(counts, 19, 37, dtype)
    poison_memory(monkeypatch)
    run(problem)


@interpreted
@pytest.mark.parametrize("programs", [1, 2, 5, 100])
@pytest.mark.parametrize("blocks", range(1, 7))
def test_interpreted_kernel_covers_the_triangle_once(blocks, programs):
    run(make_problem([16 * blocks - 3 - blocks, 0, blocks], 3, 4), programs)
    run(make_problem([1, 16 * blocks - 1], 3, 4), programs)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_interpreted_kernel_takes_any_strides_and_offsets(layout):
    problem = make_problem([3, 0, 24], 17, 33, layout=layout)
    run(replace(problem, offsets=problem.offsets.int()))


@interpreted
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (17, 1)], ids=str)
def test_interpreted_kernel_takes_single_columns(size):
    run(make_problem([3, 4], *size))
    run(make_problem([1], *size))


@interpreted
def test_interpreted_kernel_takes_many_segments(monkeypatch):
    monkeypatch.setattr(kernel, "COLUMNS", 8)
    run(make_problem([1, 0, 2] * 12, 3, 4))


@interpreted
def test_interpreted_kernel_keeps_nan_in_its_segment():
    problem = make_problem([3, 0, 20, 2], 5, 6)
    problem.x[4, 2] = float("nan")
    gram = kernel.launch(problem.dy, problem.x, problem.offsets, kernel.Tile(16, 32, 2, 1), 2, tf32=False)
    assert gram[2, [0, 2, 3]].isnan().all() and gram[[0, 1, 3]][:, [0, 1, 3]].isfinite().all()


@compiled
def test_compiles_when_every_size_is_one():
    """Triton compiles arguments that are 1 into the kernel."""
    case = compile_cases.ghost_gram()[0]
    ones = dict.fromkeys(("N", "S", "d_out", "d_in", "dy_stride", "x_stride"), 1)
    types = {name: kind for name, kind in case.types.items() if name not in ones}
    case = replace(case, types=types, constants={**case.constants, **ones, "S_PAD": 1, "COLUMNS": 1}, aligned=())
    offline.check(replace(case, wgmma=False), 90, offline.compile_case(case, 90))
