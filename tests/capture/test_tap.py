"""What a tap holds comes out as it was put in, wherever its columns lie."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from taskgrad.capture.sketch import sketch_map
from taskgrad.capture.tap import Keeps, TapLayout, tap_dtype, tap_grad, tap_grad_of


@pytest.mark.parametrize("keeps", get_args(Keeps))
@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 2)])
@pytest.mark.parametrize("budget", [None, 4])
def test_what_is_put_into_a_tap_is_read_off_it(keeps: Keeps, shape: tuple[int, ...], budget: int | None) -> None:
    tasks, param = 3, torch.randn(shape, dtype=torch.float64)
    sketch = sketch_map(shape, budget, 0, "p")
    layout = TapLayout(tasks, sketch, keeps)
    tap = layout.leaf(tap_dtype(param), param.device)
    values = torch.randn(tasks + 1, *shape, dtype=torch.float64)
    stats = tap_grad_of(values, keeps, *layout.maps)
    assert stats.shape == tap.shape
    torch.testing.assert_close(layout.sketches(stats), sketch(values))
    if keeps != "sketch" or sketch.exact:
        flat = values.flatten(1)
        torch.testing.assert_close(layout.gram(stats), flat @ flat.mT)
        if keeps != "gram":
            torch.testing.assert_close(layout.gram(stats + stats), 4 * flat @ flat.mT)
    if layout.counts_uses:
        assert layout.uses(stats) == 1
        assert layout.uses(stats + stats) == 2, "uses are counted as gradients are added up"


@pytest.mark.parametrize("keeps", ["sketch", "parts"])
def test_without_a_gram_and_uses_nothing_is_copied(keeps: Keeps) -> None:
    values = torch.randn(4, 7)
    assert tap_grad(values, keeps) is values


def test_a_leaf_takes_no_memory() -> None:
    leaf = TapLayout(8, sketch_map((3000, 1000), None, 0, "p"), "parts").leaf(torch.float32, torch.device("cpu"))
    assert leaf.shape == (9, 3_000_000) and leaf.untyped_storage().nbytes() == 4
    leaf.sum().backward()
    assert leaf.grad is not None and leaf.grad.is_contiguous()


def test_the_dtype_that_statistics_are_added_up_in() -> None:
    found = {dtype: tap_dtype(torch.zeros(1, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    assert found == {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
