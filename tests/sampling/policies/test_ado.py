from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from taskgrad.sampling.policies import ADO
from taskgrad.sampling.policies.ado import POINTS
from taskgrad.sampling.policies.scaling_law import ScalingLaw, fit
from tests.sampling.policies.helpers import report, state

NAN = math.nan


def curve(samples: Any, beta: float, eps: float, alpha: float) -> Any:
    return eps + beta * np.asarray(samples, dtype=float) ** -alpha


@pytest.mark.parametrize("beta, eps, alpha", [(30.0, 1.5, 0.4), (8.0, 0.2, 0.2), (100.0, 2.0, 0.7), (5.0, 3.0, 0.5)])
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_the_fit_recovers_a_power_law(beta: float, eps: float, alpha: float, noise: float) -> None:
    samples = np.linspace(500 * 64, 20_000 * 64, 200)
    spread = np.exp(noise * np.random.default_rng(0).normal(size=200))
    law = fit(samples, curve(samples, beta, eps, alpha) * spread)
    assert law.alpha == pytest.approx(alpha, abs=6e-4 if noise == 0 else 0.08)
    assert law.eps == pytest.approx(eps, rel=1e-3 if noise == 0 else 0.1)
    assert law.log_beta == pytest.approx(math.log(beta), abs=0.02 if noise == 0 else 1.0)
    slope = law.alpha * law.reducible(samples[-1]) / samples[-1]
    assert slope == pytest.approx(alpha * beta * samples[-1] ** -(alpha + 1), rel=1e-3 if noise == 0 else 0.2)


def test_a_spike_does_not_move_the_fit() -> None:
    samples = np.linspace(1e4, 1e6, 200)
    losses = curve(samples, 30, 1.5, 0.4)
    losses[::20] *= 3  # a squared error would follow these
    assert fit(samples, losses).alpha == pytest.approx(0.4, abs=5e-3)


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_the_fit_is_a_minimum(noise: float) -> None:
    rng = np.random.default_rng(2)
    samples = np.linspace(1e4, 1e6, 120)
    losses = curve(samples, 30, 1.5, 0.4) * np.exp(noise * rng.normal(size=120))

    def objective(log_beta: float, eps: float, alpha: float) -> float:
        miss = np.abs(np.log(eps + math.exp(log_beta) * samples**-alpha) - np.log(losses))
        return float(np.where(miss > 1e-3, 1e-3 * (miss - 5e-4), miss**2 / 2).sum())

    law = fit(samples, losses)
    least = objective(law.log_beta, law.eps, law.alpha)
    for _ in range(2000):
        alpha = float(np.clip(law.alpha + rng.normal() * 0.02, 0.01, 0.8))
        pivot = (alpha - law.alpha) * float(np.log(samples).mean())  # keeps the curve's height
        other = objective(law.log_beta + pivot + rng.normal() * 0.02, law.eps + rng.normal() * 0.01, alpha)
        assert other >= least * (1 - 1e-3)


def test_curves_that_are_no_power_law_give_finite_laws() -> None:
    samples = np.linspace(1e3, 1e5, 50)
    for losses in (np.full(50, 2.0), np.linspace(1, 3, 50), np.full(50, 1e-12), np.geomspace(5, 1e-12, 50)):
        law = fit(samples, losses)
        assert np.isfinite([law.log_beta, law.eps, law.alpha, law.reducible(1e5)]).all()
        assert 0 <= law.alpha <= 0.8 and law.eps >= 0


def test_vector() -> None:
    # alpha (L - eps) with L - eps = (1, .8, 1.5) at the 80 samples of step 9
    alpha, reducible, share = np.array([0.3, 0.2, 0.4]), np.array([1.0, 0.8, 1.5]), np.array([0.6, 0.3, 0.1])
    given = state((6, 3, 1), step=9, memory={})
    policy = ADO()
    policy.weights(report(loss=[1.0, 1.0, 1.0], examples=share * 10), given)
    given.memory["laws"] = [[math.log(r * 80**a), 0.0, a] for a, r in zip(alpha, reducible, strict=True)]
    got = policy.weights(report(loss=[1.0, 1.0, 1.0], examples=share * 10), given)
    assert got == pytest.approx((0.615492, 0.284235, 0.100273), abs=5e-7)
    expected = share + (np.array([0.754919, 0.142349, 0.102732]) - share) / 2  # the report counted as the second
    assert given.memory["average"] == pytest.approx(expected, abs=5e-7)


def test_slow_and_hopeless_tasks_keep_a_little() -> None:
    """alpha counts as 0.05 at least, and no wish is below 0.01."""
    share = np.array([0.5, 0.3, 0.2])
    given = state((5, 3, 2), step=9, memory={})
    policy, quiet = ADO(), report(loss=[1.0, 1.0, 1.0], examples=share * 10)
    policy.weights(quiet, given)
    given.memory["laws"] = [[0.0, 0.0, 0.01], [0.0, 0.0, 0.2], [-90.0, 0.0, 0.5]]
    got = policy.weights(quiet, given)
    speed = np.array([0.05 * 80**-0.01, 0.2 * 80**-0.2, 0.0])
    wish = share**1.5 * speed
    wish = np.maximum(wish / wish.sum(), 0.01)
    assert got == pytest.approx(0.9 * share + 0.1 * wish / wish.sum())


def test_over_many_reports() -> None:
    rng = np.random.default_rng(1)
    policy, memory = ADO(start=20, fit_every=10, skip=0), {}
    mu = np.array([0.6, 0.3, 0.1])
    h, average, natural_until = mu.copy(), mu.copy(), 19
    for k in range(60):
        examples = rng.multinomial(8, mu)
        loss = np.where(
            examples > 0, curve((k + 1) * 8, np.array([4.0, 2.0, 9.0]), 1.0, np.array([0.3, 0.2, 0.6])), NAN
        )
        got = policy.weights(report(loss=loss, examples=examples), state((6, 3, 1), step=k, memory=memory))
        h = 0.9 * h + 0.1 * examples / 8
        if k < natural_until:
            assert got.tolist() == mu.tolist()
            continue
        slope = []
        for log_beta, _, alpha in memory["laws"]:
            slope.append(max(alpha, 0.05) * math.exp(log_beta) * (8 * (k + 1)) ** -alpha / (8 * (k + 1)))
        r = mu * slope * h**0.5
        r = np.maximum(r / r.sum(), 0.01)
        r /= r.sum()
        assert got == pytest.approx(0.9 * average + 0.1 * r)
        average = (1 - 1 / (k + 1)) * average + r / (k + 1)
    assert [law[2] for law in memory["laws"]][2] > [law[2] for law in memory["laws"]][1]


def test_the_memory_stays_bounded_and_keeps_the_whole_curve() -> None:
    memory: dict[str, Any] = {}
    policy = ADO(start=10**6, skip=10)
    sizes = []
    for step in range(3000):
        loss = curve(8 * (step + 1), np.array([30.0, 10.0, 5.0]), 1.0, 0.4)
        policy.weights(report(loss=loss, examples=[5, 2, 1]), state(step=step, memory=memory))
        sizes.append(len(json.dumps(memory)))
    assert len(memory["samples"]) < POINTS and memory["block"] == 16
    assert max(sizes) < 120 * POINTS
    every = 8 * (np.arange(10, 3000) + 1)
    blocks = len(memory["samples"])
    assert memory["samples"] == pytest.approx(every[: blocks * 16].reshape(-1, 16).mean(1))
    expected = curve(every[: blocks * 16], 30.0, 1.0, 0.4).reshape(-1, 16).mean(1)
    assert np.array(memory["losses"])[:, 0] == pytest.approx(expected)


def test_absent_tasks_count_with_their_last_loss() -> None:
    policy, memory = ADO(skip=0), {}
    rows = [([3.0, NAN, NAN], [4, 0, 0]), ([2.0, 5.0, NAN], [3, 1, 0]), ([NAN, 4.0, 1.0], [0, 2, 2])]
    for step, (loss, examples) in enumerate(rows):
        policy.weights(report(loss=loss, examples=examples), state(step=step, memory=memory))
    assert memory["losses"] == [[3.0, 3.0, 3.0], [2.0, 5.0, 2.75], [2.0, 4.0, 1.0]]


def test_what_it_cannot_work_with() -> None:
    with pytest.raises(ValueError, match="ADO needs the losses of the tasks"):
        ADO().weights(report(loss=None, examples=[1, 1, 1]), state())
    with pytest.raises(ValueError, match=r"must not be negative, got \[1.0, -0.5, 2.0\]"):
        ADO().weights(report(loss=[1.0, -0.5, 2.0], examples=[1, 1, 1]), state())
    with pytest.raises(ValueError, match="fit_every must be at least 1"):
        ADO(fit_every=0)


def test_the_law() -> None:
    law = ScalingLaw(math.log(8.0), 0.5, 0.5)
    assert law.reducible(16) == pytest.approx(2.0)
