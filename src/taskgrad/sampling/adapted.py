"""A user's policy as the sampler asks it: whole, whatever the object leaves out, and its answers checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arrays import FloatArray, frozen_floats, to_numpy
from .policies.base import PolicyState


class AdaptedPolicy:
    """Any object with a method ``weights(report, state)``, and what ``Policy`` and ``FixedPolicy`` have beside it: the
    object's own, or the values given there. Nothing else asks what a policy has.

    Raises TypeError for an object without that method, and for a class.
    """

    def __init__(self, policy: Any) -> None:
        if isinstance(policy, type) or not callable(getattr(policy, "weights", None)):
            raise TypeError(f"policy must be an object with a method weights(report, state), got {policy!r}")
        self._policy = policy

    @property
    def kind(self) -> str:
        """Its class name."""
        return type(self._policy).__name__

    @property
    def name(self) -> str:
        """Its class name, with that of the policy it wraps: their memories must not be mistaken."""
        return _name(self._policy)

    @property
    def adaptive(self) -> bool:
        """Whether it reads reports."""
        return bool(getattr(self._policy, "adaptive", True))

    @property
    def guard_defaults(self) -> Mapping[str, float]:
        """The guards that it wants where the user gave none, by the names of the sampler's options."""
        defaults: Mapping[str, float] = getattr(self._policy, "guard_defaults", {})
        return defaults

    def initial(self, state: PolicyState) -> FloatArray:
        """Weights [T] before the first report."""
        first = self._policy.initial(state) if hasattr(self._policy, "initial") else state.natural
        return check_weights(first, state.tasks, self.name)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Weights [T] that follow the report."""
        return check_weights(self._policy.weights(report, state), state.tasks, self.name)

    def changes(self, state: PolicyState) -> Sequence[int]:
        """Batches from which on ``weights`` gives others without a report, ascending."""
        batches: Sequence[int] = self._policy.changes(state) if hasattr(self._policy, "changes") else ()
        return batches

    def why(self, state: PolicyState) -> str:
        """A line on the change from ``state.weights`` to ``state.proposed``; empty where it has none. Raises TypeError
        where it is no text."""
        said = self._policy.why(state) if hasattr(self._policy, "why") else ""
        if not isinstance(said, str):
            raise TypeError(f"{self.name}.why must return text, got {said!r}")
        return said


def _name(policy: Any) -> str:
    inner = getattr(policy, "policy", None)
    return type(policy).__name__ + ("" if inner is None else f"({_name(inner)})")


def check_weights(wanted: Any, tasks: Sequence[str], policy: str) -> FloatArray:
    """What a policy returned, as read-only float64 [T]; raises ValueError where it is no (partial) distribution, and
    TypeError where it does not consist of numbers."""
    try:
        given = to_numpy(wanted)
    except ValueError:  # a ragged list
        given = np.array(None)
    if given.dtype.kind not in "fiu":
        raise TypeError(f"{policy} returned {wanted!r}; it must return one probability per task ({len(tasks)})")
    values = given.astype(np.float64)
    if values.shape != (len(tasks),):
        raise ValueError(f"{policy} returned weights of shape {values.shape}, need ({len(tasks)},): one per task")
    if not np.isfinite(values).all() or (values < 0).any():
        bad = {task: float(v) for task, v in zip(tasks, values, strict=True) if not v >= 0 or v == np.inf}
        raise ValueError(f"{policy} returned weights that are negative or not finite: {bad}")
    total = float(values.sum())
    if total > 1 + 1e-6:
        raise ValueError(
            f"{policy} returned weights summing to {total:.6g}; they must sum to 1, or to less where the remainder "
            "is to stay with the natural mix"
        )
    return frozen_floats(values / max(total, 1.0))
