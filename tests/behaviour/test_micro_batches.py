"""A step of several micro-batches: means of means, and sums over a count of the whole step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg

TASKS = ["a", "b", "c"]


def make() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor, Tensor]]]:
    """A model of tokens, and micro-batches of 20 and 200 counted tokens: inputs, ids and counts of every row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    batches = []
    for rows, length in ((4, 5), (8, 25)):
        x = torch.randn(rows, length, 5, dtype=torch.float64)
        ids = torch.arange(rows) % 4 - 1
        counts = torch.randint(1, length + 1, (rows,))
        batches.append((x, ids, counts))
    return model, batches


def token_losses(model: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    """[B, S], 0 where a token is not counted."""
    keep = torch.arange(x.shape[1]) < counts[:, None]
    return model(x).square().mean(-1) * keep


def mean_gradient(model: nn.Module, losses: Tensor) -> Tensor:
    grads = torch.autograd.grad(losses, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("per_token", [False, True])
def test_every_micro_batch_is_a_mean_of_its_own(per_token: bool) -> None:
    """The default loop: the mean over each micro-batch's tokens, divided by their number."""
    model, batches = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = tg.track(model, TASKS, optimizer, mode="exact")
    for x, ids, counts in batches:
        weight = (torch.arange(x.shape[1]) < counts[:, None]).double() if per_token else counts
        with tracker.batch(ids[:, None].expand(x.shape[:2]).contiguous() if per_token else ids, weight) as b:
            losses = token_losses(model, x, counts)
            b.losses(losses if per_token else losses.sum(1) / counts)
            (losses.sum() / counts.sum() / len(batches)).backward()
    optimizer.step()
    report = tracker.report()
    assert report.valid, report.reason
    for t in range(3):
        total, mass = torch.zeros((), dtype=torch.float64), 0.0
        for x, ids, counts in batches:
            mine = ids == t
            total = total + token_losses(model, x[mine], counts[mine]).sum() / counts.sum()
            mass += int(counts[mine].sum()) / int(counts.sum())
        want = mean_gradient(model, total / mass)
        torch.testing.assert_close(report.norm[t], want.norm(), rtol=1e-9, atol=0)
        assert report.loss is not None
        torch.testing.assert_close(report.loss[t], (total / mass).detach(), rtol=1e-9, atol=0)
        assert report.tokens[t] == sum(counts[ids == t].sum() for _, ids, counts in batches)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_count_of_the_whole_step(as_tensor: bool) -> None:
    """transformers' Trainer: the sum over every micro-batch's tokens, divided by the tokens of all."""
    model, batches = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = tg.track(model, TASKS, optimizer, mode="exact")
    count = sum(int(counts.sum()) for _, _, counts in batches)
    for x, ids, counts in batches:
        total = torch.tensor(count) if as_tensor else count
        with tracker.batch(ids, counts, weight_total=total) as b:
            losses = token_losses(model, x, counts)
            b.losses(losses.sum(1) / counts)
            (losses.sum() / count).backward()
    optimizer.step()
    report = tracker.report()
    assert report.valid, report.reason
    for t in range(3):
        pooled = torch.stack([token_losses(model, x[ids == t], c[ids == t]).sum() for x, ids, c in batches]).sum()
        want = pooled / sum(c[ids == t].sum() for _, ids, c in batches)
        torch.testing.assert_close(report.norm[t], mean_gradient(model, want).norm(), rtol=1e-9, atol=0)
        assert report.loss is not None
        torch.testing.assert_close(report.loss[t], want.detach(), rtol=1e-9, atol=0)


def test_the_factor_of_a_loss_is_divided_out_in_every_micro_batch() -> None:
    model, batches = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reports = []
    for factor in (None, torch.tensor([0.5, 2.0, 3.0]).double()):
        tracker = tg.track(model, TASKS, optimizer, mode="exact")
        for x, ids, counts in batches:
            with tracker.batch(ids, counts, loss_weight=factor):
                rows = token_losses(model, x, counts).sum(1)
                if factor is not None:
                    rows = rows * torch.where(ids < 0, 1.0, factor[ids])
                (rows.sum() / counts.sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(tracker.report())
        tracker.remove()
    torch.testing.assert_close(reports[0].norm, reports[1].norm, rtol=1e-9, atol=0)
    assert not torch.allclose(reports[0].gram, reports[1].gram)


def test_rows_that_weigh_nothing() -> None:
    """A micro-batch whose tokens are all padding, and a task whose rows are."""
    model, batches = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = tg.track(model, TASKS, optimizer, mode="exact")
    x, ids, counts = batches[0]
    for c in (torch.zeros_like(counts), torch.where(ids == 1, 0, counts)):
        with tracker.batch(ids, c):
            (token_losses(model, x, c).sum() / c.sum().clamp(min=1) / 2).backward()
    optimizer.step()
    report = tracker.report()
    assert report.valid and report.tokens[1] == 0 and report.norm[1].isnan()
    assert torch.isfinite(report.norm[[0, 2]]).all()


@pytest.mark.parametrize(
    ("total", "error", "message"),
    [
        (0, ValueError, "finite and positive, got 0"),
        (-3.0, ValueError, "finite and positive"),
        (float("nan"), ValueError, "finite and positive"),
        (float("inf"), ValueError, "finite and positive"),
        (torch.zeros(2), ValueError, r"one number, got a tensor of shape \(2,\)"),
        ("7", TypeError, "a number or a scalar tensor, got str"),
        (True, TypeError, "a number or a scalar tensor, got bool"),
    ],
)
def test_a_wrong_total(total: object, error: type[Exception], message: str) -> None:
    model, batches = make()
    tracker = tg.track(model, TASKS)
    with pytest.raises(error, match=message):
        tracker.batch(batches[0][1], weight_total=total)  # type: ignore[arg-type]
