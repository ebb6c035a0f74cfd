"""The Triton kernel of ``memory_read`` on CPU tensors: ``TRITON_INTERPRET=1 pytest
tests/ops/test_memory_read_triton.py``.

It proves indexing and masking, nothing about concurrency. ``test_resources.py`` compiles it.
"""

from __future__ import annotations

import importlib

import pytest

triton = pytest.importorskip("triton")
import taskgrad.ops  # noqa: E402, F401
from tests.ops import test_memory_read as on_cpu  # noqa: E402
from tests.utils.memories import memory_arguments, restrided  # noqa: E402

kernel = importlib.import_module("taskgrad.ops.triton.memory_read")

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
SHAPES = [(1, 1), (2, 31), (15, 32), (16, 33), (17, 130), (33, 65), (8, 129)]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape, uneven):
    a = memory_arguments(*shape, uneven=uneven)
    # whoever reads beside the rows finds NaN
    on_cpu.check(kernel.launch(**{name: restrided(x, "rows") for name, x in a.items()}), a)


def test_any_strides():
    a = memory_arguments(3, 70, uneven=True)
    for kind in ("columns", "transposed"):
        on_cpu.check(kernel.launch(**{name: restrided(x, kind) for name, x in a.items()}), a)


def test_several_tiles_per_program(monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 4)
    monkeypatch.setattr(kernel, "ADDED", (2, 16))
    a = memory_arguments(5, 32 * 9 + 5)
    on_cpu.check(kernel.launch(**a), a)
