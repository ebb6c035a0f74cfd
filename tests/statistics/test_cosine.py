"""The standard error of sketched cosines, against their spread over maps."""

from __future__ import annotations

import pytest
import torch

from taskgrad.capture.sketch import sketch_map
from taskgrad.statistics.cosine import cosine_error


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
