"""The setting of ``taskgrad demo``: text, three learnable rare tasks and noise, scored on held-out instances."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from taskgrad.study.data import RARE, TASKS, Mixture
from taskgrad.study.demo import STEPS
from taskgrad.study.train import DIVERTED
from taskgrad.study.train import train as train_demo

from .train import POINTS

__all__ = ["DIVERTED", "STEPS", "natural", "train"]


def natural(seed: int) -> Any:
    """The natural mix [T]."""
    sizes = np.array([Mixture(seed).sizes[task] for task in TASKS])
    return sizes / sizes.sum()


def train(policy: Any, seed: int, steps: int) -> dict[str, Any]:
    """The demo's own run under ``policy``, in the form of ``benchmarks.policies.train.Run``; each task is its own kind.

    ``curve`` holds the text's held-out loss too (``text_loss``, nats per byte), ``seen`` the accuracy on instances that
    occurred in training, at the end.
    """
    found = asdict(train_demo(type(policy).__name__, seed, steps, policy=policy))
    mix = natural(seed)
    shares = np.array(found["curves"]["share"])
    shares = shares[:: max(1, len(shares) // POINTS)].round(6)
    curve = [
        {"step": e["step"], "text_loss": e["text_loss"], **{task: e["held_out"][task] for task in RARE}}
        for e in found["evaluations"]
    ]
    return {
        "tasks": list(TASKS),
        "kinds": list(TASKS),
        "natural": mix.tolist(),
        "accuracy": [None, *(curve[-1][task] for task in RARE)],
        "seen": [None, *(found["evaluations"][-1]["seen"][task] for task in RARE)],
        "curve": curve,
        "mean": found["share"],
        "shares": shares.tolist(),
        "budget": (0.5 * np.abs(shares - mix).sum(1)).round(6).tolist(),
        "seconds": found["seconds"],
    }
