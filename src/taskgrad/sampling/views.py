"""What can be asked of a sampler, before, during and after a run."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

from .arrays import FloatArray, IntArray
from .data.shares import TaskShares
from .data.task_index import TaskIndex
from .decisions import Decisions
from .engine.quota import from_units
from .follow import Following
from .inputs import count_of, known
from .ledger import Ledger
from .loading.stream import Stream
from .realised import Realised
from .settings import Settings


class Views:
    """Changes nothing. ``Stream`` says where the run is, ``Decisions`` what its batches are made of, ``Following``
    brings both what a tracker tells."""

    policy: Any
    _index: TaskIndex | TaskShares
    _settings: Settings
    _decisions: Decisions
    _stream: Stream
    _following: Following

    @property
    def batch_size(self) -> int:
        """Examples in every batch that this rank gets."""
        return self._settings.global_batch_size // self._settings.num_replicas

    @property
    def num_replicas(self) -> int:
        """Ranks that the global batch is spread over."""
        return self._settings.num_replicas

    @property
    def rank(self) -> int:
        """Which of them this sampler draws for."""
        return self._settings.rank

    @property
    def drop_last(self) -> bool:
        """True: no batch is ever short. (Nothing is dropped: passes over a task go on in the next epoch.)"""
        return True

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names; the numbers "0", "1", ... until a tracker or a report brings names where there were none."""
        return self._index.tasks

    @property
    def weights(self) -> FloatArray:
        """Probabilities [T] in force for the next batch to be drawn, float64."""
        return self._decisions.weights_at(self._stream.drawn)

    @property
    def ledger(self) -> Ledger:
        """All weights that were ever in force or are about to be, with the batch, the cause and the guards."""
        return self._decisions.ledger

    @property
    def epoch(self) -> int:
        """The epoch under way, or the one that was run through last: iterations so far, whatever ``set_epoch`` says."""
        return self._stream.epoch

    @property
    def consumed(self) -> int:
        """Batches of the whole run trained on: those counted (``follow``, ``update``), without that those drawn."""
        return self._stream.consumed

    def realised(self, batch: int | None = None) -> Realised:
        """Drawn against intended mix in the batches before ``batch`` (default: the consumed ones), on all ranks, since
        the data last changed."""
        stop = self.consumed if batch is None else count_of("batch", batch, self.ledger.start)
        if stop > self._stream.drawn:
            raise ValueError(f"batch is {stop}, but only {self._stream.drawn} batches were drawn")
        return Realised.until(stop, self.tasks, self._settings, self.ledger, self._decisions.engine)

    def task_ids(self, batch: int, rank: int | Literal["global"] | None = None) -> IntArray:
        """The task of every example in ``batch``, int64 (batch size,), sorted as the batch is: indices into ``tasks``.

        That they equal a batch's ids does not prove that its rows are those of this batch: where batches may be
        skipped, let their number travel with them.

        Args:
            batch: counted over the whole run, from 0, drawn already; ``consumed`` is the one being trained on.
            rank: whose part of it, this sampler's by default; ``"global"`` for all of it.

        Raises:
            ValueError: a batch that was not drawn yet, or is from before ``rebase``; a rank that is none.
        """
        k = self._drawn_batch(batch)
        replicas, own = self.num_replicas, self.rank
        if rank is not None and rank != "global":
            own = count_of("rank", rank, 0)
            if own >= replicas:
                raise ValueError(f"rank must be below num_replicas, {replicas}, or 'global', got {own}")
        return self._ids(k, None if rank == "global" else own)

    def _ids(self, k: int, rank: int | None) -> IntArray:
        """The tasks of what ``rank`` gets of batch ``k``, None: of all of it; draws the batch."""
        counts, offset = self._decisions.engine.counts(k)
        ids: IntArray = np.repeat(np.arange(len(counts)), counts)
        return ids if rank is None else ids[(rank + offset) % self.num_replicas :: self.num_replicas]

    def _drawn_batch(self, batch: int) -> int:
        k = count_of("batch", batch, 0)
        if k >= self._stream.drawn:
            raise ValueError(f"batch {k} was not drawn yet: only {self._stream.drawn} batches were drawn")
        if k < self.ledger.start:
            raise ValueError(f"batch {k} lies before batch {self.ledger.start}, where this ledger begins (rebase)")
        return k

    @overload
    def loss_weight(self, batch: int) -> FloatArray: ...

    @overload
    def loss_weight(self, batch: int, task: str | int) -> float: ...

    def loss_weight(self, batch: int, task: str | int | None = None) -> FloatArray | float:
        """Natural share / probability in force at ``batch``, w / q: the factor that keeps the objective natural.

        Multiply the losses of each example of that batch with the factor of its task, and tasks are seen as often as
        the policy wants while the expected gradient is that of the natural mix. Off unless you do it; then tell the
        tracker: ``tracker.batch(ids, loss_weight=...)``, whose docstring has the loop. Probabilities are those of the
        ledger: slots that ``probe_every`` or ``max_epochs`` moved are not corrected.

        Args:
            batch: counted over the whole run, from 0, drawn already; ``consumed`` is the one being trained on.
            task: name or index; without it an array [T], float64.

        Raises:
            ValueError: a batch not drawn yet or from before ``rebase``, an unknown task, or a probability of 0.
        """
        k = self._drawn_batch(batch)
        weights = from_units(self.ledger.at(k).weights)
        asked = np.arange(len(self.tasks)) if task is None else np.array([self._position(task)])
        never = [self.tasks[t] for t in asked if weights[t] == 0]
        if never:
            raise ValueError(
                f"the tasks {never} had a probability of 0 at batch {k}, which no factor makes up for: give every task "
                "a share with min_weight"
            )
        factors: FloatArray = self._settings.natural[asked] / weights[asked]
        return factors if task is None else float(factors[0])

    def _position(self, task: str | int) -> int:
        if isinstance(task, str):
            return self.tasks.index(known("task", [task], self.tasks)[0])
        position = count_of("task", task, 0)
        if position >= len(self.tasks):
            raise ValueError(f"task must be below {len(self.tasks)}, got {position}; the tasks are {list(self.tasks)}")
        return position
