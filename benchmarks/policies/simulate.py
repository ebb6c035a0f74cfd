"""One run of the simulator under a policy: the package's own sampler draws, and decides by the simulator's reports."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgrad.sampling import AdaptiveBatchSampler

from .scenarios import Scenario
from .simulator import Simulator

Floats = npt.NDArray[np.float64]

TRAIN, OBSERVED, SCORED = 16384, 128, 512
"""Rows to train on (a fresh example is one of them, drawn anew), to observe held-out losses on, and to score."""
EVALUATIONS = 40
END = 0.1
"""Part of the run, at its end, that scores and parts are averaged over."""


@dataclass(frozen=True)
class Data:
    """Rows [N, inputs] and labels [T, N] for training, observing and scoring; ``drawn``: for each example of the data
    set its row, tasks one after the other, None where examples are fresh; ``start``: the network's first parameters."""

    x: Floats
    y: Floats
    observed: tuple[Floats, Floats]
    scored: tuple[Floats, Floats]
    drawn: npt.NDArray[np.int64] | None
    sizes: npt.NDArray[np.int64]
    start: Floats


def data(scenario: Scenario, seed: int) -> Data:
    """The data of one seed, the same for every policy."""
    rng = np.random.default_rng((scenario.seed, seed, 1))
    count = len(scenario.natural)
    x, y = scenario.world(rng, TRAIN + OBSERVED + SCORED)
    for t in np.flatnonzero(scenario.noise):
        y[t] = _no_label(scenario, rng, y.shape[1])
    x, y = x.astype(np.float32), y.astype(np.float32)
    split = (slice(0, TRAIN), slice(TRAIN, TRAIN + OBSERVED), slice(TRAIN + OBSERVED, None))
    rows, observed, scored = ((np.ascontiguousarray(x[s]), np.ascontiguousarray(y[:, s])) for s in split)
    sizes, drawn = np.ones(count, dtype=np.int64), None
    if scenario.rows is not None:
        sizes = np.maximum(np.round(scenario.natural * scenario.rows).astype(np.int64), 8)
        drawn = np.concatenate([rng.choice(TRAIN, n, replace=n > TRAIN) for n in sizes])
    inputs, width, outputs = x.shape[1], scenario.width, scenario.classes
    first, last = (inputs + count) ** -0.5, width**-0.5  # torch's initial weights
    parts = [rng.uniform(-first, first, inputs * width + width), rng.uniform(-last, last, width * outputs + outputs)]
    start = np.concatenate([*parts[:1], parts[1] * scenario.start_gain, rng.uniform(-first, first, count * width)])
    return Data(*rows, observed, scored, drawn, sizes, start)


def _no_label(scenario: Scenario, rng: np.random.Generator, n: int) -> Floats:
    return rng.normal(size=n) if scenario.regression else rng.integers(0, scenario.classes, n).astype(np.float64)


@dataclass(frozen=True)
class How:
    """How a policy is run: ``guarded`` by the scenario's budget or free; whether reports hold ``losses``, the overwrite
    ratio ``rho`` and the tasks' inner products (``gram``); whether held-out losses are ``observed``."""

    guarded: bool = True
    losses: bool = True
    rho: bool = True
    observed: bool = False
    gram: bool = False


def run(scenario: Scenario, given: Data, seed: int, policy: Any, how: How = How()) -> dict[str, Any]:
    """Train once and say how it went: JSON-able.

    ``scores`` [T]: held-out score over the last tenth, 0 for guessing, 1 for perfect (regression: 1 - error /
    variance); ``half``: the same at half the run. ``parts`` and ``end`` [T]: what the policy asked for, as parts of the
    budget, on average over the run and over its last tenth; unguarded: what went beyond the natural mix, over it.
    ``mean`` [T]: weights in force. ``held_out`` [T]: losses at the end, on the rows that are observed.
    """
    began = time.perf_counter()
    count, steps = len(scenario.natural), scenario.steps
    names = tuple(f"task{t}" for t in range(count))
    options: dict[str, Any] = {"shares": dict(zip(names, scenario.natural.tolist(), strict=True)), "num_batches": steps}
    task_of = np.arange(count)
    if given.drawn is not None:
        task_of = np.repeat(np.arange(count), given.sizes)
        options = {"task_of_example": task_of, "tasks": names, "num_batches": steps}
    sampler = AdaptiveBatchSampler(
        batch_size=scenario.batch, policy=policy, seed=seed, horizon=steps, delay=0,
        budget=scenario.budget if how.guarded else None, **options,
    )  # fmt: skip
    simulator = Simulator(
        names, given.x.shape[1], scenario.width, scenario.classes, given.start, rate=scenario.rate,
        adam=scenario.adam, scale=scenario.scale, regression=scenario.regression,
    )  # fmt: skip
    rng = np.random.default_rng((scenario.seed, seed, 2))
    noise = scenario.noise.any()
    every = max(10, steps // EVALUATIONS)
    natural = scenario.natural if given.drawn is None else given.sizes / given.sizes.sum()
    weights, late, scored, half = [], steps * (1 - END), [], None
    if how.observed:
        sampler.observe(simulator.evaluate(*given.observed)[0])
    for k, batch in enumerate(sampler):
        examples = np.array(batch)
        task = task_of[examples]
        rows = rng.integers(0, TRAIN, len(task)) if given.drawn is None else given.drawn[examples]
        labels = given.y[task, rows]
        if noise:
            coins = _no_label(scenario, rng, len(task))
            labels = np.where(scenario.noise[task], coins, labels)
        report = simulator.step(given.x[rows], task, labels, gram=how.gram)
        if not how.losses:
            report.loss = None
        if not how.rho:
            report.overwrite = report.overwrite_se = np.full(count, np.nan)
        if k % 10 == 0:
            weights.append(sampler.weights)
        sampler.update(report, lr=scenario.rate)
        if (k + 1) % every == 0:
            if how.observed:
                sampler.observe(simulator.evaluate(*given.observed)[0])
            if k + 1 > late:
                scored.append(_scores(scenario, given, simulator))
            if half is None and k + 1 >= steps / 2:
                half = _scores(scenario, given, simulator)
    mixes = np.array(weights)
    parts = _parts(mixes, natural, scenario)
    last = max(1, round(END * len(parts)))
    return {
        "scores": np.mean(scored, axis=0).tolist(), "half": half.tolist(), "parts": parts.mean(0).tolist(),
        "end": parts[-last:].mean(0).tolist(), "mean": mixes.mean(0).tolist(),
        "held_out": simulator.evaluate(*given.observed)[0].tolist(),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _parts(mixes: Floats, natural: Floats, scenario: Scenario) -> Floats:
    """Parts of the budget behind the ``mixes`` [N, T]: (w - c natural) / budget with c the least ratio of w to natural,
    which is what a mix inside the budget leaves of the natural one."""
    kept = (mixes / natural).min(1, keepdims=True)
    return np.asarray((mixes - kept * natural) / scenario.budget)


def _scores(scenario: Scenario, given: Data, simulator: Simulator) -> Floats:
    """Chance is 0, perfect is 1; below chance counts as chance."""
    _, found = simulator.evaluate(*given.scored)
    if scenario.regression:
        return np.maximum(1 - found / given.scored[1].var(1), 0)
    guess = 1 / scenario.classes
    return np.maximum((found - guess) / (1 - guess), 0)
