"""``wgrad_stats`` and the cost model that chooses its way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taskgrad.ops import cost_model, wgrad_stats
from taskgrad.ops.wgrad_stats import gram_strategy
from tests.utils.called import Called

STRATEGIES = (None, "fused", "ghost", "materialise")


def _case(dtype: torch.dtype, *, sketched: bool, ordered: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(9, 4, 12, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(9, 4, 7, generator=generator, dtype=torch.float64).to(dtype)
    segment = torch.tensor([2, 0, 3, 0, 2, 2, 0, 3, 3])  # nobody is in segment 1
    order = torch.argsort(segment, stable=True)
    if not ordered:
        segment, order = segment[order], None
    offsets = torch.tensor([0, 3, 3, 6, 9])
    left = torch.randint(0, 2, (12, 3), generator=generator).mul(2).sub(1).float() if sketched else None
    right = torch.randint(0, 2, (7, 2), generator=generator).mul(2).sub(1).float() if sketched else None
    return dy, x, segment, order, offsets, left, right  # type: ignore[return-value]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ordered", [False, True], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("sketched", [False, True], ids=["whole", "sketched"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_a_product_per_segment(dtype: torch.dtype, sketched: bool, ordered: bool, strategy: str | None) -> None:
    dy, x, segment, order, offsets, left, right = _case(dtype, sketched=sketched, ordered=ordered)
    dw, stats, gram = wgrad_stats(dy, x, order, offsets, left, right, strategy)
    parts = torch.stack(
        [torch.einsum("emo,emi->oi", dy[segment == s].double(), x[segment == s].double()) for s in range(4)]
    )
    flat = parts.flatten(1)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert (dw.double() - parts.sum(0)).norm() <= tolerance * parts.norm()
    want = parts if left is None or right is None else left.double().mT @ parts @ right.double()
    assert (stats.double() - want).norm() <= tolerance * want.norm()
    assert (gram - flat @ flat.mT).norm() <= tolerance * (flat @ flat.mT).norm()
    assert dw.dtype == dtype and gram.dtype == torch.float64


@pytest.mark.parametrize("sketched", [False, True], ids=["whole", "sketched"])
def test_opcheck(sketched: bool) -> None:
    dy, x, _, order, offsets, left, right = _case(torch.float32, sketched=sketched, ordered=True)
    torch.library.opcheck(torch.ops.taskgrad.wgrad_stats.default, (dy, x, order, offsets, left, right))


def test_an_unknown_strategy_is_refused() -> None:
    dy, x, _, order, offsets, left, right = _case(torch.float32, sketched=True, ordered=True)
    with pytest.raises(ValueError, match=r"strategy must be .* got 'fastest'"):
        wgrad_stats(dy, x, order, offsets, left, right, "fastest")


def _costs(rows: int, d: int, segments: int) -> tuple[float, dict[cost_model.Strategy, cost_model.Cost]]:
    return cost_model.costs(rows, d, d, segments, torch.float32, torch.device("cpu"))


def test_cost_follows_the_arithmetic() -> None:
    dense, found = _costs(4096, 1024, 9)
    threads = torch.get_num_threads()
    assert dense == pytest.approx(2 * 4096 * 1024**2 / (cost_model.RATES["cpu"].single * threads))
    assert found["ghost"].seconds == pytest.approx(dense * (1 + 2 * 4096 / 1024))  # N / d of the dense product, in fp64
    assert all(cost.seconds >= dense for cost in found.values())


def test_short_batches_take_products_of_rows_and_long_ones_the_fused_product() -> None:
    assert cost_model.cheapest(_costs(64, 4096, 9)[1]) == "ghost"
    assert cost_model.cheapest(_costs(8192, 4096, 9)[1]) == "fused"


def test_of_equals_the_smaller_is_taken() -> None:
    found = {
        "fused": cost_model.Cost("fused", 1.0, 10),
        "ghost": cost_model.Cost("ghost", 1.0, 5),
    }
    assert cost_model.cheapest(found) == "ghost"


@pytest.mark.parametrize(
    ("rows", "runs", "does_not"), [(4, "ghost_gram", "wgrad_gram"), (600, "wgrad_gram", "ghost_gram")]
)
def test_the_cost_model_decides_what_runs(rows: int, runs: str, does_not: str) -> None:
    dy, x = torch.randn(2, rows // 2, 128), torch.randn(2, rows // 2, 128)
    offsets, left, right = torch.tensor([0, 1, 2]), torch.ones(128, 2), torch.ones(128, 2)
    with Called() as called:
        wgrad_stats(dy, x, None, offsets, left, right)
    assert runs in called.ops and does_not not in called.ops
    assert f"{gram_strategy(dy, x, offsets, left, right)}" == {"ghost_gram": "ghost", "wgrad_gram": "fused"}[runs]
