"""The adaptive policies on reports of a real tracker: alone, inside guards, and resumed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg
from taskgrad.report import StepReport
from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.policies import ADO, DoGE, Exp3, OverwriteBoost, PiKE, ShearedLlama, Shuffled
from tests.sampling.policies.helpers import softmax, state

TASKS = ("text", "code", "legal")
TASK = torch.arange(3).repeat_interleave(torch.tensor([500, 40, 10]))
STEPS = 40
POLICIES = [
    ADO(start=10, fit_every=10, skip=0),
    DoGE(),
    Exp3("paper"),
    Exp3("released"),
    OverwriteBoost(),
    PiKE(0.1, 0.01, every=3),
    ShearedLlama({"text": 0.5, "code": 0.6, "legal": 0.1}),
    Shuffled(PiKE(0.1, 0.01, every=3)),
]


@pytest.fixture(scope="module", params=["sketch", "exact"])
def reports(request: pytest.FixtureRequest) -> list[StepReport]:
    """Of a short training on batches in which some tasks are missing."""
    torch.manual_seed(0)
    x, y = torch.randn(550, 6), torch.randn(550, 1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tracker = tg.track(model, TASKS, optimizer, mode=request.param)
    out = []
    for batch in AdaptiveBatchSampler(TASK, 16, ADO(), num_batches=STEPS):
        ids = TASK[batch]
        with tracker.batch(ids) as b:
            losses = (model(x[batch]) - y[batch]).square().squeeze(1)
            b.losses(losses)
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(tracker.report())
    assert any(int(r.examples.min()) == 0 for r in out) and all(r.valid for r in out)
    return out


def build(policy: Any, **options: Any) -> AdaptiveBatchSampler:
    options = {"batch_size": 16, "tasks": TASKS, "num_batches": STEPS, "update_every": 2, "delay": 0, **options}
    return AdaptiveBatchSampler(TASK, policy=policy, **options)


def follow(sampler: AdaptiveBatchSampler, reports: list[StepReport]) -> None:
    for given, _ in zip(reports, sampler, strict=False):
        if given.step % 7 == 0:
            sampler.observe({"text": 1.0 / given.step, "legal": 0.5})
        sampler.update(given, lr=0.1)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_as_published_and_inside_guards(policy: Any, reports: list[StepReport]) -> None:
    free = build(policy)
    follow(free, reports)
    assert len(free.ledger) > 3 or isinstance(policy, OverwriteBoost)
    guarded = build(policy, budget=0.15, min_weight=0.01, max_change=1.5)
    follow(guarded, reports)
    mixes = np.array([entry.weights for entry in guarded.ledger]) / 2**40
    natural = np.array([500, 40, 10]) / 550
    assert (0.5 * np.abs(mixes - natural).sum(1) <= 0.15 + 1e-9).all()
    assert (mixes >= 0.01 - 1e-9).all()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_resumed_from_json_the_ledger_is_the_same(policy: Any, reports: list[StepReport]) -> None:
    straight = build(policy)
    follow(straight, reports)
    sampler = build(policy)
    follow(sampler, reports[:17])
    resumed = build(policy)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict(), allow_nan=False)))
    follow(resumed, reports[17:])
    assert resumed.ledger.digest() == straight.ledger.digest()


@pytest.mark.parametrize("corrected", [False, True])
def test_doge_reads_mean_gradients_off_the_report(corrected: bool) -> None:
    """With rows of no task, weights in the loss and factors on it, against autograd."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double() + 1
    ids = torch.tensor([0] * 18 + [1] * 7 + [2] * 2 + [-1] * 3)
    weight = torch.rand(30).double() + 0.5

    def rows() -> Tensor:
        return (model(x) - y).square().sum(1) * weight

    means = []
    for t in range(3):
        loss = rows()[ids == t].sum() / weight[ids == t].sum()
        means.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).numpy())
    factor = torch.tensor([2.0, 0.5, 0.1, 1.0]).double() if corrected else torch.ones(4).double()
    tracker = tg.track(model, TASKS, mode="exact")
    with tracker.batch(ids, weight=weight, loss_weight=factor[:3]):
        ((factor[ids] * rows()).sum() / weight.sum()).backward()
    tracker.step()
    got = DoGE(mu=1.0, max_score=100.0, max_grad_norm=1e9).weights(tracker.report(), state(tasks=TASKS, lr=0.3))
    size = np.mean([np.linalg.norm(g) for g in means])
    aligned = [sum(float(g @ other) for other in means) - float(g @ g) for g in means]
    assert got == pytest.approx(softmax(0.3 * np.maximum(aligned, 0) / (size + 1e-6)))
    assert np.ptp(got) > 0.01
