"""The windowed ratios: overwriting and what was kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import taskgrad as tg
from taskgrad.statistics.windows import Moments, Overwriting


@pytest.mark.slow
def test_overwrite_ratio_of_opposed_targets() -> None:
    """One weight, two tasks that want +1 and −1, 9 to 1: ρ begins at the ratio of their shares and ends at 1 for
    both."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    tracker = tg.track(model, ["frequent", "rare"], optimizer, mode="exact", verify=False)
    ids = (torch.arange(10) == 0).long()
    target = torch.where(ids == 0, 1.0, -1.0).double()[:, None]
    first = None
    for step in range(1500):
        with tracker.batch(ids):
            (model(torch.ones(10, 1).double()) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            first = tracker.report().overwrite
    assert first is not None
    torch.testing.assert_close(first, torch.tensor([1 / 9, 9.0]).double(), rtol=0.25, atol=0)
    torch.testing.assert_close(tracker.report().overwrite, torch.ones(2).double(), rtol=0.02, atol=0)


def test_overwrite_is_unknown_in_noise() -> None:
    """Where the own pull is not clear of its standard error, ρ is NaN rather than a ratio of noises."""
    generator = np.random.default_rng(0)
    windows = Moments((1,), 200)
    for _ in range(600):
        x, y = generator.standard_normal((2, 1))
        windows.add(x, y, np.array([True]))
    assert np.isnan(windows.ratio()[0]).all()


def test_ratio_and_its_standard_error() -> None:
    """The delta-method error matches the spread of the ratio over repetitions."""
    generator = np.random.default_rng(1)
    windows = Moments((400,), 100)
    for _ in range(400):
        y = 2 + generator.standard_normal(400)
        x = 0.5 * y + 0.5 * generator.standard_normal(400)
        windows.add(x, y, np.ones(400, dtype=bool))
    ratio, error = windows.ratio()
    assert ratio.mean() == pytest.approx(0.5, abs=0.01)
    assert error.mean() == pytest.approx(float(ratio.std()), rel=0.15)


def test_a_window_stands_still_where_masked_and_ignores_nan() -> None:
    windows = Moments((2,), 10)
    nan = np.array([1.0, np.nan])
    windows.add(nan, nan, np.array([True, False]))
    assert windows.weight.tolist() == [1.0, 0.0]
    assert windows.mean[0][0] == 1.0


@pytest.mark.slow
def test_retention_tells_what_the_others_undid() -> None:
    """A rare task that moves a shared weight up, pulled back entirely before it is seen again, keeps nothing."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tracker = tg.track(model, ["frequent", "rare"], optimizer, mode="exact", verify=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(800):
        ids = torch.full((4,), int(step % 8 == 0))
        noise = 0.05 * torch.randn(4, 1, generator=generator).double()
        with tracker.batch(ids):
            (model(torch.ones(4, 1).double()) - ids[:, None] + noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = tracker.report()
    assert report.retention[1] == pytest.approx(0.0, abs=0.25)
    assert report.gained[1] > 0
    assert report.undone[1] > 0


def test_noise_around_zero_is_not_overwriting() -> None:
    """Clipped only after averaging: clipping every step would read ρ = E max(0, x) ≈ 0.4 here."""
    generator = np.random.default_rng(2)
    windows = Overwriting(1)
    nan = np.array([np.nan])
    for _ in range(600):
        windows.add(np.array([[1.0, generator.standard_normal()]]), nan, nan, nan)
    found = windows.read()
    assert found["overwrite"].item() < 0.2
    assert abs(found["pull"].item()) < 3 * found["overwrite_se"].item()
