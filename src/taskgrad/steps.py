"""The two halves of a step: gradients are read just before the parameters move, and enter the memory just after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from .batches import Batch, Batches
from .capture import Probe
from .delivery import Delivery, Mailbox, invalid_report
from .guard import REASON, gradients_disagree
from .memory import Reading, TaskMemory
from .ops.sum_gram import sum_gram
from .overwrite import Overwriting
from .probe import StepProbe
from .probes import Probes
from .reduce import all_reduce_flat, world_size
from .report import StepReport, cosines
from .uses import REASON as REUSED
from .uses import SECOND_BATCH, read_uses

GUARD_FIRST, GUARD_EVERY = 3, 100  # steps on which the sum over tasks is compared with param.grad


@dataclass
class _Counts:
    """Sums over a step's batches, [T + 1] each, the last entry is rest."""

    weight: Tensor  # of the rows, float64
    entered: Tensor  # the same, times what the task's losses were multiplied with
    examples: Tensor  # int64
    loss: Tensor | None

    @property
    def share(self) -> Tensor:
        """What makes g_t the mean gradient of the task's loss as it was before any factor [T]; 0 for absent tasks."""
        return torch.where(self.weight > 0, self.weight.sum() / self.entered, 0.0)[:-1]


@dataclass
class _Open:
    """What the first half leaves to the second."""

    reading: Reading
    gradient: Tensor
    gram: Tensor
    share: Tensor
    weight: Tensor
    examples: Tensor
    loss: Tensor | None
    valid: Tensor
    wrong: Tensor | None


class Steps:
    """Memory, windows and reports of a tracker, advanced by ``read`` and ``close``.

    Nothing here waits for a GPU, but on the few steps on which the guard compares with ``param.grad``.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        probes: Probes,
        batches: Batches,
        *,
        memory_decay: float,
        loss_scale: GradScaler | Tensor | None,
        guard: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.tasks, self.probes, self.batches = tasks, probes, batches
        self.count = 0
        self.probe: StepProbe | None = None
        self.gradient: Tensor | None = None
        dtype = next(iter(probes.probes.values())).tap.dtype
        self.memory = TaskMemory(len(tasks), probes.width, memory_decay, dtype, probes.device)
        self.overwriting = Overwriting(len(tasks), probes.device)
        self.mail = Mailbox()
        self._loss_scale, self._guard, self._group = loss_scale, guard, group
        self._open: _Open | None = None
        self.follow_parameters()

    def follow_parameters(self) -> None:
        """Take the parameters as they stand now."""
        self.theta, self._versions = self.probes.theta(), self.probes.versions()

    def begin(self) -> None:
        """Before a batch: a step that did not come is given up, parameters that changed since are noticed."""
        self.abandon_if_vanished()
        if self.probes.grams and any(b.task_rows.ran for b in self.batches.pending):
            raise RuntimeError(SECOND_BATCH)
        if self.probes.refresh(between_steps=not self.batches.pending):
            self.follow_parameters()
            self.memory.widen(self.theta)
        elif not self.batches.pending and self.probes.versions() != self._versions:
            self.follow_parameters()

    def drop_unattributed(self) -> None:
        """Parameters whose rows turned out not to be the batch's leave the memory too."""
        for probe in self.probes.collect_reasons():
            self.memory.forget_columns(probe.columns)

    def abandon_if_vanished(self) -> None:
        """Statistics whose gradients were zeroed before a step: the step will not come."""
        if not self.probes.dirty:
            return
        vanished = self.probes.grads_vanished()
        if vanished is None or (vanished.device.type == "cpu" and bool(vanished)):
            self.mail.put(self.nothing())
            self.batches.pending.clear()
            self.probes.discard()
        elif vanished.device.type != "cpu":  # between micro-batches on a GPU: masked there, without waiting
            self.probes.scale_taps(~vanished)
            for batch in self.batches.pending:
                batch.kept = ~vanished if batch.kept is None else batch.kept & ~vanished

    def read(self) -> None:
        """First half: the step's gradients against the memory."""
        if self.probe is not None:
            self.probe.before = self.probe.measure()
        ran = [b for b in self.batches.pending if b.task_rows.ran]
        self.batches.pending.clear()
        self.drop_unattributed()
        if self.probes.grams and len(ran) > 1:
            self.probes.discard()
            raise RuntimeError(SECOND_BATCH)
        if not ran or not self.probes.live():
            self.probes.discard()
            if not self.probes.live():  # everything was left out: an old report would look like news
                self.mail.put(self.nothing())
            return
        counts = self._counts(ran)
        vanished = self.probes.grads_vanished()
        uses = read_uses(self.probes.live(), len(self.tasks), self.probes.device) if self.probes.grams else None
        gradient = self.probes.take()
        scale = self._scale()
        if scale is not None:
            gradient /= scale
        if world_size(self._group) > 1:
            gradient, counts = self._reduce(gradient, counts)
        valid = torch.isfinite(gradient).all()
        valid = torch.zeros_like(valid) if vanished is None else valid & ~vanished
        flags = [b.task_rows.wrong for b in ran if b.task_rows.wrong is not None]
        wrong = torch.stack(flags).any().to(valid.device) if flags else None
        if wrong is not None:
            valid = valid & ~wrong
        total, gram = sum_gram(gradient) if uses is None else (gradient.sum(0), None)
        half = any(b.task_rows.half for b in ran)
        due = self._guard and (self.count < GUARD_FIRST or self.count % GUARD_EVERY == 0)
        if uses is not None and (due or valid.device.type == "cpu"):
            again = [p for p, twice in zip(uses.probes, uses.repeated.tolist(), strict=True) if twice]
            self._leave_out(again, REUSED, gradient)
        elif uses is not None:
            valid = valid & ~uses.repeated.any()
        if due and bool(valid) and self._sum_guard(gradient, total, half):
            gram = None  # what was left out is in it
        if gram is None:
            gram = sum_gram(gradient)[1] if uses is None else uses.gram(self.probes.reasons, scale)
        loss = None if counts.loss is None else (counts.loss / counts.weight)[:-1]
        share = counts.share
        reading = self.memory.read(gradient, share, self.theta)
        self._open = _Open(reading, gradient, gram, share, counts.weight[:-1], counts.examples[:-1], loss, valid, wrong)

    def _counts(self, ran: Sequence[Batch]) -> _Counts:
        """What the step's batches add up to, on the device."""
        device = self.probes.device
        weights, entered, examples, losses = [], [], [], []
        for batch in ran:
            kept = 1 if batch.kept is None else batch.kept
            weights.append(batch.task_rows.weight.to(device, non_blocking=True) * kept)
            entered.append(batch.task_rows.entered.to(device, non_blocking=True) * kept)
            examples.append(batch.task_rows.examples.to(device, non_blocking=True) * kept)
            if batch.task_losses is not None:
                losses.append(batch.task_losses.to(device) * kept)
        loss = torch.stack(losses).sum(0) if len(losses) == len(ran) else None
        return _Counts(torch.stack(weights).sum(0), torch.stack(entered).sum(0), torch.stack(examples).sum(0), loss)

    def _reduce(self, gradient: Tensor, counts: _Counts) -> tuple[Tensor, _Counts]:
        """Sums over ranks, gradients averaged as DistributedDataParallel does; what one rank left out, all leave
        out."""
        out = torch.tensor([float(n in self.probes.reasons) for n in self.probes.probes], device=gradient.device)
        parts = [gradient, out, counts.weight, counts.entered, counts.examples]
        if counts.loss is not None:
            parts.append(counts.loss)
        gradient, out, weight, entered, examples, *loss = all_reduce_flat(parts, self._group)
        missing = [p for p, dropped in zip(self.probes.probes.values(), out.tolist(), strict=True) if dropped]
        self._leave_out(missing, "left out on another rank", gradient)
        return gradient / world_size(self._group), _Counts(weight, entered, examples, loss[0] if loss else None)

    def _sum_guard(self, gradient: Tensor, total: Tensor, half: bool) -> bool:
        """Drop parameters whose tasks do not add up to ``param.grad``; True if there were any."""
        bad = gradients_disagree(self.probes.live(), gradient, total, half)
        self._leave_out(bad, REASON, gradient)
        return bool(bad)

    def _leave_out(self, probes: Sequence[Probe], reason: str, gradient: Tensor) -> None:
        """Drop parameters, also from this step's ``gradient`` [T + 1, K]."""
        for probe in probes:
            self.probes.drop(probe.name, reason)
            gradient[:, probe.columns] = 0
            self.memory.forget_columns(probe.columns)

    def _scale(self) -> Tensor | None:
        """What the loss was multiplied with, or ``None``."""
        scale = self._loss_scale
        if isinstance(scale, GradScaler):
            scale = scale._scale if scale.is_enabled() else None
        return None if scale is None else scale.to(self.probes.device)

    def close(self) -> None:
        """Second half: the parameters moved, the step enters the memory, its report is sent."""
        step, self._open = self._open, None
        before = self.theta
        self.follow_parameters()
        if self.probe is not None:
            self.probe.after = self.probe.measure()
            self.probe = None
        if step is None:
            return
        count = len(self.tasks)
        seen = (step.weight > 0) & step.valid
        self.count += 1
        self.gradient = step.gradient
        if self.count == 1:
            self.probes.warn_of_gaps()
        reading = step.reading
        cosine, others_cosine = cosines(step.gram)
        predicted = self.memory.write(step.gradient, step.share, seen, before, self.theta, self.count)
        self.overwriting.add(reading.memory_dot, reading.own_effect, reading.others_effect, others_cosine, step.valid)
        values = {
            "valid": step.valid,
            "examples": step.examples,
            "tokens": step.weight,
            "gram": step.gram[:count, :count],
            "cosine": cosine,
            "others_cosine": others_cosine,
            "norm": reading.norm,
            "signal": reading.signal,
            "memory_dot": reading.memory_dot,
            "own_effect": reading.own_effect,
            "others_effect": reading.others_effect,
            "update_effect": reading.own_effect + reading.others_effect,
            "curvature": reading.curvature,
            "predicted_effect": predicted,
            "steps_since_seen": self._since_seen(),
            "block": step.gradient[:count],
            **self.overwriting.read(),
        }
        if step.loss is not None:
            values["loss"] = step.loss
        if step.wrong is not None:
            values["wrong"] = step.wrong
        # an exact Gram has no sketching error
        maps = () if self.probes.grams else tuple(p.sketch for p in self.probes.probes.values())
        self.mail.send(Delivery(self.tasks, self.count, values, maps))

    def _since_seen(self) -> Tensor:
        last = self.memory.last_seen
        return torch.where(last >= 0, self.count - last, -1)

    def nothing(self) -> StepReport:
        """The report of no step."""
        return invalid_report(self.tasks, self.count, self._since_seen().cpu())
