"""The steps of a tracker, one after the other: what belongs to one, when it is read and closed, which did not come.

What happens inside a step is in ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from ..checks.row_check import RowCheck
from ..parameters.gauges import Gauges
from ..report import StepReport, invalid_report
from ..statistics.memory import TaskMemory
from ..statistics.windows import Overwriting
from .batches import Batch, Batches
from .collected import Carried, Collected
from .delivery import Delivery, Mailbox
from .grams import ByParameter, Grams, OfBlock
from .schedule import Schedule
from .silence import Silence
from .step import Pipeline, Step
from .step_probe import StepProbe
from .validity import REASONS

CHECK_FIRST, CHECK_EVERY = 3, 100  # steps on which what arrives at a parameter is compared with the sum over tasks


class Steps:
    """Memory, windows and reports of a tracker, advanced by ``collect``, ``read`` and ``close``.

    Nothing here waits for a GPU, but on the few steps that are checked, and where gradients are zeroed in place.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        gauges: Gauges,
        batches: Batches,
        row_check: RowCheck,
        *,
        schedule: Schedule,
        memory_decay: float,
        loss_scale: GradScaler | Tensor | None,
        check_sums: bool,
        group: dist.ProcessGroup | None,
        by_hand: bool,
    ) -> None:
        self.tasks, self.gauges, self.batches = tasks, gauges, batches
        self.count = 0
        self.schedule = schedule
        self.carried = Carried(len(tasks), gauges.device)
        self.step_probe: StepProbe | None = None
        self.gradient: Tensor | None = None
        dtype = next(iter(gauges.gauges.values())).tap.dtype
        self.memory = TaskMemory(len(tasks), gauges.widths(), memory_decay, dtype, gauges.device)
        self.overwriting = Overwriting(len(tasks))
        self.mail = Mailbox()
        self.on_close: Callable[[Delivery], None] | None = None
        self.silence = Silence()
        self.theta = gauges.theta()
        self.misfit: str | None = None  # what a layer said of ids that fitted none
        self._check_sums, self._by_hand = check_sums, by_hand
        self._grams: Grams = ByParameter() if gauges.exact_gram else OfBlock()
        self._pipeline = Pipeline(gauges, self.memory, self.overwriting, row_check, self._grams, loss_scale, group)
        self._collected = Collected()
        self._open: Step | None = None

    # -- before the step ----------------------------------------------------------------------------------------------

    def restart(self, count: int, unmeasured: Tensor, last_unmeasured: int) -> None:
        """Go on after step ``count`` with the memory and the columns that were just put in place."""
        self.count = count
        self.schedule.resume(unmeasured, last_unmeasured)
        self.batches.passed.clear()
        self.gradient, self._open, self.mail = None, None, Mailbox()
        self._collected, self.misfit = Collected(), None
        self.theta = self.gauges.theta()
        widths = self.gauges.widths()
        self.memory.resume(widths[: self.memory.missed.shape[1]])
        if self.gauges.width > self.memory.ema.shape[1]:
            self.memory.widen(widths, self.theta)
        if not self._measured:
            self.gauges.rest()

    @property
    def moved_on(self) -> bool:
        """Whether a backward pass came after the statistics under way were collected."""
        return bool(self._collected.names) and self._collected.passes != self.gauges.accumulation.count

    def measures(self, ids: Tensor, trains: bool) -> bool:
        """Whether the step of a batch with these ids is measured; the first one that ``trains`` decides."""
        self.abandon_if_vanished()
        return self.schedule.enter(ids, self.count) if trains else self._measured

    @property
    def _measured(self) -> bool:
        return self.schedule.measures(self.count)

    def begin(self) -> None:
        """Before a batch of a step that is measured: parameters that changed since are noticed."""
        between = not any(b.task_rows.backward for b in self.batches.pending)
        if between:
            self._grams.begin()
        self._refresh(between)
        if self._by_hand and between:
            self.theta = self.gauges.theta()  # step() comes after the update
        self.gauges.accumulation.checking = self._check_sums and (self._due or bool(self.gauges.left_out.suspects))

    def _refresh(self, between_steps: bool) -> None:
        if self.gauges.refresh(between_steps):
            self.theta = self.gauges.theta()
            self.memory.widen(self.gauges.widths(), self.theta)

    @property
    def _due(self) -> bool:
        measured = self.count // self.schedule.every
        return measured < CHECK_FIRST or measured % CHECK_EVERY == 0

    def drop_unattributed(self, batch: Batch | None = None) -> None:
        """Parameters whose rows turned out not to be the batch's leave the memory too; where no layer had rows of
        the ids (of ``batch``, or of any of the step's), that says something of the ids."""
        asked = self.batches.pending if batch is None else [batch]
        if asked and not any(b.task_rows.fitted for b in asked):
            said = self.gauges.forgive()
            if said is not None:
                self.misfit = said
                self.silence.misfit(asked[-1].task_rows.shape, said)
        for gauge in self.gauges.collect_reasons():
            self.memory.forget_columns(gauge.columns)

    def abandon_if_vanished(self) -> None:
        """Gradients were zeroed before a step: it will not come."""
        if not self._measured:
            # what is awaited may be a forward whose backward pass comes after the next one's
            if any(b.trained and not b.awaited for b in self.batches.passed) and self.gauges.vanished():
                self.batches.passed.clear()
                self.schedule.begin_anew()
                self.silence.given_up()
            return
        ran = [b for b in self.batches.pending if b.task_rows.backward]
        self.gauges.accumulation.settle()
        if ran and not self.gauges.dirty and not self._collected.names:
            self.batches.pending = [b for b in self.batches.pending if not b.task_rows.backward]
            self.schedule.begin_anew()
            self._no_step(REASONS["vanished"])

    def collect(self, params: Container[int] | None) -> None:
        """Take the statistics of the parameters with these ids (``None``: of all that are left): an optimizer is about
        to step on their gradients."""
        if not self._measured:
            return
        accumulation, taken = self.gauges.accumulation, self._collected
        accumulation.settle(compare=False)
        self.drop_unattributed()
        gauges = [
            p
            for name, p in self.gauges.gauges.items()
            if name not in taken.names and (params is None or id(p.param) in params)
        ]
        if self._pipeline.ranks == 1 and not (self.batches.entered or self.batches.pending or self.gauges.dirty):
            for gauge in gauges:  # a step without a batch, of which nothing is asked
                taken.names.add(gauge.name)
                gauge.discard()
                gauge.held.release(accumulation.count)
            return
        if not taken.names:
            if self._pipeline.ranks > 1:  # the packet's size is that of what trains, whoever entered a batch
                self._refresh(between_steps=False)
            taken.passes = accumulation.count
            if not self._by_hand:
                self.theta = self.gauges.theta()  # also what was written through .data since the last step
        if not self.gauges.host:
            taken.strays += [p.stray.grad for p in self.gauges.strays() if p.stray.grad is not None]
        read = self._pipeline.ranks > 1 or accumulation.checking
        for gauge in gauges:
            taken.take(gauge, gauge.name not in self.gauges.left_out.reasons, read)
            gauge.held.release(accumulation.count)

    def cut_short(self) -> None:
        """What was collected is of no step."""
        self._collected = Collected()
        self._open = None
        gone = self.gauges.accumulation.count
        self.batches.pending = [b for b in self.batches.pending if not 0 < b.task_rows.backward <= gone]
        self._no_step(REASONS["cut short"])

    # -- the step -----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """All is taken: the step as far as it goes before the parameters move."""
        self._measure_before()
        if not self._measured:
            return
        step = self._collected_step()
        if step is None:
            return
        pipeline = self._pipeline
        if self.schedule.every > 1:
            step.counts.add_losses(*self.carried.take())
        pipeline.reduce(step)
        pipeline.validate(step)
        pipeline.check(step)
        pipeline.read(step, self.theta, self.schedule.last)
        self._open = step

    def close(self) -> None:
        """The parameters moved: the step enters the memory, its report is sent."""
        step, self._open = self._open, None
        before = self.theta
        self._measure_after()
        if not self._measured:
            self._pass_by()
            return
        if step is None:
            self.schedule.begin_anew()
            return
        self.theta = self.gauges.theta()
        self.count += 1
        self.schedule.close(self.count, measured=True)
        if self.schedule.every > 1:
            self.gauges.rest()
        self.gradient = step.gradient
        if self._due:
            self.gauges.warn_of_gaps()
        values = self._pipeline.write(step, self.count, before, self.theta)
        delivery = self._pipeline.report(step, values, self.tasks, self.count, self.silence.hear)
        self.mail.send(delivery)
        self._listen(step)
        if self.on_close is not None:
            self.on_close(delivery)

    def _pass_by(self) -> None:
        """A step that is not measured: its number counts, and the losses that it was told."""
        passed, entered = list(self.batches.passed), self.batches.entered > 0
        self.batches.passed.clear()
        self.batches.entered = 0
        self.silence.closed()
        if entered:
            self.silence.batch()
        else:
            self.silence.no_batch(entered=False)
            if self._pipeline.ranks == 1:
                return
        self.count += 1  # also on a rank without a batch: all measure the same steps
        self.schedule.close(self.count, measured=False)
        for batch in passed:
            trained = batch.trained or batch is self.batches.open  # that the step was taken in
            if trained and batch.task_losses is not None and not batch.awaited:
                self.carried.add(batch.task_losses, batch.mass)

    def _collected_step(self) -> Step | None:
        """What was collected and the batches it is of; ``None`` where that is no step, which is said."""
        taken, self._collected = self._collected, Collected()
        ran = [b for b in self.batches.pending if b.task_rows.backward > taken.gone]
        entered, self.batches.entered = self.batches.entered > 0, 0
        misfit, self.misfit = self.misfit is not None, None
        self.batches.pending.clear()
        if not ran and self.silence.no_batch(entered) and entered:
            self.gauges.warn_of_gaps()
        if self._pipeline.ranks == 1 and not (ran and self.gauges.live()):
            if not self.gauges.live():  # an old report would look like news; each was named as it was left out
                self.mail.put(self.nothing(REASONS["nothing"]))
            elif misfit:
                self._no_step(REASONS["misfit"])
            elif self.gauges.accumulation.interrupted:
                self._no_step(REASONS["interrupted"])
            elif entered and taken.written:
                self._no_step(REASONS["unreached"])
            return None
        if ran:
            self.silence.batch()
        return self._pipeline.collect(taken, ran, misfit)

    def _measure_before(self) -> None:
        probe, self.step_probe = self.step_probe, None
        if probe is not None:  # one that raises is given up
            probe.before = probe.measure()
            self.step_probe = probe

    def _measure_after(self) -> None:
        if self.step_probe is not None:
            self.step_probe.after = self.step_probe.measure()
            self.step_probe = None

    # -- what is said -------------------------------------------------------------------------------------------------

    def _listen(self, step: Step) -> None:
        """Notice silence also where nobody asks for reports; on a GPU that would have to be waited for."""
        if self.gauges.device.type != "cpu":
            return
        if bool(step.valid):
            self.silence.numbers()
            if bool((step.counts.weight[:-1] > 0).any()):
                self.silence.tasks(True)
                return
        self.mail.newest(wait=False)

    def _no_step(self, reason: str) -> None:
        report = self.nothing(reason)
        self.mail.put(report)
        self.silence.no_step(report)

    def nothing(self, reason: str) -> StepReport:
        """The report of no step."""
        found = {"steps_since_seen": self.memory.steps_since_seen(self.count).cpu()}
        return invalid_report(self.tasks, self.count, reason, found)
