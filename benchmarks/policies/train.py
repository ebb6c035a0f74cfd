"""One run of a parity setting under one policy."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from taskgrad.sampling import AdaptiveBatchSampler

from .parity import Parity, Setting, build_model

POINTS = 20
"""Points of a run's trajectories."""
EVALUATIONS = 15
EVAL_EXAMPLES = 1000
"""Examples of each task in an evaluation."""


@dataclass
class Run:
    """What a run leaves, JSON-able; lists [T] are in the order of ``tasks``.

    ``accuracy``: by kind of task and by task at the end. ``curve``: ``step`` and mean accuracy by kind, at evaluations.
    ``mean``: intended share of each task over the run [T]. ``shares``: weights in force [T] at ``POINTS`` steps.
    ``budget``: share of the batch diverted from the natural mix, at the same steps.
    """

    tasks: list[str]
    kinds: list[str]
    natural: list[float]
    accuracy: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    budget: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(setting: Setting, policy: Any, seed: int, steps: int, guarded: bool = True) -> Run:
    """Train a fresh model for ``steps`` steps. Data and initial weights depend on ``seed`` alone.

    ``guarded``: whether the setting's budget is in force. Policies that read no reports are not tracked.
    """
    started = time.perf_counter()
    task_of_slot = np.repeat(np.arange(len(setting.tasks)), setting.sizes)
    natural = setting.sizes / setting.sizes.sum()
    data = Parity(setting, seed)
    torch.manual_seed(seed)
    model = build_model(setting)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.learning_rate)
    tracker = tg.track(model, tasks=setting.tasks, optimizer=optimizer) if policy.adaptive else None
    sampler = AdaptiveBatchSampler(
        task_of_slot,
        batch_size=setting.batch,
        policy=policy,
        seed=seed,
        tasks=setting.tasks,
        num_batches=steps,
        horizon=steps,
        delay=0,
        budget=setting.budget if guarded else None,
    )
    run = Run(list(setting.tasks), list(setting.kinds), natural.tolist())
    if tracker is not None:
        sampler.follow(tracker)
    for step, slots in enumerate(sampler):
        weights = sampler.weights
        if step % max(1, steps // POINTS) == 0:
            run.shares.append(np.round(weights, 6).tolist())
            run.budget.append(round(float(0.5 * np.abs(weights - natural).sum()), 6))
        task_ids = task_of_slot[slots]
        inputs, labels = data.batch(task_ids, step)
        optimizer.zero_grad()
        if tracker is None:
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        else:
            with tracker.batch(torch.from_numpy(task_ids)) as batch:
                per_example = F.cross_entropy(model(inputs), labels, reduction="none")
                batch.losses(per_example)
                per_example.mean().backward()
            optimizer.step()
        if (step + 1) % max(1, steps // EVALUATIONS) == 0 or step + 1 == steps:
            run.accuracy = evaluate(model, setting, data)
            run.curve.append({"step": step + 1, **by_kind(run.kinds, run.accuracy)})
    run.mean = sampler.realised().intended.tolist()
    run.seconds = time.perf_counter() - started
    return run


def evaluate(model: nn.Module, setting: Setting, data: Parity) -> list[float]:
    """Accuracy on each task [T], on fresh examples, the same ones each time."""
    found = []
    with torch.no_grad():
        for task in range(len(setting.tasks)):
            inputs, labels = data.batch(np.full(EVAL_EXAMPLES, task), task, held_out=True)
            found.append(float((model(inputs).argmax(1) == labels).float().mean()))
    return found


def by_kind(kinds: list[str], values: list[float]) -> dict[str, float]:
    """Mean of ``values`` [T] over the tasks of each kind."""
    return {kind: float(np.mean([v for v, k in zip(values, kinds, strict=True) if k == kind])) for kind in kinds}
