"""One step of gradient descent by hand, with every task of the tracker in the batch."""

from __future__ import annotations

import torch

import taskgrad as tg


def one_step(tracker: tg.TaskGradTracker, seed: int = 0, scale: float = 1.0) -> tg.StepReport:
    generator = torch.Generator().manual_seed(seed)
    count = len(tracker.tasks)
    first = next(m for m in tracker.model.modules() if isinstance(m, torch.nn.Linear))
    x = scale * torch.randn(2 * count, first.in_features, generator=generator)
    tracker.model.zero_grad()
    with tracker.batch(torch.arange(2 * count) % count) as batch:
        losses = tracker.model(x).square().flatten(1).mean(1)
        batch.losses(losses)
        losses.mean().backward()
    with torch.no_grad():
        for p in tracker.model.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
    tracker.step()
    return tracker.report()
