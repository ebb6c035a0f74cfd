"""Which parameters are tracked: those that ``include`` names, and those that were frozen, thawed, moved or replaced."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import separate_backwards
from tests.utils.steps import TASKS, Expected, assert_report, make_case, relative_error, run_batch


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def _step(tracker: tg.TaskGradTracker, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with tracker.batch(torch.tensor([0, 1, 1, 0, -1, 1])):
        model(torch.randn(6, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_include_leaves_out_is_listed_and_not_warned_of() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer, include=lambda name, module: name == "2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(tracker, model, optimizer)
    assert set(tracker.coverage().attributed) == {"2.weight", "2.bias"}
    assert "include" in tracker.coverage().unattributed["0.weight"]


def test_a_parameter_that_was_replaced_is_left_out_by_name() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer)
    _step(tracker, model, optimizer)
    model[2].weight = nn.Parameter(torch.zeros(2, 8))
    with pytest.warns(UserWarning, match=r"2\.weight .*another tensor"):
        _step(tracker, model, optimizer)
    assert tracker.report().valid
    assert "2.weight" in tracker.coverage().unattributed
    assert "2.bias" in tracker.coverage().attributed


def test_freezing_and_unfreezing_in_mid_run() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    for frozen in ((), ("0.weight", "3.bias"), ("5.weight", "5.bias"), ()):
        for name, p in case.model.named_parameters():
            p.requires_grad_(name not in frozen)
            p.grad = None
        oracle = separate_backwards(*case.oracle_arguments)
        run_batch(tracker, case)
        tracker.step()
        assert tracker.report().valid
        parts = tracker.task_gradients()
        for name in oracle:
            assert relative_error(parts[name], oracle[name]) <= 1e-10, (frozen, name)
        for name in frozen:
            assert name not in parts or not parts[name].any(), (frozen, name)
        expected = Expected.of(oracle, oracle, case.ids, None)
        assert_report(tracker.report(), expected, 1e-9)


def test_parameters_thawed_after_tracking_began() -> None:
    """A head that is frozen at first and joins later is measured from then on, or listed."""
    case = make_case(ARCHITECTURES["mlp"], "example")
    case.model[5].requires_grad_(False)  # type: ignore[index]
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    run_batch(tracker, case)
    tracker.step()
    case.model[5].requires_grad_(True)  # type: ignore[index]
    case.model.zero_grad()
    oracle = separate_backwards(*case.oracle_arguments)
    run_batch(tracker, case)
    tracker.step()
    coverage = tracker.coverage()
    assert set(coverage.attributed) | set(coverage.unattributed) == set(oracle)
    parts = tracker.task_gradients()
    for name in coverage.attributed:
        assert relative_error(parts[name], oracle[name]) <= 1e-10, name


def test_moved_to_float64_after_tracking_began() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    case.model.float()
    tracker = tg.track(case.model, tasks=list(TASKS))
    case.model.double()
    oracle = separate_backwards(*case.oracle_arguments)
    run_batch(tracker, case)
    tracker.step()
    assert_report(tracker.report(), Expected.of(oracle, tracker.coverage().attributed, case.ids, case.weight), 1e-9)
    assert set(tracker.coverage().attributed) == set(oracle), tracker.coverage().unattributed


def test_include_limits_what_is_tracked() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact", include=lambda name, module: name == "5")
    run_batch(tracker, case)
    tracker.step()
    assert set(tracker.task_gradients()) == {"5.weight", "5.bias"}
    assert_report(tracker.report(), Expected.of(oracle, ["5.weight", "5.bias"], case.ids, None), 1e-9)
