"""Samplers whose task mix follows the training run.

``Stream`` says where the run is, ``Control`` what the next batches are made of, ``Following`` brings both what a
tracker tells.
"""

from __future__ import annotations

import copy
import reprlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from torch.utils.data import Sampler

from .._ranks import world_size
from . import loaders
from .agreement import Agreement
from .arrays import FloatArray, IntArray
from .control import Control, Realised
from .drawing import Drawing, Examples
from .follow import Following
from .inputs import count_of, group_by_task, known, per_task
from .ledger import Ledger
from .live_state import LiveState
from .policies import OverwriteBoost
from .quota import from_units
from .settings import Settings
from .shares import TaskShares
from .state import check, seal
from .stream import Stream
from .task_index import TaskIndex

_Item = TypeVar("_Item")


class _Adaptive(Sampler[_Item], Generic[_Item]):
    """Everything but the form of the items; the arguments are those of ``AdaptiveBatchSampler``."""

    def __init__(
        self,
        task_of_example: Any = None,
        batch_size: int = 64,
        policy: Any = None,
        seed: int = 0,
        *,
        shares: Mapping[str, float] | None = None,
        tasks: Sequence[str] | None = None,
        dataset: Any = None,
        num_batches: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        update_every: int = 10,
        delay: int | None = None,
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
        if (task_of_example is None) == (shares is None):
            raise TypeError(
                "pass task_of_example, the task of every example, or, for a stream whose examples nobody has counted, "
                "shares={name: share of the stream}"
            )
        self._index: TaskIndex | TaskShares
        if shares is None:
            self._index = group_by_task(task_of_example, tasks, dataset)
        elif dataset is not None:
            raise TypeError("dataset is checked against task_of_example; with shares there is nothing to check")
        else:
            self._index = TaskShares.build(shares, tasks)
        if (num_replicas is None) != (rank is None):
            raise TypeError("pass num_replicas and rank together, as to a DistributedSampler, or neither")
        self._sharded = num_replicas is not None
        replicas = 1 if num_replicas is None else count_of("num_replicas", num_replicas, 1)
        self._rank = 0 if rank is None else count_of("rank", rank, 0)
        if self._rank >= replicas:
            raise ValueError(f"rank must be below num_replicas, {replicas}, got {self._rank}")
        settings = Settings.build(
            self._index,
            self.policy,
            seed=seed,
            batch_size=batch_size,
            num_replicas=replicas,
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
        self._begin(settings)

    def _begin(self, settings: Settings) -> None:
        self._settings = settings
        self._control = Control(settings, self.policy, self._index.tasks)
        self._stream = self._new_stream(self._control.ledger.start, 0)
        self._following = Following(self._stream, self._control, self.task_ids)
        self._warned = False

    def _new_stream(self, start: int, first_epoch: int) -> Stream:
        settings = self._settings
        return Stream(start, settings.length, first_epoch=first_epoch, replay=settings.resume == "replay")

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
        return self._rank

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
        return self._control.weights_at(self._stream.drawn)

    @property
    def ledger(self) -> Ledger:
        """All weights that were ever in force or are about to be, with the batch, the cause and the guards."""
        return self._control.ledger

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
        return self._control.realised(stop)

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
        replicas = self._settings.num_replicas
        own = self._rank
        if rank is not None and rank != "global":
            own = count_of("rank", rank, 0)
            if own >= replicas:
                raise ValueError(f"rank must be below num_replicas, {replicas}, or 'global', got {own}")
        counts, offset = self._control.engine.counts(k)
        ids: IntArray = np.repeat(np.arange(len(counts)), counts)
        return ids if rank == "global" else ids[(own + offset) % replicas :: replicas]

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

    # -- drawing ------------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """For loaders that call it: changes nothing. They count from 0 in every process, the stream goes on; to run an
        epoch again there is ``rewind``."""
        count_of("epoch", epoch, 0)

    def rewind(self, epoch: int) -> None:
        """Let the next ``iter()`` run through ``epoch`` again, from its start; what came after it follows again too.

        Reports on batches that were counted before do not decide again. Raises ValueError for an epoch that has not
        begun, or is from before ``rebase``.
        """
        self._stream.rewind(count_of("epoch", epoch, 0))

    def _drawing(self) -> Drawing:
        shards = loaders.shards()
        if shards > 1:
            raise RuntimeError(
                f"Accelerate is about to spread the batches of this sampler over {shards} processes, each of which "
                "would count a few of them only: build the sampler with num_replicas and rank and leave its loader out "
                "of accelerator.prepare(), or use taskgrad.integrations.accelerate.prepare(accelerator, tracker, "
                "sampler, loader) in its place"
            )
        ranks = world_size()
        if ranks > 1 and not self._sharded and not self._warned:
            self._warned = True
            warnings.warn(
                f"taskgrad: {ranks} ranks are up, and all of them draw the same batches from this sampler: build it "
                f"with num_replicas={ranks}, rank=torch.distributed.get_rank() and batch_size per rank (with "
                "num_replicas=1, rank=0 where they are to train on the same ones)",
                stacklevel=3,
            )
        return Drawing(self._stream, self._draw)

    def _draw(self, k: int) -> list[int]:
        control, settings = self._control, self._settings
        self._following.hand_over(k - 1 - settings.delay)
        control.enter_before(k + 1)
        if isinstance(self._index, TaskShares):
            counts, offset = control.engine.counts(k)
            first, step = (self._rank + offset) % settings.num_replicas, settings.num_replicas
            tasks: list[int] = np.repeat(np.arange(len(counts)), counts)[first::step].tolist()
            return tasks
        return self._index.examples(control.engine, k, self._rank)

    # -- counting -----------------------------------------------------------------------------------------------------

    def follow(self, tracker: Any) -> None:
        """Let ``tracker`` count the batches and hand over its reports; call it once, before training.

        Every ``tracker.batch()`` that is left, by an exception too, counts one batch of the loader, unless it was an
        evaluation (gradients off, when it was entered or in every forward of the model inside it) or entered with
        ``advance=False``: for further ones on the same batch of the loader (GANs, SAM, contrastive pairs). Loader
        batches without one are counted by ``advance``. Every report reaches the policy, in order, with the optimizer's
        learning rate. What was drawn before counts as looked at only, but for epochs that were run through. A batch
        that raised is counted: enter it with ``advance=False`` when it is tried again. Where the tracker is removed,
        what is drawn is taken for trained on from then on.

        A change that comes after its batch was drawn enters later, is marked so in the ledger, and warned of once.

        Raises:
            TypeError: not a tracker.
            ValueError: a tracker of other tasks.
        """
        if not hasattr(tracker, "subscribe"):
            raise TypeError(f"tracker must be what taskgrad.track returned, got {type(tracker).__name__}")
        before = self._following.tracker
        if before is tracker:
            return
        self._adopt(tuple(tracker.tasks), "tracker")
        tracker.subscribe(self._following)
        if before is not None:
            before.unsubscribe(self._following)
        self._following.tracker = tracker
        self._stream.start_counting(by_hand=False)
        self._stream.followed = True
        self._join_ranks(tracker.process_group)

    def advance(self, batches: int = 1) -> None:
        """Count batches of the loader that no ``tracker.batch()`` or ``update()`` was called for.

        Raises ValueError beyond what was drawn.
        """
        n = count_of("batches", batches, 0)
        counted, drawn = self._stream.uncounted, self._stream.drawn
        if counted + n > drawn:
            raise ValueError(
                f"advance({n}) goes beyond what was drawn: {counted} batches are counted, and {drawn} were drawn from "
                "this sampler"
            )
        self._start_by_hand()
        for _ in range(n):
            self._following.counted(None)

    def update(self, report: Any = None, *, batch: int | None = None, lr: float | None = None) -> None:
        """Count a consumed batch, and let the policy see its report: by hand what ``follow`` does.

        Call it once per batch of the loader, after training on it. Without ``batch`` it is on the first batch not
        yet reported. With gradient accumulation call it for every micro-batch (a report whose ``step`` was already
        given counts the batch only), or once per step with the index of the step's last batch. No report, one with
        ``valid`` False, and one on a batch that was reported before (an epoch run through again) count only. ``lr``
        is handed to the policy.

        Raises RuntimeError where the sampler follows a tracker, and ValueError for a report on other tasks or of a step
        before the last one reported (another tracker's), for a batch not drawn or before one already reported, and when
        the change would fall on a batch already drawn: the message says what was wrong.
        """
        stream = self._stream
        if self._following.tracker is not None:
            raise RuntimeError(
                "this sampler follows a tracker, which hands over every report and counts every batch: leave update() "
                "out (advance(n) counts batches of the loader without a tracker.batch())"
            )
        following = stream.uncounted
        b = following if batch is None else count_of("batch", batch, 0)
        if b >= stream.drawn:
            raise ValueError(
                f"update is on batch {b}, but only {stream.drawn} batches were drawn from this sampler: call it once "
                "per batch of the loader, on the sampler object that the loader draws from"
            )
        if b < following:
            raise ValueError(f"update is on batch {b}, but batch {following} is the first one not yet reported")
        if report is not None:
            if not all(hasattr(report, name) for name in ("tasks", "valid")):
                raise TypeError(f"report must be a StepReport (tracker.report()), got {type(report).__name__}")
            self._adopt(tuple(report.tasks), "report")
            if b >= stream.most and self._control.adaptive:
                with stream.lock:
                    self._control.decide_by_hand(report, b, lr, stream)
        self._start_by_hand()
        with stream.lock:
            stream.count(b)
            self._control.enter_before(b + 2 + self._settings.delay)  # no later report can replace such a decision
            self._control.settle(stream, self._following.hand_over)

    def _start_by_hand(self) -> None:
        if not self._stream.counting:
            self._stream.start_counting(by_hand=True)
            self._join_ranks(None)

    def _join_ranks(self, group: Any) -> None:
        """Have the ranks agree on one ledger from now on, where there are any to agree with."""
        replicas = self._settings.num_replicas
        if self._control.agreement is None and replicas > 1 and world_size(group) == replicas:
            self._control.agree_with(Agreement(group, self._rank), self.consumed)

    def _adopt(self, names: tuple[str, ...], whose: str) -> None:
        if names == self.tasks:
            return
        if self._index.named or len(names) != len(self.tasks):
            raise ValueError(
                f"the {whose} is on the tasks {list(names)}, the sampler has {list(self.tasks)}: give tracker and "
                "sampler the same tasks in the same order (tasks=...)"
            )
        self._rename(names)

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
        self._following.observe(losses)

    # -- saved and loaded ---------------------------------------------------------------------------------------------

    def state_dict(self, *, consumed: int | None = None) -> dict[str, Any]:
        """JSON-able state after the consumed batches, whatever a loader has drawn beyond them.

        Where nobody counts, the sampler only knows what was drawn: call ``follow`` (or ``update()`` after each batch)
        before, or pass ``consumed``, the number of batches trained on.

        ``torch.distributed.checkpoint`` fills only the keys that a state has already: give it ``json.dumps(state)``.
        """
        if consumed is None and loaders.keeps_state():
            return LiveState(self._state)
        return self._state(consumed)

    def _state(self, consumed: int | None = None) -> dict[str, Any]:
        with self._stream.lock:
            self._following.flush()
            at = self.consumed if consumed is None else count_of("consumed", consumed, self.ledger.start)
            if at > self._stream.drawn:
                raise ValueError(f"consumed is {at}, but only {self._stream.drawn} batches were drawn")
            if consumed is None:
                self._stream.tell_of_drawn()
            position = self._stream.to_dict(at)
            return seal(
                {
                    "settings": self._settings.to_dict(),
                    "policy": self._control.policy_name,
                    "tasks": list(self.tasks),
                    "named": self._index.named,
                    **position,
                    **self._control.to_dict(at, position["epoch"][1]),
                }
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; see ``resume`` for where the next ``iter()`` begins.

        ``delay``, ``update_every``, ``horizon``, ``importance`` and ``critical`` may differ from the saved sampler's,
        and ``num_replicas`` while the global batch stays; anything else raises ValueError. A schedule that is in the
        ledger already stays. For other data or tasks there is ``rebase``.

        Raises:
            TypeError, KeyError, ValueError: a field is missing, damaged, changed since it was saved, or of a sampler
                built otherwise; the message names it. The sampler is then as it was.
        """
        state, ledger = check(state)
        self._check_same_data(state, ledger)
        self._check_built_alike(state)
        engine = self._control.prepare(state, ledger)
        with self._stream.lock:
            if state["named"]:
                self._rename(tuple(state["tasks"]))
            self._control.restore(state, ledger, engine)
            self._stream.restore(state)
            self._following.restart()
        tracker = self._following.tracker
        if tracker is not None:
            self._stream.start_counting(by_hand=False)
            self._stream.followed = True
        if self._stream.counting:
            self._join_ranks(None if tracker is None else tracker.process_group)

    def _check_same_data(self, state: Mapping[str, Any], ledger: Ledger) -> None:
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
                f"{self._settings.data} (ids, ranges and shares count as different): call rebase(state) to continue "
                "the run on other data, in a new ledger era"
            )

    def _check_built_alike(self, state: Mapping[str, Any]) -> None:
        saved = {**state["settings"], "policy": state["policy"]}
        here = {**self._settings.to_dict(), "policy": self._control.policy_name}
        size, replicas = saved.get("global_batch_size"), self.num_replicas
        if type(size) is int and 0 < size != here["global_batch_size"]:
            if size % replicas == 0:
                remedy = f"pass batch_size={size // replicas}"
            else:
                remedy = f"no batch_size on {replicas} ranks keeps it, use a number of ranks that divides {size}"
            raise ValueError(
                f"the saved run has batches of {size} examples on all ranks together, this sampler's have {replicas} x "
                f"{self.batch_size}: {remedy}"
            )
        unknown = sorted(set(saved) - set(here))
        if unknown or "policy" in state["settings"]:
            raise ValueError(f"the field 'settings' of the sampler's state has {unknown or ['policy']}, unknown here")
        differ = [name for name in here if name not in saved or saved[name] != here[name]]
        if differ:
            listed = "; ".join(
                f"{name}: saved {reprlib.repr(saved.get(name))}, here {reprlib.repr(here[name])}" for name in differ
            )
            raise ValueError(f"the sampler differs from the saved one ({listed}): build it the same way")
        if state["epoch"][2] - state["epoch"][1] != self._settings.length:
            raise ValueError(f"the field 'epoch' of the sampler's state is no epoch of {self._settings.length} batches")

    def rebase(self, state: Mapping[str, Any]) -> None:
        """Take over a run whose tasks or sizes differ from this sampler's data, at its first batch not consumed.

        Opens a new ledger era that keeps the earlier ones on record. A new epoch begins there; passes, ``max_epochs``
        and the policy start afresh, and batches before it can no longer be drawn again. Raises what
        ``load_state_dict`` does for a damaged state.
        """
        state, ledger = check(state)
        consumed: int = state["consumed"]
        epoch, start, _ = state["epoch"]
        past = [*ledger.past, {**ledger.to_dict(), "past": [], "tasks": list(state["tasks"])}]
        settings = self._settings
        new = Ledger(settings.sizes, data=settings.data, start=consumed, era=ledger.era + 1, past=past)
        following = self._following
        self._control = Control(settings, self.policy, self._index.tasks, new)
        self._stream.jump()
        self._stream = self._new_stream(consumed, epoch + (consumed > start))
        self._following = Following(self._stream, self._control, self.task_ids)
        if following.tracker is not None:
            following.tracker.unsubscribe(following)
            self.follow(following.tracker)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which go on where this sampler is and follow no tracker."""
        made_anew = ("_control", "_stream", "_following", "_warned")
        kept = {name: value for name, value in self.__dict__.items() if name not in made_anew}
        return {**kept, "_saved": self._state()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in kept.items() if name != "_saved"})
        self._begin(self._settings)
        self.load_state_dict(kept["_saved"])

    def __copy__(self) -> _Adaptive[_Item]:
        twin = type(self).__new__(type(self))
        # whatever a policy of the user's keeps outside of its memory is not shared; the data's index is never changed
        twin.__setstate__({**self.__getstate__(), "policy": copy.deepcopy(self.policy)})
        return twin

    def __len__(self) -> int:
        return self._settings.length


class AdaptiveBatchSampler(_Adaptive[list[int]]):
    """Yields lists of data set indices, sorted by task, for ``DataLoader(dataset, batch_sampler=...)``.

    Every ``iter()`` yields ``len`` batches, from the first one not consumed, whether the last epoch was run through,
    left early, or only looked into. Consumed is what ``follow`` or ``update`` counts, without them what was drawn.

    Args:
        task_of_example: one task per example of the data set: indices into ``tasks`` (list, array or tensor of
            integers) or names. Where each task lies in one piece, a mapping instead: name -> number of examples (one
            task after the other, as in a ConcatDataset) or name -> range(start, stop). For very large data sets a
            ``TaskIndex``.
        batch_size: examples in every batch, of one rank.
        policy: decides the mix from reports (``taskgrad.policies``); ``OverwriteBoost()`` by default.
        seed: with the data's sizes, the ledger and the guards it determines every batch.
        shares: instead of ``task_of_example``, for streams: task -> its natural share of the examples. Tasks are drawn
            then, not examples: batches hold task indices, there are no passes, and ``num_batches`` must be given.
        tasks: names, in the order the tracker has them. Without it they are those of a mapping or a ``TaskIndex``,
            else tasks are numbered; the tracker followed, or the first report, names them.
        dataset: only its length is read, to check ``task_of_example`` against it.
        num_batches: batches in an epoch, by default ceil(examples / (batch_size * num_replicas)). Every batch is full.
        num_replicas, rank: as of a ``DistributedSampler``, but never read from a process group: of every global batch
            this sampler draws the part of ``rank``: rows of it that no other rank gets, together all of them, and
            over the run about as many of every task as the others' (see ``sampling.replicas``).
        update_every: weights change only at batches that are multiples of it.
        delay: batches between a report and its effect, at least: as many as the loader may draw ahead
            (``num_workers * prefetch_factor``; Accelerate one more, and times the processes). 64 by default; in a run
            whose ``horizon`` is short a sixteenth of it, at least 8.
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
        resume: after ``load_state_dict`` in the middle of an epoch, ``"seek"`` continues at the first batch not
            consumed; ``"replay"`` starts that epoch again, for loaders that draw it again and skip (transformers'
            Trainer).

    Guards left at None are the policy's own defaults (``guard_defaults``), or off. Where they collide, the stronger
    wins: max_epochs, probe_every, min_weight, budget, max_change, policy. Raises TypeError or ValueError.
    """

    def __iter__(self) -> Iterator[list[int]]:
        return self._drawing()


class AdaptiveSampler(_Adaptive[int]):
    """The same stream, one index at a time, for loaders that want a ``sampler`` and batch by themselves.

    They must batch by the same ``batch_size``; ``len`` counts examples. Everything else is as in
    ``AdaptiveBatchSampler``, and still counted in batches.
    """

    def __iter__(self) -> Iterator[int]:
        return Examples(self._drawing(), self.batch_size)

    def __len__(self) -> int:
        return self._settings.length * self.batch_size
