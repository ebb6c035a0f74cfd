"""A step in a straight line: collect, reduce, validate, read, (the optimizer moves), write, report."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from .._ranks import world_size
from ..capture import Probe
from ..checks.row_check import RowCheck
from ..checks.sums import differing, tolerances, unlike
from ..ops.sum_gram import sum_gram
from ..parameters.probes import UNSEEN, Probes
from ..report import StepReport, gather, invalid_report
from ..statistics.cosine import cosines
from ..statistics.memory import Reading, TaskMemory
from ..statistics.single_use import REASON as REUSED
from ..statistics.single_use import SECOND_BATCH, read_uses
from ..statistics.windows import Overwriting
from .batches import Batch, Batches
from .collected import Collected, Counts, counts_of, wrong_ids
from .delivery import Delivery, Mailbox
from .distributed import all_reduce_flat
from .silence import Silence
from .step_probe import StepProbe
from .validity import REASONS

CHECK_FIRST, CHECK_EVERY = 3, 100  # steps on which what arrives at a parameter is compared with the sum over tasks


@dataclass
class _Open:
    """What the first half leaves to the second."""

    reading: Reading
    gradient: Tensor
    gram: Tensor
    counts: Counts
    flags: Tensor
    valid: Tensor
    left_out: Tensor | None
    wrong: Tensor | None


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
        guard: bool,
        group: dist.ProcessGroup | None,
        by_hand: bool,
    ) -> None:
        self.tasks, self.probes, self.batches, self.row_check = tasks, probes, batches, row_check
        self.count = 0
        self.probe: StepProbe | None = None
        self.gradient: Tensor | None = None
        dtype = next(iter(probes.probes.values())).tap.dtype
        self.memory = TaskMemory(len(tasks), probes.widths(), memory_decay, dtype, probes.device)
        self.overwriting = Overwriting(len(tasks), probes.device)
        self.mail = Mailbox()
        self.on_close: Callable[[Delivery], None] | None = None
        self.silence = Silence()
        self.theta = probes.theta()
        self.misfit: str | None = None  # what a layer said of ids that fitted none
        self._loss_scale, self._guard, self._group, self._by_hand = loss_scale, guard, group, by_hand
        self._collected = Collected()
        self._open: _Open | None = None

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
        if self.probes.grams and not between:
            raise RuntimeError(SECOND_BATCH)
        self._refresh(between)
        if self._by_hand and between:
            self.theta = self.probes.theta()  # step() comes after the update
        self.probes.accumulation.checking = self._guard and (self._due or bool(self.probes.suspects))

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
            if world_size(self._group) > 1:  # the packet's size is that of what trains, whoever entered a batch
                self._refresh(between_steps=False)
            taken.passes = accumulation.count
            if not self._by_hand:
                self.theta = self.probes.theta()  # also what was written through .data since the last step
        if not self.probes.host:
            taken.strays += [p.stray.grad for p in self.probes.strays() if p.stray.grad is not None]
        read = world_size(self._group) > 1 or accumulation.checking
        probes = [
            p
            for name, p in self.probes.probes.items()
            if name not in taken.names and (params is None or id(p.param) in params)
        ]
        for probe in probes:
            taken.take(probe, probe.name not in self.probes.reasons, read)
            probe.held.release(accumulation.count)

    def cut_short(self) -> None:
        """What was collected is of no step."""
        self._collected = Collected()
        self._open = None
        gone = self.probes.accumulation.count
        self.batches.pending = [b for b in self.batches.pending if not 0 < b.task_rows.backward <= gone]
        self._no_step(REASONS["cut short"])

    # -- the step's gradients -----------------------------------------------------------------------------------------

    def read(self) -> None:
        """The step's gradients against the memory."""
        probe, self.probe = self.probe, None
        if probe is not None:  # one that raises is given up
            probe.before = probe.measure()
            self.probe = probe
        taken, self._collected = self._collected, Collected()
        ran = [b for b in self.batches.pending if b.task_rows.backward > taken.gone]
        entered, self.batches.entered = self.batches.entered > 0, 0
        misfit, self.misfit = self.misfit is not None, None
        self.batches.pending.clear()
        if self.probes.grams and len(ran) > 1:
            raise RuntimeError(SECOND_BATCH)
        ranks = world_size(self._group)
        if not ran and self.silence.no_batch(entered) and entered:
            self.probes.warn_of_gaps()
        if ranks == 1 and not (ran and self.probes.live()):
            if not self.probes.live():  # an old report would look like news; each was named as it was left out
                self.mail.put(self.nothing(REASONS["nothing"]))
            elif misfit:
                self._no_step(REASONS["misfit"])
            elif self.probes.accumulation.interrupted:
                self._no_step(REASONS["interrupted"])
            elif entered and taken.written:
                self._no_step(REASONS["unreached"])
            return
        if ran:
            self.silence.batch()
        probes = list(self.probes.probes.values())
        tapped = [p for p in probes if p.name in taken.taps]
        uses = read_uses(tapped, taken.taps, len(self.tasks), self.probes.device) if self.probes.grams else None
        gradient = self.probes.block(taken.taps)
        scale = self._scale()
        unscaled = gradient
        if scale is not None:
            gradient = gradient / scale
        flags = dict.fromkeys(REASONS, False)
        flags["misfit"] = misfit
        flags["interrupted"] = self.probes.accumulation.interrupted
        flags["cut short"] = taken.passes != self.probes.accumulation.count
        flags["mixed"] = bool(taken.taps) and taken.first <= taken.gone
        state = torch.tensor(list(flags.values()), device="cpu").to(gradient.device, non_blocking=True)
        half = any(b.task_rows.half for b in ran)
        squares = taken.all_squares(probes, gradient.device)
        if squares is None:
            suspects = torch.zeros(len(probes), dtype=torch.bool, device=gradient.device)
        else:
            suspects = differing(squares, self._tolerances(probes, half), unscaled.dtype)
        waiting = self._late()
        late = self.probes.mask(p.name in waiting for p in probes)
        blamed = self.probes.mask(p.name in taken.foreign or p.name not in taken.others for p in probes)
        written = taken.all_written(probes, unscaled) if taken.written or ranks > 1 else None
        counts = counts_of(ran, len(self.tasks), gradient.device)
        wrong = wrong_ids(ran, gradient.device)
        if ranks > 1:
            gradient, written, counts, state, suspects, blamed, late, wrong = self._reduce(
                gradient, written, counts, state, suspects, blamed, late, wrong
            )
        kept = None
        if written is not None:
            kept = self.probes.any_column(written != 0)  # the others were zeroed in place since the last pass
            gradient = gradient * self.probes.spread(kept)
            apart = unlike(gradient, written, self.probes.widths(), self._tolerances(probes, half))
            apart = apart & self.probes.mask(p.seen for p in probes)
            suspects = suspects | (apart & blamed)
            state[_AT["changed"]] |= (apart & ~suspects).any()
            state[_AT["vanished"]] |= (written == 0).all()
        elif not taken.taps:
            state[_AT["vanished"]] = True
        for stray in taken.strays:
            state[_AT["changed"]] |= stray > 0
        state[_AT["infinite"]] |= ~torch.isfinite(gradient).all()
        if written is not None:
            state[_AT["infinite"]] |= ~torch.isfinite(written).all()
        # of many at once it is said that the step is not valid
        many = (suspects.sum() > 1) & (2 * suspects.sum() > sum(p.seen for p in self.probes.live()))
        state[_AT["changed"]] |= many
        suspects = suspects & ~many
        left_out = self._judge(probes, suspects, taken, state)
        if not self.probes.host:
            state[_AT["changed"]] |= late.any()
        elif bool(late.any()):
            left_out = late if left_out is None else left_out | late
        if left_out is not None:
            gradient = gradient * ~self.probes.spread(left_out)
        if uses is not None:
            if not self.probes.host or (len(uses.probes) > 1 and bool(uses.repeated.all())):
                state[_AT["reused"]] |= uses.repeated.any()
            else:
                self._leave_out_reused(uses.probes, uses.repeated, gradient)
            if kept is not None:
                uses.keep(kept[[probes.index(p) for p in uses.probes]])
        gone = self.probes.mask(p.name in self.probes.reasons or not p.seen for p in probes)
        state[_AT["nothing"]] |= bool(taken.taps) & (gone if left_out is None else gone | left_out).all()
        valid = ~state.any()
        if wrong is not None:
            valid = valid & ~wrong
        if uses is None:
            gram = sum_gram(gradient)[1]
        else:
            gram = uses.gram(self.probes.suspects.keys() | self.probes.reasons.keys() | waiting, scale)
        reading = self.memory.read(gradient, counts.share, self.theta)
        self._open = _Open(reading, gradient, gram, counts, state, valid, left_out, wrong)

    def _tolerances(self, probes: Sequence[Probe], half: bool) -> Tensor:
        return tolerances([p.param.dtype for p in probes], half, self.probes.device)

    def _late(self) -> set[str]:
        """Parameters of layers that were first called after the rows were checked: they count once theirs are."""
        names = self.row_check.late
        return {p.name for s in self.probes.sites if s.name in names for p in s.probes.values()} if names else set()

    def _judge(self, probes: Sequence[Probe], suspects: Tensor, taken: Collected, state: Tensor) -> Tensor | None:
        """Leave out the parameters that are contradicted: bool [P]. Where the host is not to wait for which, the step
        is not valid."""
        if not self.probes.host:
            state[_AT["changed"]] |= suspects.any()
            return None
        out = self.probes.reasons
        found = [p for p, bad in zip(probes, suspects.tolist(), strict=True) if bad and p.name not in out]
        self.probes.acquit(taken.squares.keys() - {p.name for p in found})
        for probe in self.probes.suspect(found, UNSEEN):
            self.memory.forget_columns(probe.columns)
        frozen = [p for p in probes if not p.param.requires_grad]
        return self.probes.mask(p in found or p in frozen for p in probes) if found or frozen else None

    def _leave_out_reused(self, probes: Sequence[Probe], repeated: Tensor, gradient: Tensor) -> None:
        for probe, twice in zip(probes, repeated.tolist(), strict=True):
            if twice:
                self.probes.drop(probe.name, REUSED)
                gradient[:, probe.columns] = 0
                self.memory.forget_columns(probe.columns)

    def _reduce(
        self,
        gradient: Tensor,
        written: Tensor | None,
        counts: Counts,
        state: Tensor,
        suspects: Tensor,
        blamed: Tensor,
        late: Tensor,
        wrong: Tensor | None,
    ) -> tuple[Tensor, Tensor, Counts, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One packet of a size that nothing a rank did can change. Gradients are averaged, as DistributedDataParallel
        averages them; what one rank left out, all leave out."""
        assert written is not None
        ranks, device = world_size(self._group), gradient.device
        lost = self.probes.mask(name in self.probes.reasons for name in self.probes.probes)
        seen = self.probes.mask(p.seen for p in self.probes.probes.values())
        check = self.probes.mask(self.row_check.standing)
        flag = torch.zeros((), dtype=torch.bool, device=device) if wrong is None else wrong
        loss = torch.where(counts.given, counts.loss, 0.0)
        parts = [gradient, written, counts.weight, counts.mass, counts.entered, counts.examples, loss]
        parts += [~counts.given, state, suspects, blamed, late, lost, seen, check, flag]
        gradient, written, *rest = all_reduce_flat(parts, self._group)
        weight, mass, entered, examples, loss, silent, state, suspects, blamed, late, lost, seen, check, wrong = rest
        kept = ~self.probes.spread(lost)
        if self.probes.host:
            for probe, gone, used in zip(self.probes.probes.values(), lost.tolist(), seen.tolist(), strict=True):
                probe.seen = used
                if gone and probe.name not in self.probes.reasons:
                    self.probes.drop(probe.name, "left out on another rank")
                    self.memory.forget_columns(probe.columns)
            self.row_check.agree(check.tolist())
        counts = Counts(weight, mass, entered, examples, loss, ~silent)
        return gradient * kept / ranks, written * kept / ranks, counts, state, suspects, blamed, late, wrong

    def _scale(self) -> Tensor | None:
        """What the loss was multiplied with, or ``None``."""
        scale = self._loss_scale
        if isinstance(scale, GradScaler):
            scale = scale._scale if scale.is_enabled() else None
        return None if scale is None else scale.to(self.probes.device)

    # -- after the step -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The parameters moved: the step enters the memory, its report is sent."""
        step, self._open = self._open, None
        before = self.theta
        if self.probe is not None:
            self.probe.after = self.probe.measure()
            self.probe = None
        if step is None:
            return
        self.theta = self.probes.theta()
        counts = step.counts
        tasks = len(self.tasks)
        weight, share = counts.weight[:-1], counts.share
        seen = (weight > 0) & step.valid
        self.count += 1
        self.gradient = step.gradient
        if self.count <= CHECK_FIRST or self._due:
            self.probes.warn_of_gaps()
        reading = step.reading
        cosine, others_cosine = cosines(step.gram)
        predicted = self.memory.write(step.gradient, share, seen, before, self.theta, self.count, step.left_out)
        self.overwriting.add(reading.memory_dot, reading.own_effect, reading.others_effect, others_cosine, step.valid)
        rows = gather(
            {
                "counts": counts.by_task,
                "gram": {"gram": step.gram[:tasks, :tasks], "cosine": cosine, "others_cosine": others_cosine},
                "reading": vars(reading),
                "windows": self.overwriting.read(),
                "memory": {"predicted_effect": predicted, "steps_since_seen": self._since_seen()},
            }
        )
        block = step.gradient[:tasks]
        values = {**rows, "valid": step.valid, "flags": step.flags, "losses": counts.given, "block": block}
        if step.wrong is not None:
            values["wrong"] = step.wrong
        # an exact Gram has no sketching error
        maps = () if self.probes.grams else tuple(p.sketch for p in self.probes.probes.values())
        delivery = Delivery(self.tasks, self.count, values, maps, self.silence.hear)
        self.mail.send(delivery)
        if self.probes.device.type == "cpu":  # also where nobody asks for reports
            if bool(step.valid):
                self.silence.numbers()
                if bool((weight > 0).any()):
                    self.silence.tasks(True)
                else:
                    self.mail.newest(wait=False)
            else:
                self.mail.newest(wait=False)
        if self.on_close is not None:
            self.on_close(delivery)

    def _since_seen(self) -> Tensor:
        last = self.memory.last_seen
        return torch.where(last >= 0, self.count - last, -1)

    def _no_step(self, reason: str) -> None:
        report = self.nothing(reason)
        self.mail.put(report)
        self.silence.hear(report)

    def nothing(self, reason: str) -> StepReport:
        """The report of no step."""
        found = {"steps_since_seen": self._since_seen().cpu()}
        return invalid_report(self.tasks, self.count, reason, found)


_AT = {name: index for index, name in enumerate(REASONS)}
