"""What a user holds of a tracked model: ``tracker.batch``, ``tracker.report`` and their kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..capture.accumulation import in_backward
from ..capture.root_hooks import RootHooks
from ..capture.shared_row import make_plain
from ..capture.task_rows import Rows, counts_by_task
from ..checks.row_check import RowCheck
from ..parameters.coverage import Coverage
from ..parameters.gauges import Gauges
from ..report import StepReport
from .batch_arguments import check_batch, check_ids
from .batches import Batch, Batches
from .delivery import Delivery, Listener
from .optimizer_hooks import StepHooks
from .schedule import Schedule
from .state import SKETCH_SEED, Load, check_state, state_of
from .step_probe import StepProbe
from .steps import Steps

Mode = Literal["sketch", "exact_gram", "exact"]


class TaskGradTracker:
    """Per-task gradient statistics of a model in training; made by ``taskgrad.track``."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        optimizers: Sequence[Optimizer],
        *,
        mode: Mode,
        every: int,
        max_unmeasured: int | None,
        sketch_dim: int,
        memory_decay: float,
        loss_scale: GradScaler | Tensor | None,
        verify: bool,
        process_group: dist.ProcessGroup | None,
        include: Callable[[str, nn.Module], bool] | None,
    ) -> None:
        self.model = model
        self.tasks = tuple(tasks)
        self.mode = mode
        self.sketch_dim = sketch_dim
        self.process_group = process_group
        self._batches = Batches()
        width = None if mode == "exact" else sketch_dim
        exact_gram = mode == "exact_gram"
        self._gauges = Gauges(model, self._batches, len(self.tasks), width, SKETCH_SEED, include, exact_gram)
        try:
            self._root = RootHooks(model, self._called, self._returned)
            self._row_check = RowCheck(model, self._batches, self._gauges.sites, verify, process_group)
            self._steps = Steps(
                self.tasks,
                self._gauges,
                self._batches,
                self._row_check,
                schedule=Schedule(every, max_unmeasured, len(self.tasks)),
                memory_decay=memory_decay,
                loss_scale=loss_scale,
                check_sums=verify,
                group=process_group,
                by_hand=not optimizers,
            )
            self._removed = False
            self._doubtful: Batch | None = None  # of an unmeasured step, which only looked like an evaluation, maybe
            self._listener: Listener | None = None
            self._hooks = StepHooks(optimizers, self._steps) if optimizers else None
        except BaseException:
            self._gauges.remove()  # a tracker that was not made leaves nothing behind
            raise

    def batch(
        self,
        ids: Tensor,
        weight: Tensor | None = None,
        *,
        weight_total: float | Tensor | None = None,
        loss_weight: Any = None,
        advance: bool = True,
    ) -> Batch:
        """Attribute the rows of the forward pass inside the context to tasks.

        The ids bind at the forward: the backward may run anywhere before the optimizer step. With ids per example and a
        model that does not mix examples, g_t is what a separate backward of task t's part of the loss gives. BatchNorm
        in training mode, in-batch contrastive losses and mixture-of-experts capacity do mix: there g_t is row
        attribution, the part of the gradient that flows through the weights at the rows of task t. The same holds for
        ids per token where tokens of different tasks see each other (packing without document masks).

        Args:
            ids: int64, (B,) one task index per example or (B, S) one per token; -1 belongs to no task ("rest").
            weight: weight of each row in the loss mean, in the shape of ``ids``; ``None`` for 1. For a mean over
                tokens it is the number of tokens counted, or mean gradients, signal and memory are wrong:
                ``(labels != -100).sum(1)``, and ``(labels[:, 1:] != -100).sum(1)`` where the model shifts the labels
                (transformers' causal models).
            weight_total: what the loss divides the weighted sum of its rows by, where that is not their summed weight:
                a count over the whole step, as transformers' Trainer has in ``num_items_in_batch``. Without it every
                batch is a mean of its own and enters the step with the weight of any other, as in a loop that divides
                by the number of micro-batches.
            loss_weight: [T] (tensor, array or sequence), what the loss multiplies every row of a task with before the
                mean is taken, ``None`` for nothing; the mean still divides by the rows, or their ``weight``. It is
                divided out of what is said about a task alone (``norm``, ``signal``, memory, effects), which is as if
                the loss had not been touched; ``gram``, ``cosine`` and ``memory_dot``'s gradients stay those that flow
                into ``param.grad``. The use is a sampler that boosts tasks while the objective stays the natural mix
                (``AdaptiveBatchSampler.loss_weight``)::

                    for k, (x, y, ids) in enumerate(loader):  # of the whole run
                        factor = torch.from_numpy(sampler.loss_weight(k))
                        with tracker.batch(ids, loss_weight=factor) as b:
                            per_example = loss_fn(model(x), y)
                            b.losses(per_example)
                            (factor[ids].to(per_example) * per_example).mean().backward()
            advance: for a sampler that follows this tracker: this is one more batch of its loader. False for further
                ones on the same batch of the loader (GANs, SAM, contrastive pairs).

        Raises:
            TypeError, ValueError: ids, weight, weight_total or loss_weight of the wrong dtype, shape or range.
        """
        if self._removed:
            raise RuntimeError("this tracker was removed from the model; track() again")
        loss_weight = check_batch(ids, weight, weight_total, loss_weight, len(self.tasks))
        return Batch(
            ids,
            weight,
            loss_weight,
            advance,
            lambda: self._rows(ids, weight, weight_total),
            self._enter,
            self._leave,
            self._ran,
        )

    def _rows(self, ids: Tensor, weight: Tensor | None = None, total: float | Tensor | None = None) -> Rows:
        with torch.inference_mode(False):
            return Rows(ids, len(self.tasks), self._gauges.device, weight, total)

    def _ran(self, batch: Batch) -> None:
        """A backward pass ran through the batch, maybe one that had been given up, or looked like an evaluation
        (reentrant checkpointing of the whole model)."""
        batch.task_rows.backward = self._gauges.accumulation.arrive()
        if batch is not self._batches.open:
            self._count(batch)
        if all(b is not batch for b in self._batches.pending):
            self._batches.pending.append(batch)

    def rows(self, ids: Tensor) -> AbstractContextManager[None]:
        """Inside a model's forward: the layers called here work on rows with these ids, int64 (N,) (gathered rows, as
        in a mixture of experts), N may be 0; -1 is rest. Does nothing outside of ``batch``."""

        def make() -> Rows:
            check_ids(ids, len(self.tasks))
            return self._rows(ids)

        return self._batches.regroup(make)

    def _enter(self, batch: Batch) -> None:
        if self._batches.open is not None:
            raise RuntimeError("tracker.batch() is open already; leave it before the next batch begins")
        trains = torch.is_grad_enabled()
        with torch.inference_mode(False):  # what training writes later, also where this is an evaluation
            measured = self._steps.measures(batch.ids, trains)
            if measured:
                if self._hooks is not None:
                    self._hooks.stay_last()
                self._steps.begin()
        self._batches.enter(batch, measured)
        self._with_gradients = self._without_gradients = False
        self._doubtful = None
        self._root.put()
        if measured:
            self._row_check.enter(batch.task_rows)

    def _leave(self, batch: Batch, failed: bool) -> None:
        measured = self._batches.active is not None
        self._batches.leave(batch, failed)
        self._root.take_away()
        if measured:
            self._check_rows(batch, failed)
        evaluation = not batch.graded or (self._without_gradients and not self._with_gradients)
        if failed or not evaluation or (measured and batch.task_rows.backward):
            self._count(batch)
            return
        self._steps.schedule.take_back()
        if batch.graded and not measured:
            self._doubtful = batch
            self._root.put()

    def _check_rows(self, batch: Batch, failed: bool) -> None:
        """What a batch that is left says of the rows of the layers."""
        tried = self._row_check.leave(failed)
        self._steps.drop_unattributed(batch)
        if tried and self._row_check.given_up:
            warnings.warn(
                f"taskgrad: the rows of the layers were not verified: {self._row_check.reason}; call "
                "tracker.verify(*inputs) inside tracker.batch() with a batch that can tell, or pass verify=False",
                stacklevel=5,
            )

    def _count(self, batch: Batch) -> None:
        batch.trained = True
        if self._listener is not None and batch.advance:
            batch.advance = False
            self._listener.counted(counts_by_task(batch.ids, len(self.tasks)))

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's forward begins."""
        if torch.is_grad_enabled():
            self._with_gradients = True
            if self._doubtful is not None and in_backward():  # reentrant checkpointing of the whole model
                self._count(self._doubtful)
                self._doubtful = None
        else:
            self._without_gradients = True

    def subscribe(self, listener: Listener) -> None:
        """Tell ``listener`` of every batch that is left and every step that closes, in the place of the one before
        (``AdaptiveBatchSampler.follow`` calls this)."""
        if self._removed:
            raise RuntimeError("this tracker was removed from the model; track() again")
        before, self._listener = self._listener, listener
        if before is not None:
            before.lost(replaced=True)
        self._steps.on_close = self._closed

    def unsubscribe(self, listener: Listener) -> None:
        """Tell ``listener`` no more."""
        if self._listener is listener:
            self._listener = None

    def _closed(self, delivery: Delivery) -> None:
        if self._listener is not None:
            batch = self._batches.open
            self._listener.closed(delivery, self._lr(), batch is not None and batch.advance)

    def _lr(self) -> Callable[[], float | None]:
        """The learning rate that the step was taken with; on a GPU it is read when it is needed."""
        if self._hooks is None:
            return lambda: None
        lr = self._hooks.optimizers[0].param_groups[0]["lr"]
        taken = lr.detach().clone() if isinstance(lr, Tensor) else lr
        return lambda: float(taken)

    def _returned(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The model's forward is over: what it gives away is what it would be without tracking."""
        if self._batches.active is not None and not torch.compiler.is_compiling():
            make_plain(self._batches.active.task_rows.shared)

    def step(self) -> None:
        """Close the step by hand, for a tracker without optimizer: after the update, before gradients are zeroed."""
        if self._hooks is not None:
            raise RuntimeError(
                "this tracker was given the optimizer, whose step closes the step; do not call step() too"
            )
        self._steps.collect(None)
        self._steps.read()
        self._steps.close()

    def report(self, wait: bool = False) -> StepReport:
        """The newest complete report; on a CPU that of the step just closed. ``wait`` waits for a GPU's newest step.

        Before the first step, and where the newest step was abandoned, the report is not ``valid``.
        """
        self._steps.abandon_if_vanished()
        report = self._steps.mail.newest(wait)
        return self._steps.nothing("no step has closed yet") if report is None else report

    def task_gradients(self) -> dict[str, Tensor]:
        """Exact mode: every attributed parameter's gradient by task, [T + 1, *shape], of the last closed step; the last
        entry is rest. Raises RuntimeError in the other modes, where they are not kept, and before the first step."""
        if self.mode != "exact":
            raise RuntimeError(f'task_gradients() needs mode="exact", this tracker has {self.mode!r} and keeps none')
        gradient = self._steps.gradient
        if gradient is None:
            raise RuntimeError("task_gradients() needs a closed step: call optimizer.step() first")
        return {p.name: gradient[:, p.columns].unflatten(1, p.param.shape) for p in self._gauges.live()}

    def coverage(self) -> Coverage:
        """Which parameters the numbers are about, and why the others are not."""
        self._steps.drop_unattributed()
        return self._gauges.coverage(self._row_check.reason, self._row_check.late)

    def verify(self, *args: Any, **kwargs: Any) -> Coverage:
        """Check inside ``with tracker.batch(ids)`` that the rows of every layer are the rows of the batch.

        Called like the model, with inputs for it. Layers that fail are dropped and named by ``coverage()``, which is
        returned, with the reason where these inputs cannot tell. Three forward passes without gradients (five with an
        id per token, twice as many where layers fail that an input of shape (B,) or (B, B) may have misled), after
        which the model and the random states are as before; ``taskgrad.checks.undisturbed.Snapshot`` says what that
        covers.
        """
        if self._batches.open is None:
            raise RuntimeError("verify() needs the ids: call it inside `with tracker.batch(ids):`")
        self._row_check.by_hand(self._batches.open.task_rows, args, kwargs)
        return self.coverage()

    def probe(self, loss: Callable[[], Tensor]) -> StepProbe:
        """Measure ``loss()``, say of a fixed batch by task, just before and just after the next optimizer step."""
        self._steps.step_probe = StepProbe(self.model, loss)
        return self._steps.step_probe

    @property
    def under_way(self) -> int:
        """Batches whose gradients wait for the step that they belong to."""
        self._steps.abandon_if_vanished()
        ran = sum(batch.task_rows.backward > 0 for batch in self._batches.pending)
        return ran + sum(batch.trained for batch in self._batches.passed)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes numbers: settings, memory, windows, what was left out; plain values and CPU tensors.

        Of the last closed step: take it after ``optimizer.step()``, since batches of a step under way are not in it.
        """
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, in a tracker made as the saved one was; before or after the model is loaded.

        Parameters are matched by name: those frozen or thawed since keep their numbers, those that the state does not
        know begin afresh. The model may be on another device or of another dtype; the memory keeps its own dtype.

        Raises:
            TypeError, KeyError, ValueError: a field is missing, damaged, changed since it was saved, or of other
                settings or another model; the message names it. The tracker is then as it was.
            RuntimeError: inside ``with tracker.batch(...)``.
        """
        with torch.inference_mode(False):
            self._check_load(state).commit()

    def _check_load(self, state: Mapping[str, Any]) -> Load:
        if self._batches.open is not None:
            raise RuntimeError("load_state_dict() would pull the batch away: call it outside of tracker.batch()")
        return check_state(self, state)

    def remove(self) -> None:
        """Take every hook and patch off the model and the optimizers. The tracker keeps its last report."""
        self._removed = True
        if self._listener is not None:
            self._listener.lost(replaced=False)
            self._listener = None
        self._gauges.remove()
        if self._hooks is not None:
            self._hooks.remove()
        self._root.take_away()
        self._row_check.leave(failed=True)
        self._batches.pending.clear()
        self._gauges.discard()
