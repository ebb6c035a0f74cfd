"""Counting the batches that were trained on, and what is told of them: reports, evaluations, names of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .._ranks import world_size
from .agreement import Agreement
from .inputs import count_of, known, per_task
from .views import Views


class Counting(Views):
    """By a tracker (``follow``) or by hand (``update``)."""

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
            if b >= stream.most and self._decisions.policy.adaptive:
                with stream.lock:
                    self._decisions.decide_by_hand(report, b, lr, stream)
        self._start_by_hand()
        with stream.lock:
            stream.count(b)
            self._decisions.enter_before(b + 2 + self._settings.delay)  # no later report can replace such a decision
            self._decisions.settle(stream, self._following.hand_over)

    def _start_by_hand(self) -> None:
        if not self._stream.counting:
            self._stream.start_counting(by_hand=True)
            self._join_ranks(None)

    def _join_ranks(self, group: Any) -> None:
        """Have the ranks agree on one ledger from now on, where there are any to agree with."""
        replicas = self._settings.num_replicas
        if self._decisions.agreement is None and replicas > 1 and world_size(group) == replicas:
            self._decisions.agree_with(Agreement(group, self._settings.rank), self.consumed)

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
        self._decisions.tasks = names

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
