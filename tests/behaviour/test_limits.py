"""What taskgrad cannot split: it says so, and what to do instead works."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg
from tests.utils.oracle import separate_backwards
from tests.utils.steps import Expected, assert_report

IDS = torch.tensor([0, 1, 1, 0, -1, 1, 2])
TASKS = ["a", "b", "c"]


class Heads(nn.Module):
    """A head for each task, called on the rows of the task."""

    def __init__(self, declared: bool) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in TASKS)
        self.declared = declared
        self.rows: Any = lambda ids: contextlib.nullcontext()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        out = x.new_zeros(len(x), 2)
        for task, head in enumerate(self.heads):
            mine = ids == task
            with self.rows(ids[mine]) if self.declared else contextlib.nullcontext():
                out = out.masked_scatter(mine[:, None], head(hidden[mine]))
        return out


def test_heads_on_the_rows_of_their_task_are_declared_with_rows() -> None:
    torch.manual_seed(0)
    model = Heads(declared=True).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    oracle = separate_backwards(model, ((x, IDS), {}), lambda out: out.square().sum(1), IDS, 3)
    tracker = tg.track(model, TASKS, mode="exact")
    model.rows = tracker.rows
    for ids in (IDS, IDS[IDS != 2]):  # a head without rows
        with tracker.batch(ids):
            model(x[: len(ids)], ids).square().sum(1).mean().backward()
        tracker.step()
        if ids is IDS:
            assert tracker.coverage().fraction == 1, tracker.coverage()
            assert_report(tracker.report(), Expected.of(oracle, oracle, IDS, None), 1e-9)
        assert tracker.report().valid
        model.zero_grad()


def test_heads_that_are_not_declared_are_named() -> None:
    model = Heads(declared=False)
    tracker = tg.track(model, TASKS)
    with pytest.warns(UserWarning, match=r"heads\.0\.weight"):
        with tracker.batch(IDS):
            model(torch.randn(7, 4), IDS).square().sum(1).mean().backward()
        tracker.step()
    out = tracker.coverage().unattributed
    assert {name for name in out if name.startswith("heads")} == set(out)
    assert all("does not start with the shape of the ids" in reason for reason in out.values())
    assert tracker.report().valid


def test_several_losses_of_one_example_are_refused() -> None:
    """A row has one id. What one would write first: a loss for each task, ids as a mask of tasks."""
    model = nn.Linear(4, 3)
    tracker = tg.track(model, TASKS)
    with tracker.batch(IDS) as b:
        per_task = model(torch.randn(7, 4)).square()
        with pytest.raises(ValueError, match="several losses per row"):
            b.losses(per_task)
    mask = torch.randint(0, 2, (7, 3))
    with pytest.warns(UserWarning, match="fit no layer"):
        with tracker.batch(mask):
            model(torch.randn(7, 4)).square().mean().backward()
        tracker.step()
    assert not tracker.report().valid


def test_rows_that_are_declared_are_what_the_ids_fit() -> None:
    """Another layer on other rows is left out by name: the ids are not to blame."""

    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 2)
            self.rows: Any = None

        def forward(self, x: Tensor) -> Tensor:
            order = torch.arange(len(x)).flip(0)
            with self.rows(IDS[order]):
                inner = self.inner(x[order])
            return self.outer(inner.repeat_interleave(2, 0))

    model = Gathered()
    tracker = tg.track(model, TASKS)
    model.rows = tracker.rows
    with pytest.warns(UserWarning, match=r"outer\.weight"):
        with tracker.batch(IDS):
            model(torch.randn(7, 4)).square().mean().backward()
        tracker.step()
    assert tracker.report().valid and set(tracker.coverage().attributed) == {"inner.weight", "inner.bias"}
