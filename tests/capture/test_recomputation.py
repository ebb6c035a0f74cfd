"""Checkpointed regions run twice: what the tracker decides in between, and batches that wait."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from tests.utils.architectures import squared_error
from tests.utils.oracle import separate_backwards
from tests.utils.steps import (
    TASKS,
    Case,
    Expected,
    assert_report,
    relative_error,
    run_batch,
)

IDS = torch.tensor([2, 0, -1, 1, 0, 2])


def case_of(model: nn.Module, *args: Tensor, ids: Tensor = IDS) -> Case:
    args = args or (torch.randn(len(ids), 3, dtype=torch.float64),)
    return Case(model.double(), args, {}, lambda out: squared_error(out, ids.ndim), ids, None)


class Regions(nn.Module):
    """``body`` inside a checkpointed region; what comes after may change the tracker's mind about its layers."""

    def __init__(self, reentrant: bool = False, late: str = "none") -> None:
        super().__init__()
        self.reentrant, self.late = reentrant, late
        self.stem, self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        if late == "tied":
            self.head.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(checkpoint(self.body, x, use_reentrant=self.reentrant))
        if self.late == "shared":
            return self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.late == "tied":
            return self.head(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(x)


@pytest.mark.parametrize("inside", [True, False], ids=["backward_inside", "backward_outside"])
@pytest.mark.parametrize("late", ["shared", "tied"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_layer_dropped_between_forward_and_recomputation(late: str, verify: bool, inside: bool) -> None:
    case = case_of(Regions(late=late), torch.randn(6, 2, 3, dtype=torch.float64))
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact", verify=verify)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with tracker.batch(IDS):
            loss = case.loss()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        tracker.step()
    for name, p in case.model.named_parameters():
        if name in oracle:
            assert p.grad is None or relative_error(p.grad, oracle[name].sum(0), oracle[name]) <= 1e-12, name
    assert "body.weight" in tracker.coverage().unattributed
    assert_report(tracker.report(), Expected.of(oracle, tracker.coverage().attributed, IDS, None), 1e-9)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_reentrant_checkpointing_is_right_or_left_out() -> None:
    case = case_of(Regions(reentrant=True), torch.randn(6, 2, 3, dtype=torch.float64))
    twin = case_of(Regions(), *case.args)
    twin.model.load_state_dict(case.model.state_dict())
    oracle = separate_backwards(*twin.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    run_batch(tracker, case)
    tracker.step()
    for name, p in case.model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, oracle[name].sum(0), oracle[name]) <= 1e-12, name
    assert_report(tracker.report(), Expected.of(oracle, tracker.coverage().attributed, IDS, None), 1e-9)


def test_a_batch_whose_backward_never_came_does_not_block_the_next() -> None:
    """``if not loss.isfinite(): continue`` under checkpointing."""
    case = case_of(Regions(), torch.randn(6, 2, 3, dtype=torch.float64))
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    for _ in range(2):
        with tracker.batch(IDS.roll(1)):
            loss = case.loss()
        del loss
    run_batch(tracker, case)
    tracker.step()
    assert tracker.report().examples.tolist() == [2, 1, 2]
    assert_report(tracker.report(), Expected.of(oracle, oracle, IDS, None), 1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_with_checkpointing() -> None:
    case = case_of(Regions(), torch.randn(6, 2, 3, dtype=torch.float64))
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    torch.compiler.reset()
    compiled = torch.compile(case.model, backend="aot_eager", fullgraph=True)
    with tracker.batch(IDS):
        case.row_loss(compiled(*case.args)).mean().backward()
    tracker.step()
    torch.compiler.reset()
    assert_report(tracker.report(), Expected.of(oracle, oracle, IDS, None), 1e-9)
    assert set(tracker.coverage().attributed) == set(oracle)
