from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.guards import Guards, fit

NATURAL = np.array([0.9, 0.06, 0.04])


def guards(natural: np.ndarray = NATURAL, **options: Any) -> Guards:
    count = len(natural)
    return Guards(
        natural=natural,
        budget=options.get("budget"),
        min_weight=np.broadcast_to(options.get("min_weight", 0.0), (count,)).astype(float),
        max_weight=np.broadcast_to(options.get("max_weight", 1.0), (count,)).astype(float),
        max_change=options.get("max_change"),
        pinned=np.array(options.get("pinned", [False] * count)),
    )


def apply(shares: list[float], previous: Any = None, **options: Any) -> tuple[list[float], tuple[str, ...]]:
    weights, bound = guards(**options).apply(np.array(shares), None if previous is None else np.array(previous))
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    return weights.tolist(), bound


def test_without_guards_the_policy_decides() -> None:
    assert apply([0.2, 0.3, 0.5]) == (pytest.approx([0.2, 0.3, 0.5]), ())


def test_what_the_policy_leaves_goes_to_the_natural_mix() -> None:
    assert apply([0, 0.5, 0])[0] == pytest.approx([0.45, 0.53, 0.02])
    assert apply([0, 0, 0])[0] == pytest.approx(NATURAL)
    assert apply([0, 0, 0], budget=0.3)[0] == pytest.approx(NATURAL)


def test_budget_mixes_and_says_when_it_held_the_policy_back() -> None:
    assert apply([0, 0.5, 0.5], budget=0.2) == (pytest.approx([0.72, 0.148, 0.132]), ("budget",))
    assert apply([0, 0.5, 0], budget=0.2)[0] == pytest.approx([0.81, 0.154, 0.036])
    assert apply(NATURAL.tolist(), budget=0.2) == (pytest.approx(NATURAL), ())


def test_pinned_tasks_keep_their_share_or_lose_in_proportion_to_a_budget() -> None:
    pinned = [False, True, False]
    assert apply([0.2, 0.5, 0.3], pinned=pinned) == (pytest.approx([0.94 * 0.4, 0.06, 0.94 * 0.6]), ("pinned",))
    weights, bound = apply([0, 0.5, 0.5], pinned=pinned, budget=0.2)
    assert weights == pytest.approx([0.72, 0.048, 0.232]) and bound == ("pinned", "budget")
    assert apply([0, 1, 0], pinned=pinned, budget=0.2)[0] == pytest.approx(NATURAL)
    assert apply([0, 1, 0], pinned=pinned)[0] == pytest.approx(NATURAL)
    assert apply([0, 0, 0.5], pinned=pinned)[0] == pytest.approx([0.45, 0.06, 0.47 + 0.02])


def test_max_change_limits_the_factor_and_lets_tasks_return_to_natural() -> None:
    weights, bound = apply([0.1, 0.1, 0.8], [0.5, 0.25, 0.25], max_change=1.5)
    assert bound == ("max_change",)
    assert np.all(np.array(weights) / [0.5, 0.25, 0.25] <= 1.5 + 1e-12)
    assert np.all(np.array(weights) / [0.5, 0.25, 0.25] >= 1 / 1.5 - 1e-12)
    assert weights[2] == pytest.approx(0.375)
    assert apply(NATURAL.tolist(), [1.0, 0.0, 0.0], max_change=1.2)[0] == pytest.approx(NATURAL)
    assert apply([0, 1, 0], None, max_change=1.2)[0] == [0, 1, 0]


def test_floor_is_stronger_than_budget_and_max_change() -> None:
    weights, bound = apply([0, 0, 1], [0.9, 0.06, 0.04], budget=0.25, max_change=1.1, min_weight=[0, 0.3, 0])
    assert weights[1] == pytest.approx(0.3)
    assert set(bound) == {"budget", "max_change", "min_weight"}


def test_budget_is_stronger_than_max_change() -> None:
    previous = [0.1, 0.1, 0.8]  # from before the budget, say
    weights, bound = apply([0, 0, 1], previous, budget=0.1, max_change=1.1)
    assert 0.5 * np.abs(np.array(weights) - NATURAL).sum() <= 0.1 + 1e-9
    assert "budget" in bound and "max_change" in bound


def test_ceiling_with_floor() -> None:
    weights, bound = apply([0, 0, 1], min_weight=0.1, max_weight=[1, 1, 0.5])
    assert weights[2] == pytest.approx(0.5) and min(weights) >= 0.1 - 1e-12
    assert bound == ("min_weight", "max_weight")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_chain_always_gives_a_distribution_within_its_strongest_guards(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    unit = st.floats(0, 1)

    def distribution() -> np.ndarray:
        values = np.array(data.draw(st.lists(unit, min_size=count, max_size=count))) + 1e-6
        return np.asarray(values / values.sum())

    low = data.draw(unit) * distribution()
    high = np.maximum(low, data.draw(st.floats(1, 3)) * distribution()).clip(max=1)
    if high.sum() < 1:
        high = np.ones(count)
    pinned = [data.draw(st.booleans()) for _ in range(count - 1)] + [False]
    natural = distribution()
    needed = max(np.maximum(low - natural, 0).sum(), np.maximum(natural - high, 0).sum(), 0.01)
    budget = data.draw(st.none() | st.floats(min(needed, 1), 1))
    chain = guards(
        natural, budget=budget, min_weight=low, max_weight=high, pinned=pinned,
        max_change=data.draw(st.none() | st.floats(1.01, 4)),
    )  # fmt: skip
    weights, _ = chain.apply(distribution() * data.draw(unit), data.draw(st.sampled_from([None, distribution()])))
    assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= low - 1e-9).all() and (weights <= high + 1e-9).all()
    plain = Guards(chain.natural, budget, np.zeros(count), np.ones(count), chain.max_change, chain.pinned)
    weights, _ = plain.apply(distribution(), distribution())
    assert budget is None or 0.5 * np.abs(weights - chain.natural).sum() <= budget + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=10))
def test_fit_scales_between_the_bounds(rows: list[tuple[float, float, float]]) -> None:
    base, a, b = (np.array(column) for column in zip(*rows, strict=True))
    low, high = a / max(a.sum(), 1.0), np.ones(len(rows))
    high = np.maximum(low, high * (0.5 + b))
    if high.sum() < 1:
        high += 1
    out = fit(base, low, high)
    assert out.sum() == pytest.approx(1, abs=1e-9)
    free = (out > low + 1e-9) & (out < high - 1e-9) & (base > 1e-6)
    assert not free.any() or np.ptp(out[free] / base[free]) <= 1e-6 * (out[free] / base[free]).max()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0.0}, r"budget must be a share in \(0, 1\]"),
        ({"budget": 1.2}, "budget must be a share"),
        ({"budget": float("nan")}, "budget must be a share"),
        ({"max_change": 1.0}, "max_change is a factor"),
        ({"min_weight": 0.4}, "min_weight sums to 1.2 over 3 tasks, above 1: lower it"),
        ({"min_weight": -0.1}, "min_weight must hold probabilities"),
        ({"max_weight": 0.2}, "max_weight sums to 0.6 over 3 tasks, below 1: raise it"),
        ({"min_weight": [0.5, 0, 0], "max_weight": [0.4, 1, 1]}, "above max_weight"),
        ({"pinned": [True] * 3}, "all tasks are pinned"),
        (
            {"budget": 0.1, "min_weight": [0, 0.2, 0.1]},
            "min_weight diverts 0.2 of every batch .* than budget=0.1 allows: lower min_weight, or pass budget=0.2 or",
        ),
        (
            {"budget": 0.15, "max_weight": [0.74, 1, 1]},
            r"max_weight diverts 0.16 of .* budget=0.15 allows: raise max_weight, or pass budget=0.16 or more",
        ),
    ],
)
def test_guards_that_cannot_be_met_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guards(**options)
