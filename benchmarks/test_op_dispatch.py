"""What calling an op costs besides its arithmetic: tiny tensors, against the plain torch expression.

pytest benchmarks/test_op_dispatch.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import taskgrad.ops

BLOCK = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

SUM_GRAM: dict[str, Callable[[], object]] = {
    "torch expression": lambda: (BLOCK.sum(0), BLOCK @ BLOCK.mT),
    "taskgrad.ops.sum_gram": lambda: taskgrad.ops.sum_gram(BLOCK),
    "torch.ops.taskgrad.sum_gram": lambda: torch.ops.taskgrad.sum_gram(BLOCK),
}


@pytest.mark.benchmark(group="sum_gram of a 2 x 8 block")
@pytest.mark.parametrize("how", list(SUM_GRAM))
def test_sum_gram(benchmark: Any, how: str) -> None:
    benchmark(SUM_GRAM[how])
