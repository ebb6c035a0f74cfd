"""How large does the sampler's ledger get, and how long do saving and loading take?

A real sampler over T tasks (a fifth of them frequent) is driven by made-up reports: losses and gradients fall as a
task is seen, at very different speeds, a few tasks have nothing to learn, and everything is as noisy as in a
small model's training. Sizes are those of the ledger in a checkpoint's JSON, whys included.

    python -m benchmarks.ledger [--reports 100000] [--only OverwriteBoost] [--tasks 3 10 100]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskgrad.sampling import AdaptiveBatchSampler, Ledger
from taskgrad.sampling.policies import DoGE, Exp3, OverwriteBoost, PiKE

POLICIES: dict[str, tuple[type, dict[str, Any]]] = {
    "OverwriteBoost": (OverwriteBoost, {}),
    "Exp3 paper": (Exp3, {"variant": "paper"}),
    "Exp3 released": (Exp3, {"variant": "released"}),
    "DoGE": (DoGE, {}),
    "PiKE": (PiKE, {"zeta1": 0.1, "zeta2": 0.01}),
}
BATCH = 64


@dataclass
class Report:
    """What the policies read of a ``StepReport``."""

    step: int
    tasks: tuple[str, ...]
    examples: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    norm: np.ndarray
    signal: np.ndarray
    overwrite: np.ndarray
    overwrite_se: np.ndarray
    gram: np.ndarray | None
    valid: bool = True


class Training:
    """A training that is only a noisy curve for each task."""

    def __init__(self, sizes: dict[str, int], gram: bool) -> None:
        self.tasks = tuple(sizes)
        self.offsets = np.cumsum(list(sizes.values()))
        self.gram = gram
        self.rng = np.random.default_rng(1)
        count = len(sizes)
        self.hopeless = self.rng.random(count) < 0.15
        self.speed = 10 ** self.rng.uniform(2, 5, count)
        self.seen = np.zeros(count)
        self.step = 0

    def report(self, batch: list[int]) -> Report:
        """The report on a batch of example numbers."""
        rng, count = self.rng, len(self.tasks)
        examples = np.bincount(np.searchsorted(self.offsets, batch, side="right"), minlength=count).astype(float)
        has = examples > 0
        self.seen += has
        self.step += 1
        left = np.where(self.hopeless, 1.0, np.maximum(1 / (1 + self.seen / self.speed), 0.02))
        spread = 1 / np.sqrt(np.maximum(examples, 1))
        norm = np.sqrt(left * rng.lognormal(0, 0.5, count)) * spread
        signal = left * (0.05 * ~self.hopeless + 0.3 * rng.standard_normal(count))
        gram = None
        if self.gram:
            gram = np.diag(norm**2) + 0.05 * np.outer(norm, norm) * rng.standard_normal((count, count))
        return Report(
            step=self.step,
            tasks=self.tasks,
            examples=examples,
            tokens=examples,
            loss=np.where(has, 3 * left * (1 + 0.3 * spread * rng.standard_normal(count)), np.nan),
            norm=np.where(has, norm, np.nan),
            signal=np.where(has, signal, np.nan),
            overwrite=np.where(self.hopeless, np.nan, 1.3 + 0.2 * rng.standard_normal(count)),
            overwrite_se=np.full(count, 0.2),
            gram=gram,
        )


def sizes_of(count: int) -> dict[str, int]:
    """Examples of each task: a fifth of them frequent, the others from 2,000 to 50,000."""
    frequent = max(1, count // 5)
    sizes = [1_000_000] * frequent + np.logspace(3.3, 4.7, count - frequent).astype(int).tolist()
    return {f"task{t}": size for t, size in enumerate(sizes)}


def seconds(function: Any, *arguments: Any) -> tuple[float, Any]:
    """How long a call takes, the shortest of three, and what it gives."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        out = function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times), out


def measure(name: str, tasks: int, budget: float | None, reports: int) -> str:
    """A row of the table."""
    kind, options = POLICIES[name]
    sizes = sizes_of(tasks)

    def build() -> AdaptiveBatchSampler:
        return AdaptiveBatchSampler(sizes, BATCH, kind(**options), num_batches=reports, budget=budget)

    sampler = build()
    training = Training(sizes, gram=kind is DoGE)
    for batch in sampler:
        sampler.update(training.report(batch), lr=1e-3)
    saving, saved = seconds(sampler.ledger.to_dict)
    text = json.dumps(saved)
    loading, _ = seconds(Ledger.from_dict, json.loads(text))
    state = sampler.state_dict()
    resuming, _ = seconds(lambda: build().load_state_dict(state))
    streams = [sum(len(page[i]) for page in saved["pages"]) for i in range(3)]
    return (
        f"{name:<15} {tasks:>5} {budget or '-':>6} {reports:>8} {len(sampler.ledger):>8} {len(text):>10} "
        f"{streams[0]:>9} {streams[1]:>7} {streams[2]:>7} {saving:>8.3f} {loading:>8.3f} {resuming:>8.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=100_000)
    parser.add_argument("--only", choices=[*POLICIES], nargs="+", default=[*POLICIES])
    parser.add_argument("--tasks", type=int, nargs="+", default=[3, 10, 100])
    parser.add_argument("--budget", type=float, default=0.05, help="0: no budget, as the baselines are published")
    args = parser.parse_args()
    print(
        f"{'policy':<15} {'tasks':>5} {'budget':>6} {'reports':>8} {'entries':>8} {'JSON bytes':>10} "
        f"{'mixes':>9} {'notes':>7} {'whys':>7} {'save s':>8} {'load s':>8} {'resume s':>8}"
    )
    for name in args.only:
        for tasks in args.tasks:
            print(measure(name, tasks, args.budget or None, args.reports), flush=True)


if __name__ == "__main__":
    main()
