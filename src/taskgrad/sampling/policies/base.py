"""What a policy is given and what it returns.

A policy turns a step report into the probabilities that the next batches should be drawn with. It is pure: everything
it may remember lives in ``state.memory``, a dict that it owns, that holds only JSON-able values, and that the sampler
saves and restores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ..arrays import BoolArray, FloatArray, IntArray


class ReportLike(Protocol):
    """The part of a ``StepReport`` that the sampler itself reads."""

    @property
    def tasks(self) -> tuple[str, ...]: ...

    @property
    def step(self) -> int: ...

    @property
    def valid(self) -> bool: ...


@dataclass(frozen=True)
class PolicyState:
    """Read-only surroundings of one decision; arrays have one value per task ([T]) and are not writable.

    - ``tasks``: names. ``sizes``: examples in the data set, int64, or None where only their shares are known (streams).
      ``natural``: sizes / sum(sizes), or these shares.
    - ``importance``: what the user passed to the sampler, ones by default, all positive. ``critical``: bool, tasks that
      the user never wants given up on.
    - ``batch_size``: examples in a batch, on all ranks together. ``horizon``: batches of the whole run, or None.
      ``lr``: or None.
    - ``step``: index (from 0) of the batch that the report is on; -1 before the first report.
    - ``budget``: the largest share of a batch that may leave the natural mix, or None.
    - ``realised``: share of each task among all examples drawn up to that batch (zeros before the first).
    - ``epochs``: passes over each task's examples drawn up to that batch (fractional), or None as ``sizes``.
    - ``weights``: the probabilities in force when that batch was drawn.
    - ``eval_losses``: the last losses given to ``sampler.observe``, by task name, or None. ``evaluations``: how often
      there were any.
    - ``memory``: the policy's own, mutable, JSON-able.
    - ``proposed``: only for ``why``, the probabilities that are to follow ``weights``, as the guards let them through.
    """

    tasks: tuple[str, ...]
    sizes: IntArray | None
    natural: FloatArray
    importance: FloatArray
    critical: BoolArray
    batch_size: int
    horizon: int | None
    lr: float | None
    step: int
    budget: float | None
    realised: FloatArray
    epochs: FloatArray | None
    weights: FloatArray
    eval_losses: Mapping[str, float] | None
    memory: dict[str, Any]
    evaluations: int = 0
    proposed: FloatArray | None = None


class Policy(ABC):
    """Base of the policies; any object with ``weights`` will do, the rest then takes the values given here.

    ``adaptive`` is False for policies that never look at a report: the sampler then only counts batches in
    ``update``. ``guard_defaults`` are the guards (names of sampler arguments) that the policy wants where the user
    gave none.
    """

    adaptive: ClassVar[bool] = True
    guard_defaults: ClassVar[Mapping[str, float]] = {}

    def initial(self, state: PolicyState) -> FloatArray:
        """Probabilities [T] before the first report: the natural mix."""
        return state.natural

    @abstractmethod
    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """Probabilities [T] asked for; where they sum to less than 1, the remainder stays with the natural mix."""

    def why(self, state: PolicyState) -> str:
        """A line for the ledger on the change from ``state.weights``, those in force before it, to ``state.proposed``.

        Asked for right after ``weights``, where its answer changes the mix. The ledger keeps 120 characters. Empty, as
        here: the sampler says which shares move most.
        """
        return ""


class FixedPolicy(Policy):
    """A policy whose probabilities depend on data and batch alone: in force from batch 0, reports are not read."""

    adaptive: ClassVar[bool] = False

    def initial(self, state: PolicyState) -> FloatArray:
        """The probabilities that the run begins with."""
        return self.weights(None, state)

    def changes(self, state: PolicyState) -> Sequence[int]:
        """Batches of the run from which on ``weights`` gives others, ascending; entered when the sampler is built."""
        return ()
