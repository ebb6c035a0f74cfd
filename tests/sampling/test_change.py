from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.arrays import FloatArray, IntArray
from taskgrad.sampling.change import TOLERANCE, described, joined, next_mix
from taskgrad.sampling.engine.quota import ONE, from_units, to_units
from taskgrad.sampling.guards import Guards


def guards(natural: FloatArray, **options: Any) -> Guards:
    count = len(natural)
    default = {
        "budget": None,
        "min_weight": np.zeros(count),
        "max_weight": np.ones(count),
        "max_change": None,
        "pinned": np.zeros(count, dtype=bool),
    }
    return Guards(natural, **{**default, **options})


def diverted(mix: IntArray, natural: FloatArray) -> float:
    return 0.5 * float(np.abs(from_units(mix) - natural).sum())


@st.composite
def runs(draw: Any) -> tuple[Guards, list[FloatArray]]:
    """Guards, and what a policy asks for, one report after the other: partly noise, partly jumps."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    count = draw(st.sampled_from([1, 2, 3, 7, 40]))
    natural = rng.dirichlet(np.full(count, draw(st.sampled_from([0.2, 1.0, 5.0]))))
    budget = draw(st.sampled_from([None, 0.05, 0.3]))
    options: dict[str, Any] = {"budget": budget, "max_change": draw(st.sampled_from([None, 1.001, 1.5]))}
    if budget is None:
        options["min_weight"] = np.full(count, 0.3 / count)
        options["max_weight"] = np.full(count, min(1.0, 3.0 / count))
    if count > 2 and draw(st.booleans()):
        options["pinned"] = np.arange(count) == draw(st.integers(0, count - 1))
    noise = draw(st.sampled_from([0.001, 0.01, 0.3]))
    asked = rng.dirichlet(np.ones(count))
    out = []
    for _ in range(12):
        if rng.random() < 0.15:
            asked = rng.dirichlet(np.full(count, 0.3))
        wanted = asked * np.exp(noise * rng.standard_normal(count))
        out.append(wanted / wanted.sum() * draw(st.sampled_from([1.0, 1.0, 0.3, 0.0])))
    return guards(natural, **options), out


@settings(deadline=None)
@given(runs())
def test_every_mix_keeps_to_the_guards_and_near_what_was_asked(run: tuple[Guards, list[FloatArray]]) -> None:
    rules, asked = run
    natural = rules.natural
    in_force = to_units(rules.apply(np.zeros(len(natural)), None)[0])
    for shares in asked:
        let_through = to_units(rules.apply(shares, from_units(in_force))[0])
        mix = next_mix(let_through, in_force, rules)
        assert mix.dtype == np.int64 and int(mix.sum()) == ONE
        low, high = np.minimum(in_force, let_through), np.maximum(in_force, let_through)
        assert (mix >= low).all() and (mix <= high).all()
        assert (np.abs(mix - let_through) <= TOLERANCE * in_force).all()
        if rules.budget is not None:
            before = diverted(let_through, natural)
            assert diverted(mix, natural) <= max(rules.budget, before) + len(natural) / ONE
        assert (from_units(mix) >= rules.min_weight - 1e-9).all()
        assert (from_units(mix) <= rules.max_weight + 1e-9).all()
        in_force = mix


def test_noise_is_not_entered_and_a_slow_drift_is() -> None:
    rng = np.random.default_rng(0)
    natural = np.array([0.7, 0.2, 0.1])
    rules = guards(natural)
    in_force, entries = to_units(natural), 0
    for k in range(2000):
        drift = np.array([0.0, 0.0, 0.1 * k / 2000])
        wanted = (natural + drift) * (1 + 0.002 * rng.standard_normal(3))
        mix = next_mix(to_units(wanted / wanted.sum()), in_force, rules)
        entries += not np.array_equal(mix, in_force)
        in_force = mix
        assert from_units(mix) == pytest.approx(wanted / wanted.sum(), rel=2 * TOLERANCE)
    assert 30 < entries < 300


def test_a_task_that_moves_gets_what_is_asked_and_the_others_stay() -> None:
    in_force = to_units(np.array([0.5, 0.3, 0.1, 0.1]))
    asked = to_units(np.array([0.45, 0.301, 0.149, 0.1]))
    mix = next_mix(asked, in_force, guards(np.full(4, 0.25)))
    assert mix[[0, 2, 3]].tolist() == asked[[0, 2, 3]].tolist()
    assert mix[1] == ONE - int(mix[[0, 2, 3]].sum())


def test_the_natural_mix_is_exact() -> None:
    natural = np.array([0.7, 0.2, 0.1])
    near = to_units(natural * [1.001, 1.0, 0.993])
    assert next_mix(to_units(natural), near, guards(natural)).tolist() == to_units(natural).tolist()


def test_a_task_without_share_gets_one() -> None:
    in_force = to_units(np.array([1.0, 0.0]))
    asked = to_units(np.array([1 - 1e-9, 1e-9]))
    assert next_mix(asked, in_force, guards(np.array([0.5, 0.5]))).tolist() == asked.tolist()
    assert next_mix(in_force, asked, guards(np.array([0.5, 0.5]))).tolist() == in_force.tolist()


@pytest.mark.parametrize("factor", [1.0001, 1.005, 1.2])
def test_small_allowed_changes_add_up(factor: float) -> None:
    natural = np.array([0.9, 0.1])
    rules = guards(natural, max_change=factor)
    in_force = to_units(natural)
    wanted = np.array([0.85, 0.15])
    for _ in range(int(np.log(1.5) / np.log(factor)) + 2):
        in_force = next_mix(to_units(rules.apply(wanted, from_units(in_force))[0]), in_force, rules)
    assert from_units(in_force) == pytest.approx(wanted, rel=TOLERANCE)


def test_where_kept_shares_would_exceed_the_budget_all_move() -> None:
    natural = np.array([0.25, 0.04, 0.41, 0.30])
    in_force = to_units(np.array([0.31, 0.08, 0.35, 0.26]))
    asked = to_units(np.array([0.309, 0.081, 0.3511, 0.2589]))  # only the second by more than 1 %
    free = next_mix(asked, in_force, guards(natural))
    assert free[[0, 1, 2]].tolist() == [in_force[0], asked[1], in_force[2]] and diverted(free, natural) > 0.1009
    assert next_mix(asked, in_force, guards(natural, budget=0.1)).tolist() == asked.tolist()


def test_a_change_in_a_line() -> None:
    before, after = to_units(np.array([0.6, 0.2, 0.1, 0.1])), to_units(np.array([0.5, 0.22, 0.13, 0.15]))
    names = ("text", "code", "legal\n", "x" * 90)
    line = "lowered text 0.6 -> 0.5, raised xxxxxxxxx...xxxxxxxx 0.1 -> 0.15, raised legal\\n 0.1 -> 0.13 and 1 more"
    assert described(names, before, after) == line
    assert described(names, before, before) == ""
    assert joined(["a" * 80, "b" * 80, "c"], 9) == "a" * 80 + " and 8 more"
    assert joined(["a" * 130], 1) == "a" * 120
