"""Steps that never happen, or fail half way: the report says so and the memory is untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.steps import (
    TASKS,
    Case,
    make_case,
    run_batch,
)


def history(
    case: Case, disturb: Callable[[tg.TaskGradTracker, Case], None] | None, **options: Any
) -> list[tg.StepReport]:
    """Two good steps at fixed parameters, with something in between that must leave no mark."""
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact", **options)
    reports = []
    for number in range(2):
        if number == 1 and disturb is not None:
            disturb(tracker, case)
            case.model.zero_grad()
        run_batch(tracker, case)
        tracker.step()
        case.model.zero_grad()
        reports.append(tracker.report())
    return reports


def non_finite(value: float) -> Callable[[tg.TaskGradTracker, Case], None]:
    def disturb(tracker: tg.TaskGradTracker, case: Case) -> None:
        with tracker.batch(case.ids):
            (case.loss() * value).backward()
        tracker.step()
        assert not tracker.report().valid
        assert tracker.report().signal.isnan().all()

    return disturb


def one_bad_row(tracker: tg.TaskGradTracker, case: Case) -> None:
    good = case.args
    x = good[0].clone()
    x[1, 0] = torch.inf
    case.args = (x,)
    run_batch(tracker, case)
    case.args = good
    tracker.step()
    assert not tracker.report().valid


def zeroed(set_to_none: bool) -> Callable[[tg.TaskGradTracker, Case], None]:
    def disturb(tracker: tg.TaskGradTracker, case: Case) -> None:
        run_batch(tracker, case)
        case.model.zero_grad(set_to_none=set_to_none)
        assert not tracker.report().valid

    return disturb


def zeroed_then_stepped(tracker: tg.TaskGradTracker, case: Case) -> None:
    run_batch(tracker, case)
    case.model.zero_grad()
    tracker.step()
    assert not tracker.report().valid


def raised_before_backward(tracker: tg.TaskGradTracker, case: Case) -> None:
    with pytest.raises(KeyError, match="user"), tracker.batch(case.ids.roll(1)):
        case.loss()
        raise KeyError("user")


def raised_before_forward(tracker: tg.TaskGradTracker, case: Case) -> None:
    with pytest.raises(KeyError, match="user"), tracker.batch(case.ids.roll(1)):
        raise KeyError("user")


def raised_in_forward(tracker: tg.TaskGradTracker, case: Case) -> None:
    with pytest.raises(RuntimeError, match="shape"), tracker.batch(case.ids.roll(1)):
        case.model(torch.randn(6, 3, dtype=torch.float64))


def raised_inside_backward(tracker: tg.TaskGradTracker, case: Case) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ValueError("user")

    handle = case.model[2].register_forward_hook(lambda module, args, out: Broken.apply(out))  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="user"):
        run_batch(tracker, case)
    handle.remove()


def never_backward(tracker: tg.TaskGradTracker, case: Case) -> None:
    with tracker.batch(case.ids.roll(2)):
        case.loss()


def empty_batch(tracker: tg.TaskGradTracker, case: Case) -> None:
    with tracker.batch(case.ids):
        pass


def validation_loss(tracker: tg.TaskGradTracker, case: Case) -> None:
    with torch.no_grad(), tracker.batch(case.ids.roll(1)):
        case.loss()


def step_without_anything(tracker: tg.TaskGradTracker, case: Case) -> None:
    tracker.step()


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(non_finite(torch.nan), id="nan"),
        pytest.param(non_finite(torch.inf), id="inf"),
        one_bad_row,
        pytest.param(zeroed(True), id="zeroed_to_none"),
        pytest.param(zeroed(False), id="zeroed"),
        zeroed_then_stepped,
        raised_before_backward,
        raised_before_forward,
        raised_in_forward,
        raised_inside_backward,
        never_backward,
        empty_batch,
        validation_loss,
        step_without_anything,
    ],
)
def test_a_step_that_does_not_happen_leaves_no_mark(disturb: Callable[[tg.TaskGradTracker, Case], None]) -> None:
    torch.manual_seed(0)
    plain = history(make_case(ARCHITECTURES["mlp"], "example"), None)
    torch.manual_seed(0)
    marked = history(make_case(ARCHITECTURES["mlp"], "example"), disturb)
    for got, want in zip(marked, plain, strict=True):
        assert got.valid and want.valid
        for name in (
            "examples",
            "tokens",
            "gram",
            "cosine",
            "norm",
            "signal",
            "memory_dot",
            "steps_since_seen",
            "overwrite",
        ):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-12, atol=1e-15, equal_nan=True)


def test_skipped_amp_step() -> None:
    """GradScaler meets an infinite gradient and leaves ``optimizer.step`` out; the scale then changes."""
    results = []
    for overflow in (False, True):
        torch.manual_seed(0)
        case = make_case(ARCHITECTURES["mlp"], "example", dtype=torch.float32)
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer, mode="exact", loss_scale=scaler)
        valid = []
        for number in range(3):
            factor = torch.inf if overflow and number == 1 else 1.0
            if not overflow and number == 1:
                continue
            optimizer.zero_grad()
            with tracker.batch(case.ids):
                scaler.scale(case.loss() * factor).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(case.model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            valid.append(tracker.report().valid)
        report = tracker.report()
        results.append(report)
        assert report.valid and report.step == 2
        assert tracker.coverage().unattributed == {}
        assert valid[0] and valid[-1]
    for name in ("gram", "norm", "signal", "memory_dot", "own_effect", "others_effect"):
        torch.testing.assert_close(
            getattr(results[1], name), getattr(results[0], name), rtol=1e-3, atol=1e-7, equal_nan=True
        )


def test_a_skipped_step_is_reported_as_such_once_its_gradients_are_gone() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example", dtype=torch.float32)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer)
    for valid in (True, False, True):
        with tracker.batch(case.ids):
            case.loss().backward()
        if valid:
            optimizer.step()
        optimizer.zero_grad()
        assert tracker.report().valid is valid


def test_the_first_report_is_there_before_any_step() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    report = tg.track(case.model, tasks=list(TASKS)).report()
    assert report.step == 0 and not report.valid
    assert report.steps_since_seen.tolist() == [-1, -1, -1]
    assert report.to_dict()["gram"] == [[None] * 3] * 3
    assert "step 0" in str(report)
