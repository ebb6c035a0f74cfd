from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.capture.sketch import sketch_map
from taskgrad.statistics.cosine import cosine_error

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


@pytest.mark.parametrize("shape", [(48, 80), (600,), (4, 400)], ids=str)
@pytest.mark.parametrize("rank", [1, 40])
def test_cosine_error_matches_the_spread_over_maps(shape: tuple[int, ...], rank: int) -> None:
    """Low rank is where a two-sided sketch is worst; the reported error must not be smaller than the real one."""
    torch.manual_seed(1)
    if len(shape) == 2:
        x, y = torch.randn(2, shape[0], rank, dtype=torch.float64) @ torch.randn(2, rank, shape[1], dtype=torch.float64)
    else:
        x, y = torch.randn(2, *shape, dtype=torch.float64)
    pair = torch.stack([x, y + 0.3 * x])
    cosines, errors = [], []
    for seed in range(200):
        sketch = sketch_map(shape, 100, seed, "w")
        block = sketch(pair)
        gram = block @ block.T
        cosines.append(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
        errors.append(cosine_error(block, gram, [sketch])[0, 1])
    spread = torch.stack(cosines).std()
    reported = torch.stack(errors).square().mean().sqrt()
    assert 0.6 * spread < reported < 2.5 * spread


def test_error_is_zero_without_sketching() -> None:
    block = torch.randn(3, 12, dtype=torch.float64)
    error = cosine_error(block, block @ block.T, [sketch_map((3, 4), None, 0, "w")])
    assert error.abs().max() == 0


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
