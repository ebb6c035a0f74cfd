"""Samplers whose task mix follows the training run.

Three counters, all in batches of the whole run (global over epochs and ranks, from 0):

- drawn: batches handed to the loader. A DataLoader with W workers and prefetch factor P is W x P batches ahead of the
  training loop; Accelerate and Lightning may add one.
- reported: batches that ``update`` was called for, that is: consumed. This is what a checkpoint holds.
- effective: what ``update`` decides on batch j enters the stream at the first multiple of ``update_every`` that is at
  least j + 1 + ``delay`` (j counted from 0, so j + 1 batches are consumed by then). ``delay`` must be at least the
  number of batches the loader is ahead, W x P; ``update`` raises when it is not, and says how much is needed. Neither
  number is read from the loader, so the stream does not depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar, overload

import numpy as np
from torch.utils.data import Sampler

from .arrays import FloatArray
from .control import Control, Realised
from .inputs import count_of, group_by_task, known, per_task
from .ledger import Ledger
from .policies import OverwriteBoost
from .quota import from_units
from .settings import Settings

_Item = TypeVar("_Item")
_FORMAT = 1


class _Adaptive(Sampler[_Item], Generic[_Item]):
    """Everything but the form of the items; the arguments are those of ``AdaptiveBatchSampler``."""

    def __init__(
        self,
        task_of_example: Any,
        batch_size: int = 64,
        policy: Any = None,
        seed: int = 0,
        *,
        tasks: Sequence[str] | None = None,
        dataset: Any = None,
        num_batches: int | None = None,
        update_every: int = 10,
        delay: int = 8,
        horizon: int | None = None,
        importance: Any = None,
        critical: str | Collection[str] = (),
        budget: float | None = None,
        probe_every: int | None = None,
        min_weight: Any = None,
        max_weight: Any = None,
        max_change: float | None = None,
        max_epochs: float | None = None,
        pinned: str | Collection[str] = (),
        resume: str = "seek",
    ) -> None:
        super().__init__()
        self.policy = OverwriteBoost() if policy is None else policy
        if isinstance(self.policy, type) or not callable(getattr(self.policy, "weights", None)):
            raise TypeError(f"policy must be an object with a method weights(report, state), got {self.policy!r}")
        self._index = group_by_task(task_of_example, tasks, dataset)
        self._settings = Settings.build(
            self._index,
            self.policy,
            seed=seed,
            batch_size=batch_size,
            num_batches=num_batches,
            update_every=update_every,
            delay=delay,
            horizon=horizon,
            resume=resume,
            importance=importance,
            critical=critical,
            budget=budget,
            probe_every=probe_every,
            min_weight=min_weight,
            max_weight=max_weight,
            max_change=max_change,
            max_epochs=max_epochs,
            pinned=pinned,
        )
        self._control = Control(self._settings, self.policy, self._index.tasks)
        self._start_at(0, first_epoch=0)

    def _start_at(self, batch: int, first_epoch: int) -> None:
        self._first_epoch = first_epoch
        self._from = self._drawn = self._reported = self._reported_most = batch
        self._epoch = first_epoch + (batch - self._control.ledger.start) // self._settings.length
        self._finished = False
        self._counting = False

    @property
    def batch_size(self) -> int:
        """Examples in every batch."""
        return self._settings.batch_size

    @property
    def drop_last(self) -> bool:
        """True: no batch is ever short. (Nothing is dropped: passes over a task go on in the next epoch.)"""
        return True

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names; the numbers "0", "1", ... until a report brings names where ``tasks`` was not given."""
        return self._index.tasks

    @property
    def weights(self) -> FloatArray:
        """Probabilities [T] in force for the next batch to be drawn, float64."""
        return from_units(self._control.ledger.at(self._drawn).weights)

    @property
    def ledger(self) -> Ledger:
        """All weights that were ever in force or are about to be, with the batch, the cause and the guards."""
        return self._control.ledger

    @property
    def epoch(self) -> int:
        """The epoch under way, or the one that was run through last."""
        return self._epoch

    @property
    def consumed(self) -> int:
        """Batches of the whole run trained on: those reported, or, before any ``update``, those drawn."""
        return self._reported if self._counting else max(self._drawn, self._from)

    def realised(self, batch: int | None = None) -> Realised:
        """Drawn against intended mix in the batches before ``batch`` (default: the consumed ones), since the data
        last changed."""
        stop = self.consumed if batch is None else count_of("batch", batch, self.ledger.start)
        if stop > max(self._drawn, self._from):
            raise ValueError(f"batch is {stop}, but only {self._drawn} batches were drawn")
        return self._control.realised(stop)

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
            batch: counted over the whole run, from 0, drawn already.
            task: name or index; without it an array [T], float64.

        Raises:
            ValueError: a batch not drawn yet or from before ``rebase``, an unknown task, or a probability of 0.
        """
        k = count_of("batch", batch, 0)
        if k >= self._drawn:
            raise ValueError(f"batch {k} has no loss weight yet: only {self._drawn} batches were drawn")
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

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` run through ``epoch``, from its start; the one just loaded, from where it was."""
        epoch = count_of("epoch", epoch, 0)
        if epoch < self._first_epoch:
            raise ValueError(f"epoch {epoch} was drawn from other data: since rebase, the first is {self._first_epoch}")
        if epoch != self._epoch or self._finished:
            self._from = self._start_of(epoch)
        self._epoch = epoch
        self._finished = False

    def _start_of(self, epoch: int) -> int:
        return self.ledger.start + (epoch - self._first_epoch) * self._settings.length

    def _batches(self) -> Iterator[list[int]]:
        # A generator: nothing may happen before the first batch is asked for, since a DataLoader with workers calls
        # iter() twice. An epoch whose last batch was drawn is over; one that was left before is run through again.
        if self._finished:
            self.set_epoch(self._epoch + 1)
        start, stop = self._from, self._start_of(self._epoch + 1)
        self._reported = start
        if self._settings.resume == "replay":
            start = self._start_of(self._epoch)
        control = self._control
        for k in range(start, stop):
            control.enter_before(k + 1)
            examples = self._index.examples(control.engine, k)
            self._drawn = k + 1
            self._finished = k + 1 == stop
            yield examples

    def update(self, report: Any = None, *, batch: int | None = None, lr: float | None = None) -> None:
        """Count a consumed batch, and let the policy see its report.

        Call it once per batch of the loader, after training on it. Without ``batch`` it is on the first batch not
        yet reported. With gradient accumulation call it for every micro-batch (a report whose ``step`` was already
        given counts the batch only), or once per step with the index of the step's last batch. No report, one with
        ``valid`` False, and one on a batch that was reported before (an epoch run through again) count only. ``lr``
        is handed to the policy.

        Raises ValueError for a report on other tasks or of a step before the last one reported (another tracker's), for
        a batch not drawn or before one already reported, and when the change would fall on a batch already drawn: the
        message names the ``delay`` needed.
        """
        b = self._reported if batch is None else count_of("batch", batch, 0)
        if b >= self._drawn:
            raise ValueError(
                f"update is on batch {b}, but only {self._drawn} batches were drawn from this sampler: call it once "
                "per batch, on the sampler object that the loader draws from"
            )
        if b < self._reported:
            raise ValueError(f"update is on batch {b}, but batch {self._reported} is the first one not yet reported")
        if report is not None:
            if not all(hasattr(report, name) for name in ("tasks", "valid")):
                raise TypeError(f"report must be a StepReport (tracker.report()), got {type(report).__name__}")
            self._adopt(tuple(report.tasks))
            if b >= self._reported_most and getattr(self.policy, "adaptive", True):
                self._control.decide(report, b, self._drawn, lr)
        self._control.enter_before(b + 2 + self._settings.delay)  # no later report can replace such a decision
        self._counting = True
        self._reported = b + 1
        self._reported_most = max(self._reported_most, b + 1)

    def _adopt(self, reported: tuple[str, ...]) -> None:
        if reported == self.tasks:
            return
        if self._index.named or len(reported) != len(self.tasks):
            raise ValueError(
                f"the report is on the tasks {list(reported)}, the sampler has {list(self.tasks)}: give tracker and "
                "sampler the same tasks in the same order (tasks=...)"
            )
        self._rename(reported)

    def _rename(self, names: tuple[str, ...]) -> None:
        self._index = replace(self._index, tasks=names, named=True)
        self._control.tasks = names

    def observe(self, eval_losses: Mapping[str, float] | Sequence[float]) -> None:
        """Evaluation losses for the policy: by task name (some may be missing) or one per task, all finite.

        A policy reads the last ones given, from the next report on; none is needed.
        """
        if not isinstance(eval_losses, Mapping):
            values = per_task("eval_losses", eval_losses, self.tasks, 0.0)
            eval_losses = dict(zip(self.tasks, values.tolist(), strict=True))
        names = known("eval_losses", eval_losses, self.tasks)
        losses = {name: float(loss) for name, loss in zip(names, eval_losses.values(), strict=True)}
        bad = {name: loss for name, loss in losses.items() if not np.isfinite(loss)}
        if bad:
            raise ValueError(f"eval_losses must be finite, got {bad}: leave out what could not be measured")
        self._control.observe(losses)

    def state_dict(self, *, consumed: int | None = None) -> dict[str, Any]:
        """JSON-able state after the consumed batches, whatever a loader has drawn beyond them.

        Before any ``update`` the sampler only knows what was drawn: where a loader with workers draws ahead, call
        ``update()`` after each batch, or pass ``consumed``, the number of batches trained on.
        """
        at = self.consumed if consumed is None else count_of("consumed", consumed, self.ledger.start)
        if at > max(self._drawn, self._from):
            raise ValueError(f"consumed is {at}, but only {self._drawn} batches were drawn")
        return {
            "format": _FORMAT,
            "settings": self._settings.to_dict(),
            "policy": self._control.policy_name,
            "tasks": list(self.tasks),
            "named": self._index.named,
            "first_epoch": self._first_epoch,
            "consumed": at,
            "reported_most": max(self._reported_most, at),
            "counting": self._counting,
            **self._control.to_dict(at),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; see ``resume`` for where the next ``iter()`` begins.

        ``delay``, ``update_every``, ``horizon``, ``importance`` and ``critical`` may differ from the saved sampler's;
        anything else raises ValueError. A schedule that is in the ledger already stays. For other data or tasks there
        is ``rebase``.
        """
        ledger = _saved_ledger(state)
        sizes = tuple(self._settings.sizes.tolist())
        renamed = self._index.named and state["named"] and tuple(state["tasks"]) != self.tasks
        if ledger.sizes != sizes or renamed:
            raise ValueError(
                f"the saved ledger is for tasks of sizes {dict(zip(state['tasks'], ledger.sizes, strict=True))}, this "
                f"sampler's data are {dict(zip(self.tasks, sizes, strict=True))}: call rebase(state) to continue the "
                "run on other data, in a new ledger era"
            )
        if ledger.data != self._settings.data:
            raise ValueError(
                f"the saved ledger is for other examples of the same number per task: saved {ledger.data}, here "
                f"{self._settings.data} (ids and ranges count as different): call rebase(state) to continue the run "
                "on other data, in a new ledger era"
            )
        saved = {**state["settings"], "policy": state["policy"]}
        here = {**self._settings.to_dict(), "policy": self._control.policy_name}
        differ = [name for name in here if saved.get(name) != here[name]]
        if differ:
            listed = "; ".join(f"{name}: saved {saved.get(name)!r}, here {here[name]!r}" for name in differ)
            raise ValueError(f"the sampler differs from the saved one ({listed}): build it the same way")
        if state["named"]:
            self._rename(tuple(state["tasks"]))
        self._control.restore(state, ledger)
        self._start_at(state["consumed"], state["first_epoch"])
        self._reported_most = state["reported_most"]
        self._counting = state["counting"]

    def rebase(self, state: Mapping[str, Any]) -> None:
        """Take over a run whose tasks or sizes differ from this sampler's data, at its first batch not consumed.

        Opens a new ledger era that keeps the earlier ones on record. A new epoch begins there; passes, ``max_epochs``
        and the policy start afresh, and batches before it can no longer be drawn again.
        """
        ledger = _saved_ledger(state)
        consumed = state["consumed"]
        epochs = -(-(consumed - ledger.start) // state["settings"]["num_batches"])
        past = [*ledger.past, {**ledger.to_dict(), "past": [], "tasks": list(state["tasks"])}]
        settings = self._settings
        self._control.open_era(
            Ledger(settings.sizes, data=settings.data, start=consumed, era=ledger.era + 1, past=past)
        )
        self._start_at(consumed, state["first_epoch"] + epochs)

    def __len__(self) -> int:
        return self._settings.length


def _saved_ledger(state: Mapping[str, Any]) -> Ledger:
    if state.get("format") != _FORMAT:
        raise ValueError(f"not a sampler state of format {_FORMAT}; its keys are {sorted(state)[:6]}")
    return Ledger.from_dict(state["ledger"])


class AdaptiveBatchSampler(_Adaptive[list[int]]):
    """Yields lists of data set indices, sorted by task, for ``DataLoader(dataset, batch_sampler=...)``.

    Args:
        task_of_example: one task per example of the data set: indices into ``tasks`` (list, array or tensor of
            integers) or names. Where each task lies in one piece, a mapping instead: name -> number of examples (one
            task after the other, as in a ConcatDataset) or name -> range(start, stop). For very large data sets a
            ``TaskIndex``.
        batch_size: examples in every batch.
        policy: decides the mix from reports (``taskgrad.policies``); ``OverwriteBoost()`` by default.
        seed: with the data's sizes, the ledger and the guards it determines every batch.
        tasks: names, in the order the tracker has them. Without it they are those of a mapping or a ``TaskIndex``,
            else tasks are numbered; the first report names them.
        dataset: only its length is read, to check ``task_of_example`` against it.
        num_batches: batches in an epoch, by default ceil(examples / batch_size). Every batch is full.
        update_every: weights change only at batches that are multiples of it.
        delay: see the module's docstring; the default covers four workers with the usual prefetch factor of 2.
        horizon: batches of the whole run, for policies with a schedule.
        importance: weight of each task, positive, for policies that use one (``OverwriteBoost``; the published
            baselines do not): a mapping (1 for the others), one per task, or a number for all.
        critical: tasks that ``OverwriteBoost`` never gives up on, however little a raise has bought so far.
        budget: the largest share of a batch that may be diverted from the natural mix.
        probe_every: a task unseen for that many batches takes a slot.
        min_weight, max_weight: bounds on each task's share: a number for all, a mapping or one per task.
        max_change: the largest factor between a task's share and its predecessor.
        max_epochs: passes after which a task gets no more; its share goes to the others in proportion.
        pinned: tasks that the policy cannot raise: with a budget they give way like the natural mix does, without
            one they keep their natural share.
        resume: after ``load_state_dict``, ``"seek"`` continues at the first batch not consumed; ``"replay"`` starts
            that batch's epoch again, for loaders that draw it again and skip (transformers' Trainer).

    Guards left at None are the policy's own defaults (``guard_defaults``), or off. Where they collide, the stronger
    wins: max_epochs, probe_every, min_weight, budget, max_change, policy. Raises TypeError or ValueError.
    """

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches()


class AdaptiveSampler(_Adaptive[int]):
    """The same stream, one index at a time, for loaders that want a ``sampler`` and batch by themselves.

    They must batch by the same ``batch_size``; ``len`` counts examples. Everything else is as in
    ``AdaptiveBatchSampler``, and still counted in batches.
    """

    def __iter__(self) -> Iterator[int]:
        for batch in self._batches():
            yield from batch

    def __len__(self) -> int:
        return self._settings.length * self.batch_size
