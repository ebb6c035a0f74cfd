"""The Triton kernel of ``wgrad_gram`` without a GPU.

``TRITON_INTERPRET=1 pytest tests/ops/test_wgrad_gram_triton.py`` runs it on CPU tensors. That proves indexing and
masking, nothing about concurrency, and knows no bfloat16. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401
from tests.utils import compile_cases, offline  # noqa: E402
from tests.utils.segments import COUNTS, LAYOUTS, make_problem, poison_memory  # noqa: E402

kernel = importlib.import_module("taskgrad.ops.triton.wgrad_gram")
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the compiler")
# Triton 3.6 converts loop bounds in a way that NumPy deprecates (and refuses from 2.4 on)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

SMALL = kernel.Tile(16, 32, 16, 2, 1, 64)  # 4 steps of the Gram


def run(problem, *, tile=SMALL, programs=2):
    dw = problem.dy.new_empty(problem.parts.shape[1:])
    scratch = problem.dy.dtype  # the interpreter knows no bfloat16
    gram = kernel.launch(
        problem.dy,
        problem.x,
        problem.offsets,
        dw,
        tile,
        programs,
        tf32=False,
        scratch_dtype=scratch,
    )
    problem.check_sum(dw)
    problem.check_gram(gram, 1e-5 if scratch == torch.float32 else 2**-9)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_interpreted_kernel_matches_fp64(counts, dtype, monkeypatch):
    problem = make_problem(counts, 19, 37, dtype)
    poison_memory(monkeypatch)
    run(problem)


@interpreted
@pytest.mark.parametrize("programs", [1, 2, 7, 50])
def test_interpreted_kernel_takes_several_tiles_per_program(programs, monkeypatch):
    problem = make_problem([9, 0, 18], 16 * (kernel.GROUP + 2) - 3, 65)  # two groups of tiles, the second one lower
    poison_memory(monkeypatch)
    run(problem, programs=programs)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_interpreted_kernel_takes_any_strides(layout):
    run(make_problem([3, 0, 4], 17, 33, layout=layout))


@interpreted
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (17, 1)], ids=str)
def test_interpreted_kernel_takes_single_columns(size):
    run(make_problem([3, 4], *size))
    run(make_problem([1], *size))


@interpreted
def test_interpreted_kernel_takes_three_blocks_of_segments(monkeypatch):
    problem = make_problem([1, 2, 0, 1, 3] * 7, 9, 40)
    poison_memory(monkeypatch)
    run(problem)


@compiled
def test_compiles_when_every_size_is_one():
    """Triton compiles arguments that are 1 into the kernel."""
    case = compile_cases.wgrad_gram()[0]
    ones = dict.fromkeys(("S", "d_out", "d_in", "dy_stride", "x_stride", "dw_stride"), 1)
    types = {name: kind for name, kind in case.types.items() if name not in ones}
    case = replace(case, types=types, constants={**case.constants, **ones}, aligned=())
    offline.check(replace(case, wgmma=False), 90, offline.compile_case(case, 90))


@compiled
@pytest.mark.parametrize("case", [] if triton.knobs.runtime.interpret else compile_cases.wgrad_gram(), ids=str)
def test_a_barrier_stands_between_scratch_stores_and_loads(case):
    """Threads read what others of their block wrote: bar.sync orders it, and loads must not take the .nc path."""
    ptx = offline.compile_case(case, case.archs[-1]).ptx
    kinds = re.findall(r"(st\.global|ld\.global|bar\.sync)", ptx)
    assert "ld.global.nc" not in ptx
    # dW is stored, then the barrier, then the first loads of scratch: nothing is moved across
    last_tile_store = max(i for i in range(len(kinds)) if kinds[i] == "st.global" and "ld.global" in kinds[i:])
    after = kinds[last_tile_store:]
    assert after.index("bar.sync") < after.index("ld.global")
