"""The loop of the README: tracker, default policy, DataLoader with workers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.tracking.track import track

TASKS = ["text", "code", "legal"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_usual_loop(workers: int) -> None:
    torch.manual_seed(0)
    task = torch.arange(3).repeat_interleave(torch.tensor([500, 40, 10]))
    data = torch.utils.data.TensorDataset(torch.randn(550, 6), torch.randn(550, 1), task)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tracker = track(model, tasks=TASKS, optimizer=optimizer)
    sampler = AdaptiveBatchSampler(task, batch_size=16, dataset=data)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, num_workers=workers)
    for _ in range(2):
        for x, y, ids in loader:
            assert (ids.diff() >= 0).all()
            with tracker.batch(ids):
                loss = (model(x) - y).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sampler.update(tracker.report())
    tracker.remove()
    assert sampler.tasks == tuple(TASKS)
    assert sampler.consumed == 2 * len(sampler) == 70
    assert sampler.realised().examples.sum() == 70 * 16
