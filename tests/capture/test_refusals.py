"""Ways to train that cannot be tracked and raise; closures that can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import separate_backwards
from tests.utils.steps import (
    TASKS,
    Case,
    Expected,
    assert_report,
    make_case,
    run_batch,
)


def test_create_graph_raises() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS))
    with pytest.raises(RuntimeError, match="create_graph"), tracker.batch(case.ids):
        case.loss().backward(create_graph=True)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
def test_create_graph_for_a_gradient_penalty_raises() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS))
    x = case.args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph"), tracker.batch(case.ids):
        torch.autograd.grad(case.model(x).sum(), x, create_graph=True)


def test_lbfgs_raises() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    optimizer = torch.optim.LBFGS(case.model.parameters())

    with pytest.raises((RuntimeError, TypeError), match=r"closure|LBFGS"):
        tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer)
        optimizer.step(closure_of(tracker, optimizer, case))


def closure_of(tracker: tg.TaskGradTracker, optimizer: torch.optim.Optimizer, case: Case) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return run_batch(tracker, case)

    return closure


def test_a_closure_that_is_called_once_is_a_step_like_any_other() -> None:
    """Lightning hands forward and backward to ``optimizer.step`` as a closure."""
    case = make_case(ARCHITECTURES["mlp"], "example")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer)
    for number in (1, 2):
        oracle = separate_backwards(*case.oracle_arguments)
        loss = optimizer.step(closure_of(tracker, optimizer, case))
        assert loss is not None
        assert tracker.report().step == number
        assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, None), 1e-9)


class Twice(torch.optim.SGD):
    """As sharpness-aware minimisers do: the closure is evaluated at two points."""

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        closure()
        super().step()
        closure()


def test_a_closure_that_is_called_twice_raises() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    optimizer = Twice(case.model.parameters(), lr=0.1)
    tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(closure_of(tracker, optimizer, case))


def test_an_optimizer_inside_the_backward_raises() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in case.model.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in case.model.parameters():
        p.register_post_accumulate_grad_hook(update)
    with pytest.raises(RuntimeError, match="backward"):
        tracker = tg.track(case.model, tasks=list(TASKS), optimizer=list(optimizers.values()))
        run_batch(tracker, case)
