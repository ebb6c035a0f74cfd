"""Control: what a policy asks for one task goes to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import FloatArray, IntArray
from ..inputs import count_of
from .base import PolicyState


class Shuffled:
    """The inner policy's weights, handed to the wrong tasks.

    The signal is the same and as lively, only it says nothing of the task that it acts on: what the policy reaches
    beyond this control, it owes to its signal. Tasks with less than a natural share of 1 / T swap among themselves, the
    others likewise; each group of two or more in a cycle drawn from ``seed``, so that none keeps its own weight. The
    policy's memory, guard defaults and schedule are the inner one's, the natural share left to the guards included.
    Raises TypeError for something that is no policy.
    """

    def __init__(self, policy: Any, seed: int = 0) -> None:
        if isinstance(policy, type) or not callable(getattr(policy, "weights", None)):
            raise TypeError(f"policy must be an object with a method weights(report, state), got {policy!r}")
        self.policy = policy
        self.seed = count_of("seed", seed, 0)

    @property
    def adaptive(self) -> bool:
        """As the inner policy's."""
        return bool(getattr(self.policy, "adaptive", True))

    @property
    def guard_defaults(self) -> Mapping[str, float]:
        """As the inner policy's."""
        defaults: Mapping[str, float] = getattr(self.policy, "guard_defaults", {})
        return defaults

    def changes(self, state: PolicyState) -> Sequence[int]:
        """As the inner policy's."""
        batches: Sequence[int] = self.policy.changes(state) if hasattr(self.policy, "changes") else ()
        return batches

    def initial(self, state: PolicyState) -> FloatArray:
        """The inner policy's first weights [T], shuffled."""
        first = self.policy.initial(state) if hasattr(self.policy, "initial") else state.natural
        return self._shuffle(first, state)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """The inner policy's weights [T], shuffled."""
        return self._shuffle(self.policy.weights(report, state), state)

    def receivers(self, state: PolicyState) -> IntArray:
        """Which task gets the weight of task t, int64 [T]."""
        rng = np.random.default_rng(self.seed)
        out = np.arange(len(state.tasks))
        rare = state.natural < 1.0 / len(state.tasks)
        for group in (np.flatnonzero(rare), np.flatnonzero(~rare)):
            cycle = rng.permutation(group)
            out[cycle] = np.roll(cycle, 1)
        return out

    def _shuffle(self, asked: FloatArray, state: PolicyState) -> FloatArray:
        values = np.asarray(asked, dtype=np.float64)
        out = np.zeros_like(values)
        out[self.receivers(state)] = values
        return out

    def __repr__(self) -> str:
        return f"Shuffled({self.policy!r}, seed={self.seed})"
