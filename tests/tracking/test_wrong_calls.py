"""Every wrong call raises where it was made, and says what it got and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.steps import (
    TASKS,
    make_case,
)


@pytest.fixture
def tracker() -> tg.TaskGradTracker:
    return tg.track(make_case(ARCHITECTURES["mlp"], "example").model, tasks=list(TASKS))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1, 2], TypeError, r"ids.*tensor.*list"),
        (torch.tensor([0.0, 1.0]), TypeError, r"ids.*int64.*float32.*long"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, r"ids.*int64.*int32.*long"),
        (torch.tensor([True, False]), TypeError, r"ids.*int64.*bool"),
        (torch.tensor(1), ValueError, r"ids.*\(B,\).*\(B, S\).*\(\)"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), ValueError, r"ids.*\(B,\).*\(2, 3, 4\)"),
        (torch.zeros(0, dtype=torch.int64), ValueError, r"ids.*empty"),
        (torch.tensor([0, 3]), ValueError, r"ids.*\[-1, 3\).*3"),
        (torch.tensor([0, -2]), ValueError, r"ids.*\[-1, 3\).*-2"),
    ],
)
def test_wrong_ids(tracker: tg.TaskGradTracker, ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tracker.batch(ids)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0, 1.0], TypeError, r"weight.*tensor"),
        (torch.ones(3), ValueError, r"weight.*\(2,\).*\(3,\)"),
        (torch.tensor([1.0, -1.0]), ValueError, r"weight.*negative"),
        (torch.tensor([1.0, torch.nan]), ValueError, r"weight.*finite"),
    ],
)
def test_wrong_weight(tracker: tg.TaskGradTracker, weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tracker.batch(torch.tensor([0, 1]), weight=weight)


def test_wrong_rows(tracker: tg.TaskGradTracker) -> None:
    with (
        tracker.batch(torch.tensor([0, 1])),
        pytest.raises(ValueError, match=r"ids.*\[-1, 3\)"),
        tracker.rows(torch.tensor([5])),
    ):
        pass


def test_ids_that_do_not_fit_the_batch_attribute_nothing_and_say_so() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    case.ids = torch.tensor([0, 1, 2, 0])
    tracker = tg.track(case.model, tasks=list(TASKS))
    with pytest.warns(UserWarning, match=r"\(6, \d+\).*ids.*\(4,\)"):
        with tracker.batch(case.ids):
            case.model(*case.args).sum().backward()
        tracker.step()
    assert tracker.coverage().attributed == ()
    assert tracker.coverage().fraction == 0


def test_nested_batches_of_one_tracker(tracker: tg.TaskGradTracker) -> None:
    ids = torch.tensor([0, 1])
    with tracker.batch(ids), pytest.raises(RuntimeError, match=r"batch\(\).*open"), tracker.batch(ids):
        pass


def test_wrong_losses(tracker: tg.TaskGradTracker) -> None:
    with tracker.batch(torch.tensor([0, 1])) as batch, pytest.raises(ValueError, match=r"per_row.*\(2,\).*\(3,\)"):
        batch.losses(torch.zeros(3))


def frozen() -> nn.Module:
    return nn.Linear(3, 2).requires_grad_(False)


def linear() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (frozen, {}, ValueError, r"model.*no trainable.*requires_grad"),
        (lambda: nn.ReLU(), {}, ValueError, r"model.*no trainable"),
        (lambda: nn.PReLU(), {}, ValueError, r"PReLU"),
        (lambda: "model", {}, TypeError, r"model.*Module.*str"),
        (linear, {"tasks": []}, ValueError, r"tasks.*at least one"),
        (linear, {"tasks": ["a", "a"]}, ValueError, r"tasks.*distinct"),
        (linear, {"tasks": "ab"}, TypeError, r"tasks.*'ab'"),
        (linear, {"tasks": [0, 1]}, TypeError, r"tasks.*names"),
        (linear, {"mode": "fast"}, ValueError, r'mode.*"sketch".*"exact".*fast'),
        (linear, {"sketch_dim": 0}, ValueError, r"sketch_dim.*0"),
        (linear, {"sketch_dim": 64.0}, TypeError, r"sketch_dim.*float"),
        (linear, {"memory_decay": 1.0}, ValueError, r"memory_decay.*\[0, 1\).*1\.0"),
        (linear, {"memory_decay": -0.1}, ValueError, r"memory_decay.*-0\.1"),
        (linear, {"optimizer": "adam"}, TypeError, r"optimizer.*"),
        (linear, {"optimizer": [nn.Linear(1, 1)]}, TypeError, r"optimizer.*Linear"),
        (linear, {"loss_scale": "big"}, TypeError, r"loss_scale.*str"),
        (linear, {"include": ["0.weight"]}, TypeError, r"include.*list"),
        (linear, {"include": lambda name, module: False}, ValueError, r"include"),
    ],
)
def test_wrong_arguments_of_track(
    make: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tg.track(make(), **{"tasks": ["a", "b"], **options})


def test_an_optimizer_of_another_model() -> None:
    optimizer = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer.*parameters"):
        tg.track(nn.Linear(3, 2), tasks=["a"], optimizer=optimizer)


def test_an_optimizer_of_the_model_before_it_was_copied() -> None:
    """``model = copy(model)`` after the optimizer was built: half of the pair is the wrong one."""
    model = nn.Linear(3, 2)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"optimizer.*parameters"):
        tg.track(model, tasks=["a"], optimizer=optimizers)


def test_tracking_one_model_twice() -> None:
    model = nn.Linear(3, 2)
    first = tg.track(model, tasks=["a"])
    with pytest.raises((ValueError, RuntimeError), match=r"remove|tracker"):
        tg.track(model, tasks=["a"])
    first.remove()
    tg.track(model, tasks=["a"])


def test_step_by_hand_with_an_optimizer() -> None:
    model = nn.Linear(3, 2)
    tracker = tg.track(model, tasks=["a"], optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"optimizer.*step"):
        tracker.step()


def test_task_gradients_need_exact_mode_and_a_step() -> None:
    with pytest.raises(RuntimeError, match=r'mode="exact"'):
        tg.track(nn.Linear(3, 2), tasks=["a"]).task_gradients()
    with pytest.raises(RuntimeError, match=r"step"):
        tg.track(nn.Linear(3, 2), tasks=["a"], mode="exact").task_gradients()


def test_a_state_of_another_tracker() -> None:
    state = tg.track(nn.Linear(3, 2), tasks=["a", "b"]).state_dict()
    for other in (
        tg.track(nn.Linear(3, 2), tasks=["a", "c"]),
        tg.track(nn.Linear(3, 2), tasks=["a", "b"], mode="exact"),
        tg.track(nn.Linear(4, 2), tasks=["a", "b"]),
    ):
        with pytest.raises(ValueError, match="state_dict"):
            other.load_state_dict(state)
