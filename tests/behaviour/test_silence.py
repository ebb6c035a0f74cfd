"""Silence is a fault: one warning each, that says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg

IDS = torch.tensor([0, 1, 1, 0, -1, 1])


def make() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.optim.SGD(model.parameters(), 0.1)


def said(run: Callable[[], None]) -> list[str]:
    """What taskgrad warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if str(w.message).startswith("taskgrad")]


def train(tracker: tg.TaskGradTracker, model: nn.Module, optimizer: Any, steps: int, ids: Tensor | None = IDS) -> None:
    for _ in range(steps):
        loss = None
        if ids is None:
            loss = model(torch.randn(6, 4)).square().mean()
            loss.backward()
        else:
            with tracker.batch(ids):
                model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.report()


def test_no_batch_is_ever_entered() -> None:
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer)
    messages = said(lambda: train(tracker, model, optimizer, 20, ids=None))
    assert len(messages) == 1 and "with tracker.batch(ids)" in messages[0] and "remove_unused_columns" in messages[0]
    assert not tracker.report().valid


def test_the_task_column_is_lost_on_the_way() -> None:
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer)

    def run() -> None:
        train(tracker, model, optimizer, 3)
        train(tracker, model, optimizer, 20, ids=None)
        train(tracker, model, optimizer, 3)

    messages = said(run)
    assert len(messages) == 1 and "without a tracked batch" in messages[0]
    assert tracker.report().valid


def test_one_step_without_a_batch_is_nothing_to_speak_of() -> None:
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer)

    def run() -> None:
        for _ in range(10):
            train(tracker, model, optimizer, 1)
            train(tracker, model, optimizer, 1, ids=None)

    assert said(run) == []


def test_the_model_is_wrapped_after_tracking() -> None:
    peft = pytest.importorskip("peft")
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    trained = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.1)

    def run() -> None:
        for _ in range(12):
            with tracker.batch(IDS):
                wrapped(torch.randn(6, 4)).square().mean().backward()
            trained.step()
            optimizer.step()
            trained.zero_grad()

    messages = said(run)
    assert any("track() after that" in m for m in messages)
    assert len(messages) <= 2, messages


def test_parameters_that_come_later_are_named() -> None:
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer)

    def run() -> None:
        train(tracker, model, optimizer, 2)
        model.append(nn.Linear(3, 3))
        optimizer.add_param_group({"params": model[3].parameters()})
        train(tracker, model, optimizer, 101)

    messages = said(run)
    assert len(messages) == 1 and "3.weight" in messages[0] and "track() again" in messages[0]


def test_ids_that_fit_no_layer() -> None:
    """Eight ids for eight pairs, the model run on sixteen rows."""
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer)
    messages = said(lambda: train(tracker, model, optimizer, 20, ids=IDS[:3]))
    assert sum("fit no layer" in m for m in messages) == 1
    assert any("torch.cat([ids, ids])" in m for m in messages)
    report = tracker.report()
    assert not report.valid and report.reason is not None and "fitted no layer" in report.reason
    messages = said(lambda: train(tracker, model, optimizer, 3))
    assert tracker.report().valid and tracker.coverage().fraction == 1, tracker.coverage()


def test_reports_that_are_all_invalid() -> None:
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer, verify=False)

    def run() -> None:
        for _ in range(30):
            with tracker.batch(IDS):
                model(torch.randn(6, 4)).square().mean().backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 1e-5)
            optimizer.step()
            optimizer.zero_grad()
            tracker.report()

    messages = said(run)
    assert len(messages) == 1 and "10 reports" in messages[0] and "clipped by value" in messages[0]


def test_many_parameters_of_one_cause_are_one_warning() -> None:
    """As the norms of a Llama are."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    model = nn.Sequential(nn.Linear(4, 6), *(Norm() for _ in range(50)), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer)
    messages = said(lambda: train(tracker, model, optimizer, 5))
    assert len(messages) == 1 and "and 42 more" in messages[0] and len(messages[0]) < 400, messages


def test_without_losses_the_report_says_what_is_missed() -> None:
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer)
    train(tracker, model, optimizer, 1)
    assert "losses" in str(tracker.report())
    with tracker.batch(IDS) as b:
        loss = model(torch.randn(6, 4)).square().mean(1)
        b.losses(loss)
        loss.mean().backward()
    optimizer.step()
    assert "losses" not in str(tracker.report())


def test_a_loss_that_is_not_finite_names_its_task() -> None:
    model, optimizer = make()
    tracker = tg.track(model, ["a", "b"], optimizer)
    with tracker.batch(IDS) as b:
        loss = model(torch.randn(6, 4)).square().mean(1)
        loss = loss * torch.tensor([1.0, 1.0, float("nan"), 1.0, 1.0, 1.0])
        b.losses(loss)
        loss.mean().backward()
    optimizer.step()
    report = tracker.report()
    assert not report.valid and report.reason is not None
    assert "gradients are not finite" in report.reason and "loss of b is not finite" in report.reason


def test_padding_free_rows() -> None:
    """Ids (1, S): the number of examples is not known, and policies count tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer)

    def run() -> None:
        for _ in range(5):
            ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0]])
            with tracker.batch(ids) as b:
                index = torch.randint(9, (1, 8))
                loss = nn.functional.cross_entropy(model(index).transpose(1, 2), index, reduction="none")
                b.losses(loss)
                loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    messages = said(run)
    assert len(messages) == 1 and "not verified" in messages[0]
    report = tracker.report()
    assert report.valid and report.examples.isnan().all() and report.tokens.tolist() == [4, 4]
    for policy in (tg.policies.OverwriteBoost(), tg.policies.PiKE(1.0, 1.0), tg.policies.ADO()):
        sampler = tg.AdaptiveBatchSampler({"a": 90, "b": 10}, 10, policy, horizon=100, update_every=1, delay=0)
        next(iter(sampler))
        sampler.update(report)
        weights = sampler.weights
        assert all(w == w for w in (weights.values() if isinstance(weights, dict) else weights))


def test_a_task_column_that_is_lost_is_told_once() -> None:
    """Ids that are all -1: every report is valid, and says nothing of any task."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    tracker = tg.track(model, ["a", "b"], optimizer, verify=False)
    with pytest.warns(UserWarning, match=r"no row of the last 10 steps belongs to a task.*lost on the way") as said:
        for step in range(40):
            ids = torch.full((8,), -1)
            ids[0] = 0 if step == 5 else -1  # one is enough to begin anew
            with tracker.batch(ids):
                model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert not said.list or step >= 15
    assert len(said) == 1
