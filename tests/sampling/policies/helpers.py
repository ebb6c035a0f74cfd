"""What a policy is given: a state, and reports made up of the fields it reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from taskgrad.sampling.arrays import FloatArray, frozen_flags, frozen_floats, frozen_ints
from taskgrad.sampling.policies import PolicyState


def state(
    sizes: tuple[int, ...] = (1000, 100, 10), tasks: tuple[str, ...] = ("a", "b", "c"), **changed: Any
) -> PolicyState:
    """A state before the first report, but for what is ``changed``."""
    natural = frozen_floats(np.array(sizes) / sum(sizes))
    zeros = frozen_floats(np.zeros(len(sizes)))
    values: dict[str, Any] = {
        "tasks": tasks, "sizes": frozen_ints(sizes), "natural": natural, "importance": frozen_floats(zeros + 1),
        "critical": frozen_flags(zeros > 0), "batch_size": 8, "horizon": None, "lr": None, "step": -1, "budget": None,
        "realised": zeros, "epochs": zeros, "weights": natural, "eval_losses": None, "memory": {}, **changed,
    }  # fmt: skip
    return PolicyState(**values)


def report(step: int = 1, **columns: Any) -> SimpleNamespace:
    """A report whose columns are float64 tensors, examples int64; what a step report has but no test cares for is
    left out."""
    tensors = {name: None if v is None else torch.tensor(np.asarray(v)) for name, v in columns.items()}
    return SimpleNamespace(step=step, valid=True, **tensors)


def softmax(values: Any) -> FloatArray:
    powers = np.exp(np.asarray(values, dtype=np.float64))
    return np.asarray(powers / powers.sum())
