from __future__ import annotations

from typing import Any

import pytest

from taskgrad.sampling.policies import FixedPolicy, Proportional, Static, Temperature, Uniform
from tests.sampling.policies.helpers import state


@pytest.mark.parametrize(
    "policy, expected",
    [
        (Proportional(), (0.900901, 0.090090, 0.009009)),
        (Uniform(), (1 / 3, 1 / 3, 1 / 3)),
        (Temperature(1), (0.900901, 0.090090, 0.009009)),
        (Temperature(2), (0.706101, 0.223289, 0.070610)),
        (Temperature(5), (0.492838, 0.310960, 0.196202)),
        (Temperature(float("inf")), (1 / 3, 1 / 3, 1 / 3)),
        (Temperature(1e-4), (1, 0, 0)),
        (Static([0.2, 0.3, 0.5]), (0.2, 0.3, 0.5)),
        (Static({"c": 0.75, "a": 0.25}), (0.25, 0, 0.75)),
    ],
    ids=repr,
)
def test_weights(policy: FixedPolicy, expected: tuple[float, ...]) -> None:
    assert policy.weights(None, state()) == pytest.approx(expected, abs=5e-7)
    assert policy.initial(state()) == pytest.approx(expected, abs=5e-7)
    assert not policy.adaptive


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        Temperature(temperature)


@pytest.mark.parametrize(
    "weights, message",
    [
        ([0.5, 0.6], r"must sum to 1, got 1\.1: divide"),
        ([0.5, 0.4], r"must sum to 1, got 0\.9"),
        ([1.5, -0.5], "finite and not negative"),
        ([float("nan"), 1.0], "finite and not negative"),
        ([], "one probability per task"),
        ([[1.0]], r"got shape \(1, 1\)"),
    ],
)
def test_static_checks_its_weights(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Static(weights)


def test_static_is_checked_against_the_tasks() -> None:
    with pytest.raises(ValueError, match="Static has 2 weights, the sampler has 3 tasks"):
        Static([0.5, 0.5]).initial(state())
    with pytest.raises(ValueError, match=r"unknown tasks \['x'\]; the tasks are \['a', 'b', 'c'\]"):
        Static({"x": 1.0}).initial(state())


def test_what_a_policy_is_given_cannot_be_changed() -> None:
    given = state()
    with pytest.raises(ValueError, match="read-only"):
        given.natural[0] = 0
    with pytest.raises(AttributeError):
        given.step = 3  # type: ignore[misc]
