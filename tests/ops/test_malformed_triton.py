"""Malformed ``order`` and ``offsets`` in the Triton kernels: nothing is read outside of the operands, nothing runs for
ever. ``TRITON_INTERPRET=1 pytest tests/ops/test_malformed_triton.py``

What lies around the operands is NaN, so a result without NaN read none of it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
from taskgrad.ops.triton import (  # noqa: E402
    embedding_stats,
    ghost_gram,
    segment_sum,
    wgrad_gram,
    wgrad_sketch,
)

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

E, M = 6, 2
OFFSETS = [[0, 2, 4], [0, 2, 4, 9], [0, 2**40, 6], [-(2**40), 3, 6], [0, 5, 2, 6], [3, 4, 6], [0, 0, 2**62], [7, 7, 7]]
ORDERS = [None, [0, 1, 2, 3, 4, 6], [-1, 0, 1, 2, 3, 4], [2**40, 0, 0, -(2**62), 5, 5]]


def surrounded(*shape: int) -> Tensor:
    """Random numbers between NaN."""
    room = torch.full((shape[0] + 40, *shape[1:]), float("nan"))
    room[20 : 20 + shape[0]] = torch.randn(shape)
    return room[20 : 20 + shape[0]]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_entries(offsets, order):
    offsets, order = torch.tensor(offsets), None if order is None else torch.tensor(order)
    dy, x, rstd = surrounded(E, M, 5), surrounded(E, M, 5), surrounded(E, M)
    parts = segment_sum.launch_norm(dy, x, None, rstd, order, offsets)
    sketch = wgrad_sketch.launch(dy.flatten(0, 1), x.flatten(0, 1), M, order, offsets, 4, 9)
    index = torch.randint(0, 3, (E, M))
    of_tokens = embedding_stats.launch(dy, index, order, offsets, surrounded(3, 2))
    assert not sketch.isnan().any()  # partial sums of segments that overlap may be left unwritten: those of the others
    assert all(out.shape[0] == len(offsets) - 1 for out in (*parts, of_tokens))


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_rows(offsets):
    offsets, dy, x = torch.tensor(offsets), surrounded(E, 5), surrounded(E, 4)
    dw = torch.empty(5, 4)
    tile = wgrad_gram.Tile(16, 32, 16, 2, 1, 64)
    gram = wgrad_gram.launch(dy, x, offsets, dw, tile, 2, tf32=False, scratch_dtype=torch.float32)
    assert not dw.isnan().any() and not gram.isnan().any()
    assert not ghost_gram.launch(dy, x, offsets, ghost_gram.Tile(16, 32, 2, 1), 2, tf32=False).isnan().any()
