"""One run of the demo: the same model and data, under one policy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..report import StepReport
from ..sampling import AdaptiveBatchSampler
from ..sampling.policies import OverwriteBoost, Policy, Proportional, Static
from ..tracking.track import track
from .data import IGNORE, LEARNABLE, RARE, SEQUENCE, TASKS, Mixture
from .model import ByteGPT

BATCH_SIZE = 64
LEARNING_RATE = 6e-3
MEMORY_DECAY = 0.98  # a memory over 50 appearances: shorter ones see the noise of their own steps
WARMUP_STEPS = 100
RARE_BUDGET = 0.03
"""Share of the sequences that the four rare tasks may have together, their natural 0.8 % included."""
CURVE_POINTS = 100
EVALUATIONS = 12

# What may be diverted from the natural mix so that the rare tasks have RARE_BUDGET together.
_natural_rare = 0.002 * len(RARE)
DIVERTED = (RARE_BUDGET - _natural_rare) / (1.0 - _natural_rare)

POLICIES: dict[str, Callable[[], Policy]] = {
    "natural": Proportional,
    "equal": lambda: Static({task: 1.0 / len(RARE) for task in RARE}),
    "overwrite_boost": OverwriteBoost,
}
"""The three runs: the natural mix, an equal static split of the budget, taskgrad's policy within the same budget."""


@dataclass
class RunResult:
    """What a run leaves; everything JSON-able, tasks in the order of ``TASKS``.

    Attributes:
        name: key of ``POLICIES``.
        seed, steps: of the run.
        parameters: of the model.
        curves: lists with one entry per point: ``step``, and lists [T]: ``share`` (weights in force), ``overwrite``,
            ``overwrite_se``, ``signal`` (mean over the steps since the last point), ``retention``, ``loss`` (likewise).
        evaluations: one dict per evaluation: ``step``, ``text_loss`` (held out, nats per byte), ``seen`` and
            ``held_out``: accuracy per rare task.
        chance: accuracy per rare task, held out, of always giving its most frequent answer.
        share, epochs: [T], mean share of the sequences over the run, and passes over the task's examples.
        push: [T][T], sum over steps of <m_t, g_s> divided by |that of <m_t, g_t>|: below 0, task s (column) undoes
            t (row).
        seconds: wall time.
    """

    name: str
    seed: int
    steps: int
    parameters: int = 0
    curves: dict[str, list[Any]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    chance: dict[str, float] = field(default_factory=dict)
    share: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    push: list[list[float | None]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same as a dict."""
        return asdict(self)


class _Curves:
    """Averages what a step reports over the steps between two points of the curves."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.points: dict[str, list[Any]] = {
            name: [] for name in ("step", "share", "signal", "loss", "overwrite", "overwrite_se", "retention")
        }
        self._recent: dict[str, list[Any]] = {"signal": [], "loss": []}
        self._dots = np.zeros((len(TASKS), len(TASKS)))

    def add(self, step: int, report: StepReport, share: Any) -> None:
        self._recent["signal"].append(report.signal.numpy())
        self._recent["loss"].append(np.full(len(TASKS), np.nan) if report.loss is None else report.loss.numpy())
        self._dots += np.nan_to_num(report.memory_dot[:, : len(TASKS)].numpy())
        if step % self.every:
            return
        self.points["step"].append(step)
        self.points["share"].append(share.tolist())
        for name, rows in self._recent.items():
            self.points[name].append(_plain(_column_means(np.array(rows))))
            rows.clear()
        for name in ("overwrite", "overwrite_se", "retention"):
            self.points[name].append(_plain(getattr(report, name).numpy()))

    def push(self) -> list[list[float | None]]:
        own = np.abs(np.diagonal(self._dots))[:, None]
        ratios = np.divide(self._dots, own, out=np.full_like(self._dots, np.nan), where=own > 0)
        return [_plain(row) for row in ratios]


def train(
    name: str,
    seed: int,
    steps: int,
    on_step: Callable[[int, float, float | None], None] | None = None,
    policy: Any = None,
) -> RunResult:
    """Train a fresh model for `steps` steps under policy `name` (a key of `POLICIES`) and evaluate it on the way; with
    `policy`, under that one, of any name.

    Data and initial weights depend on `seed` only, so the runs of a seed differ by their batches alone. `on_step` is
    called after each step with its number, its loss and, where there was an evaluation, the mean accuracy on
    held-out instances of the learnable rare tasks.
    """
    started = time.perf_counter()
    mixture = Mixture(seed)
    torch.manual_seed(seed)
    model = ByteGPT(SEQUENCE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    tracker = track(model, tasks=TASKS, optimizer=optimizer, mode="exact", memory_decay=MEMORY_DECAY)
    policy = POLICIES[name]() if policy is None else policy
    sampler = AdaptiveBatchSampler(
        mixture.task_of_example,
        batch_size=BATCH_SIZE,
        policy=policy,
        seed=seed,
        tasks=TASKS,
        num_batches=steps,
        horizon=steps,
        delay=0,
        budget=None if isinstance(policy, Proportional) else DIVERTED,
    )
    parameters = sum(p.numel() for p in model.parameters())
    result = RunResult(name, seed, steps, parameters=parameters, chance=mixture.chance)
    curves = _Curves(max(1, steps // CURVE_POINTS))
    evaluate_every = max(1, steps // EVALUATIONS)
    sampler.follow(tracker)
    for index, examples in enumerate(sampler):
        step = index + 1
        share = sampler.weights
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(index, steps)
        inputs, targets, task_ids = mixture.batch(examples, index)
        optimizer.zero_grad()
        with tracker.batch(task_ids) as batch:
            per_example = _losses(model(inputs), targets)
            batch.losses(per_example)
            loss = per_example.mean()
            loss.backward()
        optimizer.step()
        curves.add(step, tracker.report(), share)
        mean_accuracy = None
        if step % evaluate_every == 0 or step == steps:
            result.evaluations.append({"step": step, **evaluate(model, mixture)})
            held_out = result.evaluations[-1]["held_out"]
            mean_accuracy = float(np.mean([held_out[task] for task in LEARNABLE]))
        if on_step is not None:
            on_step(step, loss.item(), mean_accuracy)
    tracker.remove()
    realised = sampler.realised()
    result.share, result.epochs = realised.share.tolist(), (realised.examples / list(mixture.sizes.values())).tolist()
    result.curves, result.push = curves.points, curves.push()
    result.seconds = time.perf_counter() - started
    return result


def evaluate(model: ByteGPT, mixture: Mixture) -> dict[str, Any]:
    """Held-out text loss in nats per byte, and the accuracy on each rare task's answers, seen and held out."""
    out: dict[str, Any] = {"seen": {}, "held_out": {}}
    model.eval()
    with torch.no_grad():
        for (task, split), given in mixture.eval_sets.items():
            logits = model(given.inputs)
            if task == "text":
                out["text_loss"] = _losses(logits, given.targets).mean().item()
            else:
                asked = given.targets != IGNORE
                out[split][task] = (logits.argmax(-1) == given.targets)[asked].float().mean().item()
    model.train()
    return out


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each example [B] over the targets that count."""
    per_token = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORE)
    return per_token.sum(1) / (targets != IGNORE).sum(1)


def _schedule(index: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    cosine = 0.1 + 0.45 * (1.0 + math.cos(math.pi * index / steps))
    return min(1.0, (index + 1) / WARMUP_STEPS) * cosine


def _column_means(rows: Any) -> Any:
    """Means over the first axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(rows)
    count = known.sum(0)
    return np.divide(np.where(known, rows, 0.0).sum(0), count, out=np.full(rows.shape[1:], np.nan), where=count > 0)


def _plain(values: Any) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
