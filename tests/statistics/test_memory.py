"""The memory, the effects and the probe, against what they claim to predict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg


def _regression(rows: int = 24) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double()
    model[0].requires_grad_(False)  # then the loss is a quadratic in what trains
    return model, torch.randn(rows, 5).double(), torch.randn(rows, 2).double(), torch.arange(rows) % 2


def _task_losses(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, tasks: int = 2) -> Tensor:
    loss = (model(x) - y).square().sum(1)
    return torch.stack([loss[ids == t].mean() for t in range(tasks)])


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_update_effect_is_the_loss_change_up_to_the_curvature(mode: str) -> None:
    """On a quadratic, L(θ_k) − L(θ_j) = e_t − ½ Δθᵀ H Δθ exactly."""
    model, x, y, ids = _regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tracker = tg.track(model, ["a", "b"], optimizer, mode=mode)
    losses, thetas = [], []
    for _ in range(2):
        losses.append(_task_losses(model, x, y, ids).detach())
        thetas.append(torch.cat([p.detach().flatten() for p in model[1].parameters()]))
        with tracker.batch(ids):
            (model(x) - y).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = tracker.report()

    def loss_at(flat: Tensor, t: int) -> Tensor:
        out = model[0](x[ids == t]) @ flat[:6].view(2, 3).T + flat[6:]
        return (out - y[ids == t]).square().sum(1).mean()

    step = thetas[1] - thetas[0]
    for t in range(2):
        hessian = torch.autograd.functional.hessian(lambda f, t=t: loss_at(f, t), thetas[1])
        expected = report.update_effect[t] - 0.5 * step @ hessian @ step
        torch.testing.assert_close(losses[1][t] - losses[0][t], expected, rtol=0, atol=1e-10)
    # both tasks were in every batch: everything since their own step is nothing
    torch.testing.assert_close(report.others_effect, torch.zeros(2).double(), rtol=0, atol=1e-12)
    # with the previous gradient as memory (decay 0 would be it exactly) the curvature is ½ Δθᵀ H Δθ
    assert (report.curvature > 0).all()


def test_own_and_others_effect_split_the_path() -> None:
    """Task b sits out two steps: what its own step did and what the others did since, each against autograd."""
    model, x, y, _ = _regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    tracker = tg.track(model, ["a", "b"], optimizer, mode="exact")
    thetas = []
    for has_b in (True, False, False, True):
        ids = torch.zeros(24, dtype=torch.int64)
        if has_b:
            ids[:7] = 1
        thetas.append(torch.cat([p.detach().flatten() for p in model[1].parameters()]))
        with tracker.batch(ids):
            (model(x) - y).square().sum(1).mean().backward()
        grads = _task_gradient(model, x[:7], y[:7]) if has_b else None
        optimizer.step()
        optimizer.zero_grad()
    report = tracker.report()
    assert grads is not None
    torch.testing.assert_close(report.own_effect[1], grads @ (thetas[1] - thetas[0]))
    torch.testing.assert_close(report.others_effect[1], grads @ (thetas[3] - thetas[1]))
    assert report.steps_since_seen.tolist() == [0, 0]


def _task_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    twin = copy.deepcopy(model)
    twin.zero_grad()
    (twin(x) - y).square().sum(1).mean().backward()
    return torch.cat([p.grad.flatten() for p in twin[1].parameters()])


def test_signal_of_redrawn_labels_is_zero_within_its_error() -> None:
    """Parameters at rest, labels coin flips: the gradients are large and say nothing; a learnable task's signal is not
    0."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(20, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = tg.track(model, ["noise", "learnable"], optimizer, mode="exact", memory_decay=0.9, verify=False)
    truth = torch.randn(20, generator=generator).double()
    signals, norms = [], []
    for _ in range(400):
        x = torch.randn(16, 20, generator=generator).double()
        y = (x @ truth > 0).double()
        y[:8] = torch.randint(0, 2, (8,), generator=generator).double()
        with tracker.batch(torch.arange(16) // 8):
            nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
        optimizer.step()
        optimizer.zero_grad()
        report = tracker.report()
        signals.append(report.signal)
        norms.append(report.norm)
    signal = torch.stack(signals[20:])
    mean, error = signal.mean(0), signal.std(0) / len(signal) ** 0.5
    # the memory correlates successive signals over 1 / (1 - decay) = 10 steps; its square root widens the error at most
    assert abs(mean[0]) < 2 * 10**0.5 * error[0]
    assert torch.stack(norms)[:, 0].square().mean() > 20 * abs(mean[0])
    assert mean[1] > 10 * error[1]


def test_effect_of_a_noise_task_under_adamw_is_unbiased_where_the_memory_is_not() -> None:
    """Σ e_t follows the measured loss; Σ ⟨m_t, Δθ⟩ believes that the noise task is being learned."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tracker = tg.track(model, ["real", "noise"], optimizer, mode="exact", memory_decay=0.9, verify=False)
    truth = torch.randn(12, 4, generator=generator).double()
    pool = torch.randn(512, 12, generator=generator).double()

    def noise_loss() -> Tensor:  # the expectation over labels that are redrawn at every presentation
        return -model(pool).log_softmax(1).mean()

    before = None
    effects, predicted = [], []
    ids = (torch.arange(32) >= 24).long()
    for step in range(720):
        if step == 20:
            before = noise_loss().detach()
        x = pool[torch.randint(0, 512, (32,), generator=generator)]
        y = (x @ truth).argmax(1)
        y[24:] = torch.randint(0, 4, (8,), generator=generator)
        with tracker.batch(ids):
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        report = tracker.report()
        if step > 20:
            effects.append(report.update_effect[1])
        if step >= 20:
            predicted.append(report.predicted_effect[1])
    measured = noise_loss().detach() - before
    effect = torch.stack(effects)
    error = effect.std() * len(effect) ** 0.5
    assert abs(effect.sum() - measured) < 2 * error
    assert torch.stack(predicted).sum() < measured - 4 * error


def test_probe_measures_a_step() -> None:
    model, x, y, ids = _regression()
    model.insert(1, nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tracker = tg.track(model, ["a", "b"], optimizer)
    probe = tracker.probe(lambda: _task_losses(model.eval(), x, y, ids))
    with pytest.raises(RuntimeError, match=r"optimizer\.step"):
        _ = probe.change
    before = _task_losses(model.eval(), x, y, ids)
    with tracker.batch(ids):
        (model(x) - y).square().sum(1).mean().backward()
    optimizer.step()
    torch.testing.assert_close(probe.before, before)
    torch.testing.assert_close(probe.change, _task_losses(model.eval(), x, y, ids) - before)
    assert tracker.report().step == 1
