"""The steps of a tracker, one after the other: what belongs to one, when it is read and closed, which did not come.

What happens inside a step is in ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from ..checks.row_check import RowCheck
from ..parameters.probes import Probes
from ..report import StepReport, invalid_report
from ..statistics.memory import TaskMemory
from ..statistics.windows import Overwriting
from .batches import Batch, Batches
from .collected import Collected
from .delivery import Delivery, Mailbox
from .grams import ByParameter, Grams, OfBlock
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
        probes: Probes,
        batches: Batches,
        row_check: RowCheck,
        *,
        memory_decay: float,
        loss_scale: GradScaler | Tensor | None,
        check_sums: bool,
        group: dist.ProcessGroup | None,
        by_hand: bool,
    ) -> None:
        self.tasks, self.probes, self.batches = tasks, probes, batches
        self.count = 0
        self.step_probe: StepProbe | None = None
        self.gradient: Tensor | None = None
        dtype = next(iter(probes.probes.values())).tap.dtype
        self.memory = TaskMemory(len(tasks), probes.widths(), memory_decay, dtype, probes.device)
        self.overwriting = Overwriting(len(tasks), probes.device)
        self.mail = Mailbox()
        self.on_close: Callable[[Delivery], None] | None = None
        self.silence = Silence()
        self.theta = probes.theta()
        self.misfit: str | None = None  # what a layer said of ids that fitted none
        self._check_sums, self._by_hand = check_sums, by_hand
        self._grams: Grams = ByParameter() if probes.exact_gram else OfBlock()
        self._pipeline = Pipeline(probes, self.memory, self.overwriting, row_check, self._grams, loss_scale, group)
        self._collected = Collected()
        self._open: Step | None = None

    # -- before the step ----------------------------------------------------------------------------------------------

    def restart(self, count: int) -> None:
        """Go on after step ``count`` with the memory and the columns that were just put in place."""
        self.count = count
        self.gradient, self._open, self.mail = None, None, Mailbox()
        self._collected, self.misfit = Collected(), None
        self.theta = self.probes.theta()
        widths = self.probes.widths()
        self.memory.resume(widths[: self.memory.missed.shape[1]])
        if self.probes.width > self.memory.ema.shape[1]:
            self.memory.widen(widths, self.theta)

    @property
    def moved_on(self) -> bool:
        """Whether a backward pass came after the statistics under way were collected."""
        return bool(self._collected.names) and self._collected.passes != self.probes.accumulation.count

    def begin(self) -> None:
        """Before a batch: a step that did not come is given up, parameters that changed since are noticed."""
        self.abandon_if_vanished()
        between = not any(b.task_rows.backward for b in self.batches.pending)
        if between:
            self._grams.begin()
        self._refresh(between)
        if self._by_hand and between:
            self.theta = self.probes.theta()  # step() comes after the update
        self.probes.accumulation.checking = self._check_sums and (self._due or bool(self.probes.left_out.suspects))

    def _refresh(self, between_steps: bool) -> None:
        if self.probes.refresh(between_steps):
            self.theta = self.probes.theta()
            self.memory.widen(self.probes.widths(), self.theta)

    @property
    def _due(self) -> bool:
        return self.count < CHECK_FIRST or self.count % CHECK_EVERY == 0

    def drop_unattributed(self, batch: Batch | None = None) -> None:
        """Parameters whose rows turned out not to be the batch's leave the memory too; where no layer had rows of
        the ids (of ``batch``, or of any of the step's), that says something of the ids."""
        asked = self.batches.pending if batch is None else [batch]
        if asked and not any(b.task_rows.fitted for b in asked):
            said = self.probes.forgive()
            if said is not None:
                self.misfit = said
                self.silence.misfit(asked[-1].task_rows.shape, said)
        for probe in self.probes.collect_reasons():
            self.memory.forget_columns(probe.columns)

    def abandon_if_vanished(self) -> None:
        """Statistics whose gradients were zeroed before a step: the step will not come."""
        ran = [b for b in self.batches.pending if b.task_rows.backward]
        self.probes.accumulation.settle()
        if ran and not self.probes.dirty and not self._collected.names:
            self.batches.pending = [b for b in self.batches.pending if not b.task_rows.backward]
            self._no_step(REASONS["vanished"])

    def collect(self, params: Container[int] | None) -> None:
        """Take the statistics of the parameters with these ids (``None``: of all that are left): an optimizer is about
        to step on their gradients."""
        accumulation, taken = self.probes.accumulation, self._collected
        accumulation.settle(compare=False)
        self.drop_unattributed()
        if not taken.names:
            if self._pipeline.ranks > 1:  # the packet's size is that of what trains, whoever entered a batch
                self._refresh(between_steps=False)
            taken.passes = accumulation.count
            if not self._by_hand:
                self.theta = self.probes.theta()  # also what was written through .data since the last step
        if not self.probes.host:
            taken.strays += [p.stray.grad for p in self.probes.strays() if p.stray.grad is not None]
        read = self._pipeline.ranks > 1 or accumulation.checking
        probes = [
            p
            for name, p in self.probes.probes.items()
            if name not in taken.names and (params is None or id(p.param) in params)
        ]
        for probe in probes:
            taken.take(probe, probe.name not in self.probes.left_out, read)
            probe.held.release(accumulation.count)

    def cut_short(self) -> None:
        """What was collected is of no step."""
        self._collected = Collected()
        self._open = None
        gone = self.probes.accumulation.count
        self.batches.pending = [b for b in self.batches.pending if not 0 < b.task_rows.backward <= gone]
        self._no_step(REASONS["cut short"])

    # -- the step -----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """All is taken: the step as far as it goes before the parameters move."""
        self._measure_before()
        step = self._collected_step()
        if step is None:
            return
        pipeline = self._pipeline
        pipeline.reduce(step)
        pipeline.validate(step)
        pipeline.check(step)
        pipeline.read(step, self.theta)
        self._open = step

    def close(self) -> None:
        """The parameters moved: the step enters the memory, its report is sent."""
        step, self._open = self._open, None
        before = self.theta
        self._measure_after()
        if step is None:
            return
        self.theta = self.probes.theta()
        self.count += 1
        self.gradient = step.gradient
        if self.count <= CHECK_FIRST or self._due:
            self.probes.warn_of_gaps()
        rows = self._pipeline.write(step, self.count, before, self.theta)
        delivery = self._pipeline.report(step, rows, self.tasks, self.count, self.silence.hear)
        self.mail.send(delivery)
        self._listen(step)
        if self.on_close is not None:
            self.on_close(delivery)

    def _collected_step(self) -> Step | None:
        """What was collected and the batches it is of; ``None`` where that is no step, which is said."""
        taken, self._collected = self._collected, Collected()
        ran = [b for b in self.batches.pending if b.task_rows.backward > taken.gone]
        entered, self.batches.entered = self.batches.entered > 0, 0
        misfit, self.misfit = self.misfit is not None, None
        self.batches.pending.clear()
        if not ran and self.silence.no_batch(entered) and entered:
            self.probes.warn_of_gaps()
        if self._pipeline.ranks == 1 and not (ran and self.probes.live()):
            if not self.probes.live():  # an old report would look like news; each was named as it was left out
                self.mail.put(self.nothing(REASONS["nothing"]))
            elif misfit:
                self._no_step(REASONS["misfit"])
            elif self.probes.accumulation.interrupted:
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
        if self.probes.device.type != "cpu":
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
        self.silence.hear(report)

    def nothing(self, reason: str) -> StepReport:
        """The report of no step."""
        found = {"steps_since_seen": self.memory.steps_since_seen(self.count).cpu()}
        return invalid_report(self.tasks, self.count, reason, found)
