"""What a tap holds comes out as it was put in, wherever its columns lie."""

from __future__ import annotations

import pytest
import torch

from taskgrad.capture.sketch import sketch_map
from taskgrad.capture.tap import TapLayout, tap_dtype, tap_grad, tap_grad_of


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 2)])
@pytest.mark.parametrize("budget", [None, 4])
def test_what_is_put_into_a_tap_is_read_off_it(gram: bool, shape: tuple[int, ...], budget: int | None) -> None:
    tasks, param = 3, torch.randn(shape)
    sketch = sketch_map(shape, budget, 0, "p")
    layout = TapLayout(tasks, sketch.dim, gram)
    tap = layout.leaf(tap_dtype(param), param.device)
    values = torch.randn(tasks + 1, *shape)
    stats = tap_grad_of(values, gram, sketch.left, sketch.right)
    assert stats.shape == tap.shape
    assert torch.equal(layout.sketches(stats), sketch(values))
    if gram:
        flat = values.flatten(1)
        torch.testing.assert_close(layout.gram_of(stats), flat @ flat.mT)
        assert layout.uses(stats) == 1
        assert layout.uses(stats + stats) == 2, "uses are counted as gradients are added up"


def test_without_a_gram_the_sketches_are_all_there_is() -> None:
    sketches = torch.randn(4, 7)
    assert tap_grad(sketches, None) is sketches


def test_the_dtype_that_statistics_are_added_up_in() -> None:
    found = {dtype: tap_dtype(torch.zeros(1, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    assert found == {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
