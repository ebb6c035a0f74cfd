"""One step in a straight line: collect, reduce, validate, check, read, (the optimizer moves), write, report.

``Collected`` takes the statistics off the taps as the optimizers come to their steps; then every stage here is a method
of ``Pipeline`` that adds to the ``Step``. Nothing waits for a GPU, but on the few steps that are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from .._ranks import world_size
from ..capture import Probe
from ..checks.row_check import RowCheck
from ..checks.sums import differing, tolerances, unlike
from ..parameters.probes import UNSEEN, Probes
from ..report import StepReport, gather
from ..statistics.cosine import cosines
from ..statistics.memory import Reading, TaskMemory
from ..statistics.windows import Overwriting
from .batches import Batch
from .collected import Collected, Counts, counts_of, wrong_ids
from .delivery import Delivery
from .distributed import all_reduce_flat
from .grams import Grams, StepGram
from .validity import REASONS

_AT = {name: index for index, name in enumerate(REASONS)}


@dataclass
class Step:
    """What the stages have found out of a step so far, on the device; P parameters, K columns.

    Attributes:
        probes: of the P parameters, in the order of their columns.
        taken: what was taken off their taps.
        gradient: G [T + 1, K], free of the loss scale; zero for what is left out.
        gram_source: what the Gram is going to come from.
        scale: what the loss was multiplied with, or ``None``.
        counts: of the step's batches.
        wrong: ids or weights that are none, bool; ``None`` where they were checked.
        flags: bool, one for each of ``REASONS``: why the step is not valid.
        written: [K] float64, the sketch of ``param.grad``; ``None`` where nobody but backward passes wrote it.
        limit: [P], by how much sums over tasks may differ from gradients.
        suspects: bool [P], at which something else arrived than the sum over tasks.
        blamed: bool [P], which may be the ones to blame where ``param.grad`` is not the sum over tasks.
        waiting, late: of layers whose rows are still to be checked, by name, and bool [P].
        kept: bool [P], whose gradient is not zero; ``None`` where nobody looked.
        left_out: bool [P], or ``None`` for none.
        gone: bool [P], which are zero in the gradient.
        valid: whether the numbers are to be believed, bool.
        gram: [T + 1, T + 1].
        reading: of the memory.
    """

    probes: list[Probe]
    taken: Collected
    gradient: Tensor
    gram_source: StepGram
    scale: Tensor | None
    counts: Counts
    wrong: Tensor | None
    flags: Tensor
    written: Tensor | None
    limit: Tensor
    suspects: Tensor
    blamed: Tensor
    waiting: set[str]
    late: Tensor
    kept: Tensor | None = None
    left_out: Tensor | None = None
    gone: Tensor = field(init=False)
    valid: Tensor = field(init=False)
    gram: Tensor = field(init=False)
    reading: Reading = field(init=False)

    def mark(self, reason: str, found: Tensor | bool = True) -> None:
        """The step is not valid for this reason of ``REASONS``, where ``found``."""
        self.flags[_AT[reason]] |= found


class Pipeline:
    """The stages of a tracker's steps."""

    def __init__(
        self,
        probes: Probes,
        memory: TaskMemory,
        overwriting: Overwriting,
        row_check: RowCheck,
        grams: Grams,
        loss_scale: GradScaler | Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.probes, self.memory, self.overwriting, self.row_check = probes, memory, overwriting, row_check
        self.grams = grams
        self._loss_scale, self._group = loss_scale, group

    @property
    def ranks(self) -> int:
        return world_size(self._group)

    # -- before the optimizer moves -----------------------------------------------------------------------------------

    def collect(self, taken: Collected, batches: list[Batch], misfit: bool) -> Step:
        """What was taken off the taps and the batches that ran backward, side by side on the device. ``misfit``: ids
        of a batch fitted no layer."""
        probes, device = list(self.probes.probes.values()), self.probes.device
        gram_source = self.grams.of_step(self.probes, taken.taps)
        gradient, scale = self.probes.block(taken.taps), self._scale()
        flags = self._first_flags(taken, misfit).to(device, non_blocking=True)
        limit = tolerances([p.param.dtype for p in probes], any(b.task_rows.half for b in batches), device)
        squares = taken.all_squares(probes, device)
        if squares is None:
            suspects = torch.zeros(len(probes), dtype=torch.bool, device=device)
        else:
            suspects = differing(squares, limit, gradient.dtype)
        waiting = self._waiting()
        read = taken.written or self.ranks > 1
        return Step(
            probes=probes,
            taken=taken,
            gradient=gradient if scale is None else gradient / scale,
            gram_source=gram_source,
            scale=scale,
            counts=counts_of(batches, self.probes.num_tasks, device),
            wrong=wrong_ids(batches, device),
            flags=flags,
            written=taken.all_written(probes, gradient) if read else None,
            limit=limit,
            suspects=suspects,
            blamed=self.probes.mask(p.name in taken.foreign or p.name not in taken.others for p in probes),
            waiting=waiting,
            late=self.probes.mask(p.name in waiting for p in probes),
        )

    def _first_flags(self, taken: Collected, misfit: bool) -> Tensor:
        """What the host knows of the step, one for each of ``REASONS``."""
        flags = dict.fromkeys(REASONS, False)
        flags["misfit"] = misfit
        flags["interrupted"] = self.probes.accumulation.interrupted
        flags["cut short"] = taken.passes != self.probes.accumulation.count
        flags["mixed"] = bool(taken.taps) and taken.first <= taken.gone
        return torch.tensor(list(flags.values()), device="cpu")

    def _waiting(self) -> set[str]:
        """Parameters of layers that were first called after the rows were checked: they count once theirs are."""
        names = self.row_check.late
        return {p.name for s in self.probes.sites if s.name in names for p in s.probes.values()} if names else set()

    def _scale(self) -> Tensor | None:
        scale = self._loss_scale
        if isinstance(scale, GradScaler):
            scale = scale._scale if scale.is_enabled() else None
        return None if scale is None else scale.to(self.probes.device)

    def reduce(self, step: Step) -> None:
        """Over the ranks, in one packet of a size that nothing a rank did can change. Gradients are averaged, as
        DistributedDataParallel averages them; what one rank left out, all leave out."""
        ranks, counts = self.ranks, step.counts
        if ranks == 1:
            return
        assert step.written is not None
        lost = self.probes.mask(name in self.probes.left_out for name in self.probes.probes)
        seen = self.probes.mask(p.seen for p in step.probes)
        check = self.probes.mask(self.row_check.standing)
        wrong = torch.zeros((), dtype=torch.bool, device=step.gradient.device) if step.wrong is None else step.wrong
        loss = torch.where(counts.given, counts.loss, 0.0)
        parts = [step.gradient, step.written, counts.weight, counts.mass, counts.entered, counts.examples, loss]
        parts += [~counts.given, step.flags, step.suspects, step.blamed, step.late, lost, seen, check, wrong]
        gradient, written, weight, mass, entered, examples, loss, silent, *rest = all_reduce_flat(parts, self._group)
        step.flags, step.suspects, step.blamed, step.late, lost, seen, check, step.wrong = rest
        kept = ~self.probes.spread(lost)
        step.gradient, step.written = gradient * kept / ranks, written * kept / ranks
        step.counts = Counts(weight, mass, entered, examples, loss, ~silent)
        if self.probes.host:
            self._agree(step.probes, lost, seen)
            self.row_check.agree(check.tolist())

    def _agree(self, probes: list[Probe], lost: Tensor, seen: Tensor) -> None:
        """Every rank leaves out what one of them did: ``lost``, and has ``seen`` what one of them has, bool [P]."""
        for probe, gone, used in zip(probes, lost.tolist(), seen.tolist(), strict=True):
            probe.seen = used
            if gone and probe.name not in self.probes.left_out:
                self._drop(probe, "left out on another rank")

    def validate(self, step: Step) -> None:
        """Whether the gradients are those of one step: there, finite, and one factor times the sums over tasks."""
        if step.written is not None:
            self._compare(step, step.written)
        elif not step.taken.taps:
            step.mark("vanished")
        for stray in step.taken.strays:
            step.mark("changed", stray > 0)
        for values in (step.gradient, step.written):
            if values is not None:
                step.mark("infinite", ~torch.isfinite(values).all())
        # of many at once it is said that the step is not valid
        count = step.suspects.sum()
        many = (count > 1) & (2 * count > sum(p.seen for p in self.probes.live()))
        step.mark("changed", many)
        step.suspects = step.suspects & ~many

    def _compare(self, step: Step, written: Tensor) -> None:
        """With what is in ``param.grad``."""
        step.kept = self.probes.any_column(written != 0)  # the others were zeroed in place since the last pass
        step.gradient = step.gradient * self.probes.spread(step.kept)
        apart = unlike(step.gradient, written, self.probes.widths(), step.limit)
        apart = apart & self.probes.mask(p.seen for p in step.probes)
        step.suspects = step.suspects | (apart & step.blamed)
        step.mark("changed", (apart & ~step.suspects).any())
        step.mark("vanished", (written == 0).all())

    def check(self, step: Step) -> None:
        """Leave out the parameters that are contradicted, or wait for the check of their rows."""
        step.left_out = self._judge(step)
        if not self.probes.host:
            step.mark("changed", step.late.any())
        elif bool(step.late.any()):
            step.left_out = step.late if step.left_out is None else step.left_out | step.late
        if step.left_out is not None:
            step.gradient = step.gradient * ~self.probes.spread(step.left_out)
        gone = self.probes.mask(p.name in self.probes.left_out or not p.seen for p in step.probes)
        if step.left_out is not None:
            gone = gone | step.left_out
        step.mark("nothing", bool(step.taken.taps) & gone.all())
        step.gone = gone if step.kept is None else gone | ~step.kept

    def _judge(self, step: Step) -> Tensor | None:
        """Leave out the suspects: bool [P]. Where the host is not to wait for which, the step is not valid."""
        if not self.probes.host:
            step.mark("changed", step.suspects.any())
            return None
        probes, out = step.probes, self.probes.left_out
        found = [p for p, bad in zip(probes, step.suspects.tolist(), strict=True) if bad and p.name not in out]
        out.acquit(step.taken.squares.keys() - {p.name for p in found})
        for probe in out.suspect(found, UNSEEN):
            self.memory.forget_columns(probe.columns)
        frozen = [p for p in probes if not p.param.requires_grad]
        return self.probes.mask(p in found or p in frozen for p in probes) if found or frozen else None

    def _drop(self, probe: Probe, reason: str) -> None:
        self.probes.left_out.drop(probe.name, reason)
        self.memory.forget_columns(probe.columns)

    def read(self, step: Step, theta: Tensor) -> None:
        """The gradients against one another and against the memory; ``theta`` [K], where they were taken."""
        step.valid = ~step.flags.any()
        if step.wrong is not None:
            step.valid = step.valid & ~step.wrong
        to_mean = step.counts.to_mean
        step.gram = step.gram_source.value(step.gradient, step.gone, step.scale)
        step.reading = self.memory.read(step.gradient, to_mean, theta)
        if self.grams.exact_norms:
            norm = step.gram.diagonal()[:-1].clamp(min=0).sqrt() * to_mean
            step.reading = replace(step.reading, norm=torch.where(to_mean > 0, norm, torch.nan))

    # -- after it moved -----------------------------------------------------------------------------------------------

    def write(self, step: Step, number: int, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The step, closed as the ``number``-th with the parameters ``before`` and ``after`` it [K], enters memory and
        windows. The rows of its report."""
        counts, reading, tasks = step.counts, step.reading, self.probes.num_tasks
        seen = (counts.weight[:-1] > 0) & step.valid
        cosine, others_cosine = cosines(step.gram)
        predicted = self.memory.write(step.gradient, counts.to_mean, seen, before, after, number, step.left_out)
        self.overwriting.add(reading.memory_dot, reading.own_effect, reading.others_effect, others_cosine, step.valid)
        return gather(
            {
                "counts": counts.by_task,
                "gram": {"gram": step.gram[:tasks, :tasks], "cosine": cosine, "others_cosine": others_cosine},
                "reading": vars(reading),
                "windows": self.overwriting.read(),
                "memory": {"predicted_effect": predicted, "steps_since_seen": self.memory.steps_since_seen(number)},
            }
        )

    def report(
        self,
        step: Step,
        rows: dict[str, Tensor],
        tasks: tuple[str, ...],
        number: int,
        built: Callable[[StepReport], None],
    ) -> Delivery:
        """The report, on its way to the host; ``built`` is told of it there."""
        values = {
            **rows,
            "valid": step.valid,
            "flags": step.flags,
            "losses": step.counts.given,
            "block": step.gradient[: len(tasks)],
        }
        if step.wrong is not None:
            values["wrong"] = step.wrong
        if step.gram_source.uses is not None:
            values["uses"] = step.gram_source.uses
        delivery = Delivery(tasks, number, values, self.grams.maps(self.probes), built)
        self.grams.sent(step.gram_source, delivery)
        return delivery
