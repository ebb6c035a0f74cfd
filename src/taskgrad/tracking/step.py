"""One step in a straight line: collect, reduce, validate, check, read, (the optimizer moves), write, report.

``Collected`` takes the statistics off the taps as the optimizers come to their steps; then every stage here is a method
of ``Pipeline`` that adds to the ``Step``. Nothing waits for a GPU, but on the few steps that are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from .._ranks import world_size
from ..capture import Gauge
from ..checks.row_check import RowCheck
from ..checks.sums import differing, tolerances, unlike
from ..parameters.gauges import UNSEEN, Gauges
from ..report import Sketches, StepReport, gather
from ..statistics.figures import Values, figures
from ..statistics.memory import TaskMemory
from ..statistics.windows import Overwriting
from .batches import Batch
from .collected import Collected, Counts, counts_of, wrong_ids
from .delivery import Delivery
from .distributed import all_reduce_flat
from .grams import Grams, StepGram
from .validity import REASONS


@dataclass
class Step:
    """What the stages have found out of a step so far, on the device; P parameters, K columns.

    Attributes:
        gauges: of the P parameters, in the order of their columns.
        taken: what was taken off their taps.
        gradient: G [T + 1, K], free of the loss scale; zero for what is left out.
        gram_source: what the Gram is going to come from.
        scale: what the loss was multiplied with, or ``None``.
        counts: of the step's batches.
        wrong: ids or weights that are none, bool; ``None`` where they were checked.
        flags: which of ``REASONS`` hold, as far as the host knows.
        found: the same as far as only the device does, bool.
        written: [K] float64, the sketch of ``param.grad``; ``None`` where nobody but backward passes wrote it.
        limit: [P], by how much sums over tasks may differ from gradients, where they are compared.
        suspects: bool [P], at which something else arrived than the sum over tasks, where that was compared.
        blamed: bool [P], which may be the ones to blame where ``param.grad`` is not the sum over tasks.
        late: bool [P], of layers whose rows are still to be checked; ``None`` for none.
        kept: bool [P], whose gradient is not zero; ``None`` where nobody looked.
        left_out: bool [P], or ``None`` for none.
        gone: bool [P], which are zero in the gradient.
        all: ``all_flags()`` of the whole step.
        valid: whether the numbers are to be believed, bool.
        gram: [T + 1, T + 1].
        dots, sums: products with the memory, see ``TaskMemory.read``.
        had: bool [T], tasks with a memory.
        split: bool [T], whose effects are known apart.
    """

    gauges: list[Gauge]
    taken: Collected
    gradient: Tensor
    gram_source: StepGram
    scale: Tensor | None
    counts: Counts
    wrong: Tensor | None
    flags: set[str]
    written: Tensor | None
    limit: Tensor | None
    suspects: Tensor | None
    blamed: Tensor | None
    late: Tensor | None
    found: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    left_out: Tensor | None = None
    gone: Tensor = field(init=False)
    all: Tensor = field(init=False)
    valid: Tensor = field(init=False)
    gram: Tensor = field(init=False)
    dots: Tensor = field(init=False)
    sums: Tensor = field(init=False)
    had: Tensor = field(init=False)
    split: Tensor = field(init=False)

    def mark(self, reason: str, found: Tensor | bool = True) -> None:
        """The step is not valid for this reason of ``REASONS``, where ``found``."""
        if isinstance(found, Tensor) and found.device.type != "cpu":
            self.found[reason] = self.found[reason] | found if reason in self.found else found
        elif found:
            self.flags.add(reason)

    def all_flags(self) -> Tensor:
        """One for each of ``REASONS``, bool, on the device."""
        device = self.gradient.device
        known = torch.tensor([reason in self.flags for reason in REASONS], device="cpu").to(device, non_blocking=True)
        if not self.found:
            return known
        none = torch.zeros((), dtype=torch.bool, device=device)
        return known | torch.stack([self.found.get(reason, none) for reason in REASONS])


class Pipeline:
    """The stages of a tracker's steps."""

    def __init__(
        self,
        gauges: Gauges,
        memory: TaskMemory,
        overwriting: Overwriting,
        row_check: RowCheck,
        grams: Grams,
        loss_scale: GradScaler | Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.gauges, self.memory, self.overwriting, self.row_check = gauges, memory, overwriting, row_check
        self.grams = grams
        self._loss_scale, self._group = loss_scale, group

    @property
    def ranks(self) -> int:
        return world_size(self._group)

    # -- before the optimizer moves -----------------------------------------------------------------------------------

    def collect(self, taken: Collected, batches: list[Batch], misfit: bool) -> Step:
        """What was taken off the taps and the batches that ran backward, side by side on the device. ``misfit``: ids
        of a batch fitted no layer."""
        gauges, device = list(self.gauges.gauges.values()), self.gauges.device
        gram_source = self.grams.of_step(self.gauges, taken.taps)
        gradient, scale = self.gauges.block(taken.taps), self._scale()
        squares = taken.all_squares(gauges, device)
        waiting = self._waiting()
        shared = self.ranks > 1  # then all of it is in the packet
        read = bool(taken.written) or shared
        limit = suspects = blamed = None
        if squares is not None or read:
            limit = tolerances([p.param.dtype for p in gauges], any(b.task_rows.half for b in batches), device)
            suspects = torch.zeros(len(gauges), dtype=torch.bool, device=device)
            blamed = self.gauges.mask(p.name in taken.foreign or p.name not in taken.others for p in gauges)
        if squares is not None and limit is not None:
            suspects = differing(squares, limit, gradient.dtype)
        return Step(
            gauges=gauges,
            taken=taken,
            gradient=gradient if scale is None else gradient / scale,
            gram_source=gram_source,
            scale=scale,
            counts=counts_of(batches, self.gauges.num_tasks, device),
            wrong=wrong_ids(batches, device),
            flags=self._first_flags(taken, misfit),
            written=taken.all_written(gauges, gradient) if read else None,
            limit=limit,
            suspects=suspects,
            blamed=blamed,
            late=self.gauges.mask(p.name in waiting for p in gauges) if waiting or shared else None,
        )

    def _first_flags(self, taken: Collected, misfit: bool) -> set[str]:
        """What the host knows of the step."""
        flags = {
            "misfit": misfit,
            "interrupted": self.gauges.accumulation.interrupted,
            "cut short": taken.passes != self.gauges.accumulation.count,
            "mixed": bool(taken.taps) and taken.first <= taken.gone,
        }
        return {reason for reason, holds in flags.items() if holds}

    def _waiting(self) -> set[str]:
        """Parameters of layers that were first called after the rows were checked: they count once theirs are."""
        names = self.row_check.late
        return {p.name for s in self.gauges.sites if s.name in names for p in s.gauges.values()} if names else set()

    def _scale(self) -> Tensor | None:
        scale = self._loss_scale
        if isinstance(scale, GradScaler):
            scale = scale._scale if scale.is_enabled() else None
        return None if scale is None else scale.to(self.gauges.device)

    def reduce(self, step: Step) -> None:
        """Over the ranks, in one packet of a size that nothing a rank did can change. Gradients are averaged, as
        DistributedDataParallel averages them; what one rank left out, all leave out."""
        ranks, counts = self.ranks, step.counts
        if ranks == 1:
            return
        assert step.written is not None and step.suspects is not None
        assert step.blamed is not None and step.late is not None
        lost = self.gauges.mask(name in self.gauges.left_out.reasons for name in self.gauges.gauges)
        seen = self.gauges.mask(p.seen for p in step.gauges)
        check = self.gauges.mask(self.row_check.standing)
        wrong = torch.zeros((), dtype=torch.bool, device=step.gradient.device) if step.wrong is None else step.wrong
        loss = torch.where(counts.given, counts.loss, 0.0)
        parts = [step.gradient, step.written, counts.weight, counts.mass, counts.entered, counts.examples]
        parts += [loss, counts.loss_mass]
        parts += [~counts.given, step.all_flags(), step.suspects, step.blamed, step.late, lost, seen, check, wrong]
        gradient, written, weight, mass, entered, examples, loss, loss_mass, silent, *rest = all_reduce_flat(
            parts, self._group
        )
        flags, step.suspects, step.blamed, step.late, lost, seen, check, step.wrong = rest
        step.flags, step.found = set(), {}
        for reason, found in zip(REASONS, flags, strict=True):
            step.mark(reason, found)
        kept = ~self.gauges.spread(lost)
        step.gradient, step.written = gradient * kept / ranks, written * kept / ranks
        step.counts = Counts(weight, mass, entered, examples, loss, loss_mass, ~silent)
        if self.gauges.host:
            self._agree(step.gauges, lost, seen)
            self.row_check.agree(check.tolist())

    def _agree(self, gauges: list[Gauge], lost: Tensor, seen: Tensor) -> None:
        """Every rank leaves out what one of them did: ``lost``, and has ``seen`` what one of them has, bool [P]."""
        for gauge, gone, used in zip(gauges, lost.tolist(), seen.tolist(), strict=True):
            gauge.seen = used
            if gone and gauge.name not in self.gauges.left_out.reasons:
                self._drop(gauge, "left out on another rank")

    def validate(self, step: Step) -> None:
        """Whether the gradients are those of one step: there, finite, and one factor times the sums over tasks."""
        if step.written is not None:
            self._compare(step, step.written)
        elif not step.taken.taps:
            step.mark("vanished")
        for stray in step.taken.strays:
            step.mark("changed", stray > 0)
        if step.written is not None:
            step.mark("infinite", ~torch.isfinite(step.written).all())
        if step.suspects is not None:  # of many at once it is said that the step is not valid
            count = step.suspects.sum()
            many = (count > 1) & (2 * count > sum(p.seen for p in self.gauges.live()))
            step.mark("changed", many)
            step.suspects = step.suspects & ~many

    def _compare(self, step: Step, written: Tensor) -> None:
        """With what is in ``param.grad``."""
        assert step.limit is not None and step.suspects is not None and step.blamed is not None
        step.kept = self.gauges.any_column(written != 0)  # the others were zeroed in place since the last pass
        step.gradient = step.gradient * self.gauges.spread(step.kept)
        apart = unlike(step.gradient, written, self.gauges.widths(), step.limit)
        apart = apart & self.gauges.mask(p.seen for p in step.gauges)
        step.suspects = step.suspects | (apart & step.blamed)
        step.mark("changed", (apart & ~step.suspects).any())
        step.mark("vanished", (written == 0).all())

    def check(self, step: Step) -> None:
        """Leave out the parameters that are contradicted, or wait for the check of their rows."""
        step.left_out = self._judge(step)
        if step.late is not None:
            if not self.gauges.host:
                step.mark("changed", step.late.any())
            elif bool(step.late.any()):
                step.left_out = step.late if step.left_out is None else step.left_out | step.late
        out = self.gauges.left_out.reasons
        gone = self.gauges.mask(p.name in out or not p.seen for p in step.gauges)
        if step.left_out is not None:
            step.gradient = step.gradient * ~self.gauges.spread(step.left_out)
            gone = gone | step.left_out
        if step.taken.taps:
            step.mark("nothing", gone.all())
        step.gone = gone if step.kept is None else gone | ~step.kept

    def _judge(self, step: Step) -> Tensor | None:
        """Leave out the suspects: bool [P]. Where the host is not to wait for which, the step is not valid."""
        suspects = step.suspects
        if not self.gauges.host:
            if suspects is not None:
                step.mark("changed", suspects.any())
            return None
        gauges, out = step.gauges, self.gauges.left_out
        bad = set() if suspects is None else {p.name for p, x in zip(gauges, suspects.tolist(), strict=True) if x}
        found = [p for p in gauges if p.name in bad and p.name not in out.reasons]
        out.acquit(step.taken.squares.keys() - {p.name for p in found})
        for gauge in out.suspect(found, UNSEEN):
            self.memory.forget_columns(gauge.columns)
        frozen = [p for p in gauges if not p.param.requires_grad]
        return self.gauges.mask(p in found or p in frozen for p in gauges) if found or frozen else None

    def _drop(self, gauge: Gauge, reason: str) -> None:
        self.gauges.left_out.drop(gauge.name, reason)
        self.memory.forget_columns(gauge.columns)

    def read(self, step: Step, theta: Tensor, last_unmeasured: int) -> None:
        """The gradients against one another and against the memory; ``theta`` [K], where they were taken; effects are
        split for tasks that were measured after step ``last_unmeasured``."""
        step.gram = step.gram_source.value(step.gradient, step.gone, step.scale)
        step.dots, step.sums = self.memory.read(step.gradient, step.counts.to_mean, theta)
        step.had, step.split = self.memory.count > 0, self.memory.last_seen > last_unmeasured
        step.mark("infinite", ~torch.isfinite(step.dots).all())  # every entry is in some product, 0 times NaN is NaN
        step.all = step.all_flags()
        step.valid = ~step.all.any()
        if step.wrong is not None:
            step.valid = step.valid & ~step.wrong

    # -- after it moved -----------------------------------------------------------------------------------------------

    def write(self, step: Step, number: int, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The step, closed as the ``number``-th with the parameters ``before`` and ``after`` it [K], enters the memory.
        What the host needs for its report."""
        counts = step.counts
        seen = (counts.weight[:-1] > 0) & step.valid
        predicted = self.memory.write(step.gradient, counts.to_mean, seen, before, after, number, step.left_out)
        values = {
            "valid": step.valid,
            "flags": step.all,
            "losses": counts.given,
            "gram": step.gram,
            "dots": step.dots,
            "sums": step.sums,
            "predicted": predicted,
            "had": step.had,
            "split": step.split,
            "to_mean": counts.to_mean,
            "weight": counts.weight,
            "examples": counts.examples,
            "loss": counts.loss,
            "loss_mass": counts.loss_mass,
            "since": self.memory.steps_since_seen(number),
        }
        if step.wrong is not None:
            values["wrong"] = step.wrong
        if step.gram_source.uses is not None:
            values["uses"] = step.gram_source.uses
        return values

    def report(
        self,
        step: Step,
        values: dict[str, Tensor],
        tasks: tuple[str, ...],
        number: int,
        built: Callable[[StepReport], None],
    ) -> Delivery:
        """What the host needs, on its way there; ``built`` is told of the report."""
        maps = self.grams.maps(self.gauges)
        exact = all(m.exact for m in maps)  # then there is no error to compute
        sketches = None if exact else Sketches(step.gradient[: len(tasks)], maps)
        delivery = Delivery(tasks, number, values, sketches, self._tell, built)
        self.grams.sent(step.gram_source, delivery)
        return delivery

    def _tell(self, values: Values) -> Values:
        """The rows of a report, from what arrived on the host."""
        return gather(figures(values, self.overwriting, self.grams.exact_norms))
