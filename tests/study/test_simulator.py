"""The policies' simulator gives the numbers that a tracker gives of the same training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from benchmarks.policies.simulator import COLUMNS, Simulator

TASKS = ("a", "b", "c", "d", "e")
INPUTS, WIDTH, SCALE, BATCH = 6, 8, 3.0, 24


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("adam", [False, True])
def test_a_run_is_that_of_a_tracker(adam: bool, regression: bool) -> None:
    """Tasks that are rare, that appear late and that are absent, over 120 steps in double precision."""
    outputs = 1 if regression else 3
    torch.manual_seed(0)
    first, last = nn.Linear(INPUTS + len(TASKS), WIDTH).double(), nn.Linear(WIDTH, outputs).double()
    model = nn.Sequential(first, nn.ReLU(), last)
    rate = 0.01 if adam else 0.05
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(model.parameters(), lr=rate)

    def parameters() -> np.ndarray:
        """As the simulator lays them out."""
        w = first.weight.detach().T
        parts = (w[:INPUTS], first.bias, last.weight, last.bias, w[INPUTS:])
        return torch.cat([p.detach().reshape(-1) for p in parts]).numpy().copy()

    simulator = Simulator(
        TASKS, INPUTS, WIDTH, outputs, parameters(), rate=rate, adam=adam, scale=SCALE, regression=regression,
        effects=True, dtype=np.float64,
    )  # fmt: skip
    tracker = tg.track(model, TASKS, optimizer, mode="exact")
    rng = np.random.default_rng(1)
    share = np.array([0.7, 0.2, 0.05, 0.05, 0.0])
    defined = dict.fromkeys(COLUMNS, 0)
    for step in range(120):
        late = np.array([0.6, 0.2, 0.05, 0.05, 0.1]) if step > 60 else share
        task = np.sort(rng.choice(len(TASKS), BATCH, p=late))
        x = rng.normal(size=(BATCH, INPUTS))
        y = x[:, 0] * (-1.0) ** task if regression else (x[:, :outputs].argmax(1) + task) % outputs
        said = simulator.step(x, task, y, gram=True)
        with tracker.batch(torch.from_numpy(task)) as batch:
            seen = model(torch.from_numpy(np.hstack([x, SCALE * np.eye(len(TASKS))[task]])))
            labels = torch.from_numpy(y)
            rows = (
                0.5 * (seen[:, 0] - labels).square() if regression else F.cross_entropy(seen, labels, reduction="none")
            )
            batch.losses(rows)
            rows.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        report = tracker.report()
        assert said.step == report.step
        for name in COLUMNS:
            expected = getattr(report, name).double().numpy()
            assert getattr(said, name) == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), (step, name)
            defined[name] += int(np.isfinite(expected).sum())
        assert said.gram == pytest.approx(report.gram.numpy(), rel=1e-6, abs=1e-12)
    assert min(defined.values()) > 10, defined
    assert simulator.parameters() == pytest.approx(parameters(), rel=1e-6, abs=1e-9)
    x, y = rng.normal(size=(50, INPUTS)), rng.integers(0, outputs, (len(TASKS), 50)).astype(float)
    losses, scores = simulator.evaluate(x, y)
    for t in range(len(TASKS)):
        rows = torch.from_numpy(np.hstack([x, SCALE * np.tile(np.eye(len(TASKS))[t], (50, 1))]))
        with torch.no_grad():
            seen, labels = model(rows), torch.from_numpy(y[t])
            if regression:
                assert scores[t] == pytest.approx(float((seen[:, 0] - labels).square().mean()))
                assert losses[t] == pytest.approx(scores[t] / 2)
            else:
                assert scores[t] == pytest.approx(float((seen.argmax(1) == labels.long()).double().mean()))
                assert losses[t] == pytest.approx(float(F.cross_entropy(seen, labels.long())))


def test_parameters_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start must hold 47 parameters, got shape \(3,\)"):
        Simulator(("a", "b"), 4, 5, 2, np.zeros(3), rate=0.1)
