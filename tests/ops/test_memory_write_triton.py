"""The Triton kernel of ``memory_write`` on CPU tensors: ``TRITON_INTERPRET=1 pytest
tests/ops/test_memory_write_triton.py``.

It proves indexing and masking, nothing about concurrency. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib
import math

import pytest

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401
from tests.ops import test_memory_write as on_cpu  # noqa: E402
from tests.utils.memories import memory_arguments, restrided, write_arguments  # noqa: E402

kernel = importlib.import_module("taskgrad.ops.triton.memory_write")

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
SHAPES = [(1, 1), (2, 31), (15, 32), (16, 33), (17, 130), (33, 65), (8, 129)]


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape, left_out):
    a = write_arguments(memory_arguments(*shape, uneven=left_out), left_out)
    # whoever reads beside the rows finds NaN
    given = {name: restrided(x, "rows") if getattr(x, "ndim", 0) == 2 else x for name, x in on_cpu.cloned(a).items()}
    on_cpu.check(kernel.launch, a, given)


def test_any_strides():
    a = write_arguments(memory_arguments(3, 140, uneven=True), left_out=True)
    for kind in ("columns", "transposed"):
        given = {name: restrided(x, kind) if hasattr(x, "ndim") else x for name, x in on_cpu.cloned(a).items()}
        on_cpu.check(kernel.launch, a, given)


def test_what_does_not_enter_may_be_nan():
    a = write_arguments(memory_arguments(4, 150), left_out=True)
    a["gradient"][1::2], a["to_mean"][1::2] = math.nan, math.nan
    a["gradient"][:, a["left_out"]] = math.inf
    on_cpu.check(kernel.launch, a)


def test_several_tiles_per_program(monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    on_cpu.check(kernel.launch, write_arguments(memory_arguments(9, 128 * 5 + 3)))
