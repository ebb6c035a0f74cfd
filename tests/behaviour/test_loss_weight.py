"""Boost the sampling, keep the objective: factors on the loss, against float64 autograd."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg
from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.policies import Static

TASKS = ["a", "b", "c"]
IDS = torch.tensor([2, 0, 0, 1, -1, 0, 2, 0, 1, -1, 0, 0])
FACTOR = torch.tensor([1.8, 0.25, 0.1], dtype=torch.float64)


def make() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    return model, torch.randn(12, 5).double(), torch.randn(12, 2).double()


def row_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(1)


def factor_of_rows(ids: Tensor, factor: Tensor) -> Tensor:
    return torch.cat([factor, torch.ones(1).double()])[ids]  # -1, rest, is the last entry


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack(a) @ torch.stack(b).T


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_factor_is_divided_out_of_the_task_and_stays_in_the_step(weighted: bool) -> None:
    model, x, y = make()
    weight = torch.rand(12).double() + 0.5 if weighted else torch.ones(12).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tracker = tg.track(model, TASKS, optimizer, mode="exact", memory_decay=0.0)
    memory: list[Tensor] = []
    for step in range(3):
        twin = copy.deepcopy(model)
        rows = weight * row_losses(twin, x, y)
        task_losses = [rows[t == IDS].sum() / weight[t == IDS].sum() for t in range(3)]
        untouched = [gradient(twin, loss) for loss in task_losses]
        flowing = [gradient(twin, FACTOR[t] * rows[t == IDS].sum() / weight.sum()) for t in range(3)]

        with tracker.batch(IDS, weight=weight if weighted else None, loss_weight=FACTOR) as b:
            losses = row_losses(model, x, y)
            b.losses(losses)
            ((factor_of_rows(IDS, FACTOR) * weight * losses).sum() / weight.sum()).backward()
        total = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        report = tracker.report()

        close(report.norm, torch.stack([g.norm() for g in untouched]))
        close(report.gram, products(flowing, flowing))
        assert report.loss is not None
        close(report.loss, torch.stack(task_losses))
        close(report.tokens, torch.stack([weight[t == IDS].sum() for t in range(3)]))
        close(torch.cat([g.sum(0).flatten() for g in tracker.task_gradients().values()]), total)
        if step:  # without decay the memory is the last step's mean gradient
            close(report.signal, products(memory, untouched).diagonal())
            close(report.memory_dot[:, :3], products(memory, flowing))
        memory = untouched


def test_what_is_said_of_a_task_is_as_if_the_loss_had_not_been_touched() -> None:
    """The same path of the parameters with and without factors."""

    class Wander(torch.optim.Optimizer):
        """Takes the same steps whatever the gradients are."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {})
            self.generator = torch.Generator().manual_seed(0)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=self.generator)

    reports = []
    for factor in (None, FACTOR):
        model, x, y = make()
        optimizer = Wander(model.parameters())
        tracker = tg.track(model, TASKS, optimizer, sketch_dim=32, verify=False)
        rows = torch.ones(12).double() if factor is None else factor_of_rows(IDS, factor)
        for step in range(4):
            with tracker.batch(IDS, loss_weight=factor):
                (rows * row_losses(model, x + step, y)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        reports.append(tracker.report())
    for name in ("norm", "signal", "own_effect", "curvature", "predicted_effect"):
        assert getattr(reports[0], name).abs().min() > 1e-6
        close(getattr(reports[1], name), getattr(reports[0], name))
    assert not torch.allclose(reports[0].gram, reports[1].gram)


def test_micro_batches_with_factors_of_their_own() -> None:
    model, x, y = make()
    factors = [torch.tensor([0.5, 2.0, 3.0]).double(), torch.tensor([0.7, 1.0, 0.2]).double()]
    halves = [slice(0, 6), slice(6, 12)]
    twin = copy.deepcopy(model)
    losses = row_losses(twin, x, y)
    scaled = torch.cat([factor_of_rows(IDS[h], f) for h, f in zip(halves, factors, strict=True)])
    want = []
    for t in range(3):  # the mean over the task's rows, each as heavy as its factor
        rows = t == IDS
        want.append(gradient(twin, (scaled * losses)[rows].sum() / scaled[rows].sum()).norm())

    tracker = tg.track(model, TASKS, mode="exact")
    for half, factor in zip(halves, factors, strict=True):
        with tracker.batch(IDS[half], loss_weight=factor):
            ((factor_of_rows(IDS[half], factor) * row_losses(model, x[half], y[half])).mean() / 2).backward()
    tracker.step()
    close(tracker.report().norm, torch.stack(want))


@pytest.mark.parametrize(
    "factor, message",
    [
        ([1.0, 1.0], r"one factor per task, shape \(3,\), got \(2,\)"),
        (torch.ones(12), r"shape \(3,\), got \(12,\); the rows' losses are multiplied with loss_weight\[ids\] outside"),
        (2.0, r"got \(\)"),
        ([1.0, 0.0, 1.0], r"finite and positive, got \[1.0, 0.0, 1.0\]"),
        ([1.0, float("nan"), 1.0], "finite and positive"),
        ([1.0, float("inf"), 1.0], "finite and positive"),
    ],
)
def test_wrong_factors(factor: Any, message: str) -> None:
    tracker = tg.track(make()[0], TASKS)
    with pytest.raises(ValueError, match=f"loss_weight must .*{message}"):
        tracker.batch(IDS, loss_weight=factor)


def test_with_a_sampler_the_expected_gradient_is_that_of_the_natural_mix() -> None:
    """One step's gradient depends on the examples drawn, so: a loss that is the same for all examples of a task."""
    sizes = [900, 80, 20]
    task = np.repeat(np.arange(3), sizes)
    sampler = AdaptiveBatchSampler(task, 25, Static([0.4, 0.35, 0.25]), tasks=TASKS, num_batches=200)
    model = nn.Linear(3, 1, bias=False).double()
    tracker = tg.track(model, TASKS, mode="exact", verify=False)
    mean = torch.zeros(1, 3).double()
    for k, batch in enumerate(sampler):
        ids = torch.from_numpy(task[batch])
        factor = torch.from_numpy(sampler.loss_weight(k))
        with tracker.batch(ids, loss_weight=factor):
            (factor[ids] * model(torch.eye(3).double()[ids]).squeeze(1)).mean().backward()
        tracker.step()
        assert model.weight.grad is not None
        mean += model.weight.grad / 200
        model.zero_grad()
        report = tracker.report()
        seen = report.examples > 0
        close(report.norm[seen], torch.ones(int(seen.sum())).double())
    torch.testing.assert_close(mean[0], torch.tensor([0.9, 0.08, 0.02]).double(), rtol=2e-3, atol=0)
