"""Maps of sketches: unbiased, linear, the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.capture.sketch import sketch_map

SHAPES = [(40, 30), (3, 700), (700, 3), (1, 900), (900, 1), (2000,), (7, 5, 3, 3), (64, 64), (33, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inner_products_are_unbiased(shape: tuple[int, ...]) -> None:
    """Over 400 maps the mean of ⟨S(x), S(y)⟩ is ⟨x, y⟩ within its standard error."""
    torch.manual_seed(0)
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    y = y + 0.5 * x
    pair = torch.stack([x, y])
    products = []
    for seed in range(400):
        sketch = sketch_map(shape, 64, seed, "w")
        assert sketch.dim <= 64
        products.append((sketch(pair)[0] * sketch(pair)[1]).sum())
    values = torch.stack(products)
    assert abs(values.mean() - (x * y).sum()) < 4 * values.std() / 20


@given(st.integers(1, 70), st.integers(1, 70), st.integers(16, 600))
@settings(max_examples=60, deadline=None)
def test_map_is_linear_and_exact_where_it_fits(d0: int, d1: int, dim: int) -> None:
    sketch = sketch_map((d0, d1), dim, 0, "w")
    assert sketch.dim <= dim
    assert sketch.exact == (d0 * d1 <= dim)
    x, y = torch.randn(2, 1, d0, d1, dtype=torch.float64)
    torch.testing.assert_close(sketch(x + 3 * y), sketch(x) + 3 * sketch(y))
    if sketch.exact:
        torch.testing.assert_close(sketch(x)[0], x.flatten())


def test_same_seed_same_map_and_other_names_other_maps() -> None:
    x = torch.randn(1, 50, 50)
    torch.testing.assert_close(sketch_map((50, 50), 64, 1, "a")(x), sketch_map((50, 50), 64, 1, "a")(x))
    assert not torch.equal(sketch_map((50, 50), 64, 1, "a")(x), sketch_map((50, 50), 64, 1, "b")(x))


def test_rank_decides_the_error_of_a_two_sided_sketch() -> None:
    """‖G‖² from 32 × 32 numbers of a 512 × 512 matrix: about .34 for rank 1, .05 for full rank."""
    torch.manual_seed(2)
    found = {}
    for rank in (1, 512):
        g = torch.randn(1, 512, rank, dtype=torch.float64) @ torch.randn(1, rank, 512, dtype=torch.float64)
        norms = [sketch_map((512, 512), 1024, seed, "w")(g).square().sum() / g.square().sum() for seed in range(150)]
        found[rank] = float(torch.stack(norms).std())
    assert math.isclose(found[1], 0.34, abs_tol=0.08)
    assert math.isclose(found[512], 0.05, abs_tol=0.02)
