"""Two phases: the frequent tasks first, all of them later."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..arrays import FloatArray
from ..inputs import known
from .base import FixedPolicy, PolicyState
from .updates import horizon, number


class TwoPhase(FixedPolicy):
    """The natural mix of the frequent tasks alone for the first ``until`` of the run, then ``joint``.

    Pre-training on high-resource tasks, then fine-tuning on a mixture of all, as the abstract of arXiv 2312.06134
    ("Order matters", NeurIPS 2023) has it; details could not be checked against the paper's text. The authors restart
    the learning rate schedule with the second phase, which is the caller's to do. Needs the sampler's ``horizon``.

    ``joint``: the policy of the second phase, say ``Static({...})`` or ``Temperature(5)``. ``frequent``: names of the
    tasks of the first phase; by default those with a natural share of 1 / T or more. Raises TypeError or ValueError.
    """

    def __init__(self, joint: FixedPolicy, until: float, frequent: Collection[str] | None = None) -> None:
        if not isinstance(joint, FixedPolicy):
            raise TypeError(f"joint must be a fixed policy such as Static or Temperature, got {joint!r}")
        if isinstance(frequent, str):
            raise TypeError(f"frequent must be a collection of task names, got {frequent!r}: write [{frequent!r}]")
        if frequent is not None and not frequent:
            raise ValueError("frequent must name at least one task, got none")
        self.joint = joint
        self.until = number("until", until, 0.0, 1.0, open_low=True)
        self.frequent = None if frequent is None else tuple(frequent)

    def initial(self, state: PolicyState) -> FloatArray:
        """The first phase's mix; both phases are checked against the tasks."""
        self.joint.initial(state)
        return self.weights(None, state)

    def changes(self, state: PolicyState) -> Sequence[int]:
        """The batch at which the joint phase begins, and the changes of ``joint`` after it."""
        switch = math.ceil(self.until * horizon(state, "TwoPhase"))
        return (switch, *(batch for batch in self.joint.changes(state) if batch > switch))

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """The mix of the phase that the next batch is in, [T]."""
        if state.step + 1 >= self.changes(state)[0]:
            return self.joint.weights(report, state)
        if self.frequent is None:
            chosen = state.natural >= 1.0 / len(state.tasks)
        else:
            named = known("TwoPhase.frequent", self.frequent, state.tasks)
            chosen = np.array([task in named for task in state.tasks])
        kept = np.where(chosen, state.natural, 0.0)
        return np.asarray(kept / kept.sum(), dtype=np.float64)

    def __repr__(self) -> str:
        return f"TwoPhase({self.joint!r}, until={self.until:g}, frequent={self.frequent})"
