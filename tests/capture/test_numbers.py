"""Numbers of tasks and weights, reports that stay as they are, state that comes back."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import separate_backwards, to_double
from tests.utils.steps import (
    TASKS,
    Case,
    Expected,
    assert_report,
    make_case,
    relative_error,
    run_batch,
    tracked_step,
)


@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_any_number_of_tasks(count: int, mode: str) -> None:
    case = make_case(ARCHITECTURES["gpt_row_positions_tied"], "example")
    case.ids = torch.tensor([0, count - 1, -1, count // 2, 0, count - 1])
    oracle = separate_backwards(case.model, (case.args, case.kwargs), case.row_loss, case.ids, count)
    tracker = tg.track(case.model, tasks=[f"task {t}" for t in range(count)], mode=mode, sketch_dim=4096)  # type: ignore[arg-type]
    run_batch(tracker, case)
    tracker.step()
    assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, None), 1e-9)


def test_integer_weights_and_weights_of_zero() -> None:
    """``(labels != -100).sum(1)`` is int64 and may be zero for all rows of a task."""
    case = make_case(ARCHITECTURES["mlp"], "example")
    case.weight = torch.tensor([3, 1, 2, 0, 4, 5])
    case.ids = torch.tensor([2, 0, -1, 1, 0, 2])
    oracle = separate_backwards(*case.oracle_arguments)
    done = tracked_step(case)
    assert done.report.tokens.tolist() == [5.0, 0.0, 8.0]
    assert done.report.norm.isnan().tolist() == [False, True, False]
    assert relative_error(done.report.gram, Expected.of(oracle, oracle, case.ids, case.weight).gram) <= 1e-10
    case.model.zero_grad()
    case.weight = None
    run_batch(done.tracker, case)
    done.tracker.step()
    assert done.tracker.report().signal.isnan().tolist() == [False, True, False]


def test_reports_do_not_change_afterwards() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.5)
    tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer, mode="exact")
    kept = []
    for _ in range(4):
        optimizer.zero_grad()
        run_batch(tracker, case)
        optimizer.step()
        kept.append((tracker.report(), str(tracker.report().to_dict())))
        assert tracker.report() is tracker.report()
    for report, text in kept:
        assert str(report.to_dict()) == text


def test_a_restored_tracker_goes_on_as_if_nothing_had_happened() -> None:
    case = make_case(ARCHITECTURES["gpt_row_positions_tied"], "example")
    twin = to_double(case.model)
    reports: list[list[tg.StepReport]] = [[], []]
    tracker = None
    for number, model in enumerate((case.model, twin)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        tracker = tg.track(model, tasks=list(TASKS), optimizer=optimizer)
        run = Case(model, case.args, case.kwargs, case.row_loss, case.ids, None)
        for step in range(6):
            if number == 1 and step == 3:
                state = tracker.state_dict()
                tracker.remove()
                tracker = tg.track(model, tasks=list(TASKS), optimizer=optimizer)
                tracker.load_state_dict(state)
            run.ids = case.ids.roll(step)
            optimizer.zero_grad()
            run_batch(tracker, run)
            optimizer.step()
            reports[number].append(tracker.report())
    for first, second in zip(*reports, strict=True):
        assert first.to_dict() == second.to_dict()


def test_layers_added_after_tracking_began_are_listed() -> None:
    """An adapter put on later has parameters that no number covers."""
    case = make_case(ARCHITECTURES["mlp"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    case.model.append(nn.Linear(3, 3).double())  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run_batch(tracker, case)
        tracker.step()
    assert {"6.weight", "6.bias"} <= set(tracker.coverage().unattributed) | set(tracker.coverage().attributed)
