"""Any object with ``weights`` is a policy, and what policies answer is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from taskgrad.sampling.adapted import AdaptedPolicy, check_weights
from taskgrad.sampling.arrays import FloatArray
from taskgrad.sampling.policies import Policy, PolicyState, Proportional, Shuffled
from tests.sampling.policies.helpers import state


class Plain:
    """No policy by birth."""

    def weights(self, report: Any, state: PolicyState) -> Sequence[float]:
        return [0.0, 0.5, 0.25]


class Whole(Plain):
    """It has everything."""

    adaptive = False
    guard_defaults: ClassVar = {"budget": 0.25}

    def initial(self, state: PolicyState) -> Sequence[float]:
        return [0, 1, 0]

    def changes(self, state: PolicyState) -> Sequence[int]:
        return (3, 9)

    def why(self, state: PolicyState) -> str:
        return f"for {state.tasks}"


class Derived(Policy):
    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        return np.array([0.0, 0.5, 0.25])


@pytest.mark.parametrize("policy", [Plain(), Derived()])
def test_what_a_policy_leaves_out_is_what_the_base_class_has(policy: Any) -> None:
    adapted, now = AdaptedPolicy(policy), state()
    assert adapted.adaptive is True and adapted.guard_defaults == {} and adapted.name == type(policy).__name__
    assert np.array_equal(adapted.initial(now), now.natural)
    assert adapted.weights(None, now).tolist() == [0, 0.5, 0.25]
    assert list(adapted.changes(now)) == [] and adapted.why(now) == ""


def test_what_a_policy_has_is_taken() -> None:
    adapted, now = AdaptedPolicy(Whole()), state()
    assert adapted.adaptive is False and adapted.guard_defaults == {"budget": 0.25}
    assert adapted.initial(now).tolist() == [0, 1, 0] and not adapted.initial(now).flags.writeable
    assert adapted.changes(now) == (3, 9) and adapted.why(now) == "for ('a', 'b', 'c')"


def test_attributes_of_the_object_itself_count_too() -> None:
    policy: Any = Plain()
    adapted = AdaptedPolicy(policy)
    policy.adaptive, policy.initial, policy.weights = False, lambda state: [1, 0, 0], lambda report, state: [0, 0, 1]
    assert adapted.adaptive is False
    assert adapted.initial(state()).tolist() == [1, 0, 0] and adapted.weights(None, state()).tolist() == [0, 0, 1]


def test_a_policy_within_a_policy_is_in_its_name() -> None:
    assert AdaptedPolicy(Shuffled(Plain())).name == "Shuffled(Plain)"
    assert AdaptedPolicy(Shuffled(Shuffled(Proportional()))).name == "Shuffled(Shuffled(Proportional))"
    assert AdaptedPolicy(Shuffled(Whole())).kind == "Shuffled"


@pytest.mark.parametrize("policy", [Plain, Policy, Proportional, None, 3, max, lambda report, state: [1, 0, 0], {}])
def test_what_is_no_policy(policy: Any) -> None:
    with pytest.raises(TypeError, match=r"policy must be an object with a method weights\(report, state\), got "):
        AdaptedPolicy(policy)


def test_a_method_that_is_none() -> None:
    policy: Any = Plain()
    policy.weights = (0.5, 0.5)
    with pytest.raises(TypeError, match="policy must be an object with a method weights"):
        AdaptedPolicy(policy)


def test_answers_are_named_after_the_policy_that_gave_them() -> None:
    policy: Any = Plain()
    policy.policy, policy.initial = Proportional(), lambda state: [0.5, 0.5]
    with pytest.raises(ValueError, match=r"^Plain\(Proportional\) returned weights of shape \(2,\), need \(3,\)"):
        AdaptedPolicy(policy).initial(state())
    policy.weights = lambda report, state: "abc"
    with pytest.raises(TypeError, match=r"^Plain\(Proportional\) returned 'abc'; it must return one probability"):
        AdaptedPolicy(policy).weights(None, state())


@pytest.mark.parametrize("said", [3, None, b"raised", ["raised"]])
def test_a_line_that_is_no_text(said: Any) -> None:
    policy: Any = Whole()
    policy.why = lambda state: said
    with pytest.raises(TypeError, match=r"^Whole\.why must return text, got "):
        AdaptedPolicy(policy).why(state())


@pytest.mark.parametrize(
    "shares, message",
    [
        ([0.5, 0.5], r"P returned weights of shape \(2,\), need \(3,\)"),
        ([0.5, 0.5, float("nan")], "negative or not finite: {'c': nan}"),
        ([0.5, 0.6, -0.1], "negative or not finite: {'c': -0.1}"),
        ([0.5, 0.5, float("inf")], "not finite"),
        ([0.5, 0.5, 0.1], "summing to 1.1"),
        (np.full((1, 3), 1 / 3), r"shape \(1, 3\), need \(3,\)"),
        (0.5, r"shape \(\), need \(3,\)"),
    ],
)
def test_what_a_policy_returns_is_checked(shares: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(shares, ("a", "b", "c"), "P")


@pytest.mark.parametrize(
    "shares",
    [
        None,
        {"a": 0.5, "b": 0.5, "c": 0.0},
        [True, False, False],
        [0.5 + 0j, 0.5, 0.0],
        ["0.5", "0.5", "0"],
        [0.5, 0.5, None],
        [[0.5], [0.5, 0.0], []],
    ],
)
def test_what_a_policy_returns_must_be_numbers(shares: Any) -> None:
    with pytest.raises(TypeError, match=r"P returned .*; it must return one probability per task \(3\)"):
        check_weights(shares, ("a", "b", "c"), "P")


def test_integers_tensors_and_rounding_errors_are_fine() -> None:
    for shares in ([0, 1, 0], np.array([0, 1, 0], dtype=np.float32), torch.tensor([0.0, 1.0 + 5e-7, 0.0])):
        assert check_weights(shares, ("a", "b", "c"), "P").tolist() == [0, 1, 0]
