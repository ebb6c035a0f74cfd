"""What one step said about the tasks. ``StepReport`` is the one table of its fields: a new one is a row there, and a
value of the same name in the statistic that the row names."""

from __future__ import annotations

import math
import textwrap
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._text import printable
from .capture.sketch import SketchMap
from .statistics.cosine import cosine_error

Floats = npt.NDArray[np.float64]
NAME_WIDTH = 40  # characters of a task's name in the table


@dataclass(frozen=True, eq=False)
class Sketches:
    """The sketched gradients of a step's tasks, ``block`` [T, K] on any device, side by side as in ``maps``. The
    tracker owns them until its next step; reports hold them weakly."""

    block: Tensor
    maps: tuple[SketchMap, ...]


@dataclass(frozen=True)
class Row:
    """One field of ``StepReport``, for all that fills, delivers, documents or leaves it out.

    Attributes:
        doc: what it says.
        shape: its sizes in terms of T.
        by: the statistic that fills it, see ``gather``.
        whole: counts, int64 (float64 where one is NaN).
        kept: said of a step without numbers too, where other fields are NaN, or ``None`` with ``given``.
        given: a flag of the delivery; the field is ``None`` where that is not set.
    """

    doc: str
    shape: tuple[str, ...] = ("T",)
    by: str | None = None
    whole: bool = False
    kept: bool = False
    given: str | None = None

    def empty(self, tasks: int) -> Tensor | None:
        """What a report of nothing holds, for T ``tasks``."""
        if self.given is not None:
            return None
        shape = [tasks + (size == "T + 1") for size in self.shape]
        if self.kept:
            return torch.zeros(shape, dtype=torch.int64 if self.whole else torch.float64)
        return torch.full(shape, torch.nan, dtype=torch.float64)


def _told(doc: str) -> dict[str, Row]:
    """A row that no statistic fills."""
    return {"row": Row(doc)}


def _row(by: str, doc: str, shape: tuple[str, ...] = ("T",), **options: Any) -> dict[str, Row]:
    return {"row": Row(doc, shape, by, **options)}


@dataclass(frozen=True)
class StepReport:
    """Per-task gradient statistics of one optimizer step.

    Tensors are float64 on the CPU unless said otherwise, [T] where no shape is given, NaN where undefined. g_t is the
    part of the loss gradient that flows through rows of task t, ḡ_t = g_t · Σw / Σ_{rows of t} w the task's mean
    gradient (any ``loss_weight`` divided out), m_t the memory of ḡ_t before this step. In sketch mode products are
    estimates, see ``cosine_se``. Windows are described in ``taskgrad.statistics.windows``.
    """

    # The one table of what a report holds: what builds, delivers, documents, pickles or prints reports reads it here.
    tasks: tuple[str, ...] = field(metadata=_told("names of the T tasks."))
    step: int = field(metadata=_told("steps closed so far, abandoned ones included; 0 before the first."))
    valid: bool = field(
        metadata=_told(
            "False for a step that was abandoned (non-finite or vanished gradients); then the numbers are NaN and the "
            "memory was left alone."
        )
    )
    reason: str | None = field(metadata=_told("why the report is not valid, and what to do; ``None`` if it is."))
    examples: Tensor = field(
        metadata=_row(
            "counts",
            "int64, examples of the batch that hold the task; float64 and NaN where ids (1, S) are the tokens of "
            "several examples.",
            whole=True,
            kept=True,
        )
    )
    tokens: Tensor = field(
        metadata=_row(
            "counts",
            "summed loss weights of the task's rows (``batch(ids, weight=…)``; the number of rows without).",
            kept=True,
        )
    )
    loss: Tensor | None = field(
        metadata=_row(
            "counts",
            "weighted mean loss of the task's rows, or ``None`` if ``Batch.losses`` was not called.",
            given="losses",
        )
    )
    gram: Tensor = field(metadata=_row("gram", "⟨g_s, g_t⟩.", ("T", "T")))
    cosine: Tensor = field(metadata=_row("gram", "cosine of g_s and g_t.", ("T", "T")))
    others_cosine: Tensor = field(
        metadata=_row("gram", "cos(g − g_t, g_t); arXiv 2605.29548 reads any nonzero value as interference.")
    )
    others_cosine_mean: Tensor = field(
        metadata=_row("windows", "mean of ``others_cosine`` over a window of appearances.")
    )
    others_cosine_std: Tensor = field(metadata=_row("windows", "its standard deviation over that window."))
    norm: Tensor = field(metadata=_row("reading", "‖ḡ_t‖."))
    signal: Tensor = field(
        metadata=_row("reading", "⟨m_t, ḡ_t⟩; at fixed parameters an unbiased estimate of ‖E ḡ_t‖².")
    )
    memory_dot: Tensor = field(
        metadata=_row(
            "reading",
            "⟨m_t, g_s⟩; negative: s pushes against t. The last column is rest (rows of no task).",
            ("T", "T + 1"),
        )
    )
    overwrite: Tensor = field(
        metadata=_row(
            "windows",
            "ρ_t = max(0, pull_t) / own_pull_t; NaN unless the denominator exceeds two of its standard errors.",
        )
    )
    overwrite_se: Tensor = field(metadata=_row("windows", "standard error of ``overwrite``."))
    pull: Tensor = field(metadata=_row("windows", "windowed mean of −Σ_{s≠t}⟨m_t, g_s⟩, over all steps."))
    own_pull: Tensor = field(metadata=_row("windows", "windowed mean of ⟨m_t, g_t⟩, over all steps."))
    own_effect: Tensor = field(
        metadata=_row(
            "reading",
            "first-order change of the task's loss since it was last seen by its own step. Negative is progress. The "
            "slope is that at the end of the path: steps that overshoot read as losses; ``curvature`` indicates by how "
            "much.",
        )
    )
    others_effect: Tensor = field(metadata=_row("reading", "the same by everything after its own step."))
    update_effect: Tensor = field(metadata=_row("reading", "the same in all: ``own_effect`` + ``others_effect``."))
    gained: Tensor = field(metadata=_row("windows", "−Σ own_effect over a window of appearances."))
    undone: Tensor = field(metadata=_row("windows", "Σ others_effect over that window."))
    retention: Tensor = field(
        metadata=_row("windows", "1 − undone / gained; NaN where gained is under two standard errors.")
    )
    retention_se: Tensor = field(metadata=_row("windows", "standard error of ``retention``."))
    curvature: Tensor = field(metadata=_row("reading", "½⟨ḡ_t − m_t, θ_k − θ_j⟩, indicative."))
    predicted_effect: Tensor = field(
        metadata=_row(
            "memory",
            "⟨m_t, θ_{k+1} − θ_k⟩, what this step does to every task by its memory; biased in training.",
        )
    )
    steps_since_seen: Tensor = field(
        metadata=_row("memory", "int64, 0 if the task is in this step, −1 if it was never seen.", whole=True, kept=True)
    )
    _sketches: weakref.ReferenceType[Sketches] | None = field(repr=False, compare=False)

    @cached_property
    def cosine_se(self) -> Tensor:
        """[T, T], standard error of ``cosine`` due to sketching; 0 in exact mode.

        Computed when first asked for, from sketches that the tracker drops at its next step: ask (or call ``to_dict``,
        or pickle the report) while the report is the newest one. Asked for the first time later it is NaN.
        """
        if self._sketches is None:
            return torch.where(self.cosine.isnan(), torch.nan, 0.0).to(self.gram)
        sketches = self._sketches()
        if sketches is None:
            return torch.full_like(self.gram, torch.nan)
        return cosine_error(sketches.block.cpu().double(), self.gram, sketches.maps)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: with ``cosine_se`` as it is to be had now."""
        _ = self.cosine_se
        return {**self.__dict__, "_sketches": None}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able lists, ``None`` for NaN; ``cosine_se`` as it is to be had now."""
        return {name: _plain(getattr(self, name)) for name in [*ROWS, "cosine_se"]}

    def __str__(self) -> str:
        # ASCII but for the names: a terminal may know no more
        names = [printable(t, NAME_WIDTH) for t in self.tasks]
        width = max(len(t) for t in (*names, "task"))
        title = f"step {self.step}" + ("" if self.valid else f": no numbers: {printable(self.reason or '')}")
        lines = [title, " ".join([f"{'task':<{width}}", *(f"{name:>{size}}" for name, size, _ in _COLUMNS)])]
        for t, name in enumerate(names):
            cells = (f"{cell(self, t):>{size}}" for _, size, cell in _COLUMNS)
            lines.append(" ".join([f"{name:<{width}}", *cells]))
        if self.valid and self.loss is None:
            lines.append(
                "losses were not entered (batch.losses(per_row)): OverwriteBoost goes by gradients alone then and "
                "cannot tell noise from learning, and policies that read losses refuse the report"
            )
        return "\n".join(lines)


ROWS: dict[str, Row] = {f.name: f.metadata["row"] for f in fields(StepReport) if "row" in f.metadata}
STATISTICS = {name: row for name, row in ROWS.items() if row.by is not None}


def _documented(name: str, row: Row) -> str:
    shape = "" if row.shape == ("T",) else f"[{', '.join(row.shape)}], "
    return textwrap.fill(f"{name}: {shape}{row.doc}", 116, initial_indent=" " * 8, subsequent_indent=" " * 12)


if StepReport.__doc__ is not None:  # python -OO has none
    StepReport.__doc__ += "\n".join(["\n    Attributes:", *(_documented(*item) for item in ROWS.items()), "    "])


def gather(statistics: Mapping[str, Mapping[str, Floats]]) -> dict[str, Floats]:
    """The values of the rows, by name, from the statistics that fill them, also by name; others are ignored."""
    return {name: statistics[row.by][name] for name, row in STATISTICS.items() if row.by is not None}


def arrived_report(
    tasks: tuple[str, ...],
    step: int,
    values: Mapping[str, Floats],
    flags: Mapping[str, bool],
    reason: str | None,
    sketches: weakref.ReferenceType[Sketches] | None,
) -> StepReport:
    """The report of a step from ``values`` of its rows and the ``flags`` that these name, all on the host; with a
    ``reason`` it is not valid."""
    found: dict[str, Tensor | None] = {}
    for name, row in STATISTICS.items():
        value = torch.from_numpy(values[name])
        if row.whole and value.is_floating_point() and not bool(value.isnan().any()):
            value = value.long()
        found[name] = None if row.given is not None and not flags[row.given] else value
    if reason is not None:
        return invalid_report(tasks, step, reason, found)
    return StepReport(tasks=tasks, step=step, valid=True, reason=None, _sketches=sketches, **found)  # type: ignore[arg-type]


def invalid_report(
    tasks: tuple[str, ...], step: int, reason: str, found: Mapping[str, Tensor | None] | None = None
) -> StepReport:
    """The report of a step that told nothing: what ``found`` has of the rows that are kept, and nothing else."""
    found = {} if found is None else found
    values = {
        name: found[name] if row.kept and name in found else row.empty(len(tasks)) for name, row in STATISTICS.items()
    }
    loss, tokens = found.get("loss"), found.get("tokens")
    if loss is not None and tokens is not None:
        each = zip(tasks, loss.tolist(), tokens.tolist(), strict=True)
        bad = [t for t, x, n in each if n > 0 and not math.isfinite(x)]
        if bad:
            reason += f"; the loss of {', '.join(bad)} is not finite"
    return StepReport(tasks=tasks, step=step, valid=False, reason=reason, _sketches=None, **values)  # type: ignore[arg-type]


def _short(x: Tensor, error: Tensor | None = None) -> str:
    if math.isnan(float(x)):
        return "-"
    return f"{float(x):.3g}" + ("" if error is None else f" +-{_short(error)}")


def _seen(report: StepReport, t: int) -> str:
    steps = int(report.steps_since_seen[t])
    return "never" if steps < 0 else str(-steps)


# title, width and content of what is printed beside the task's name
_COLUMNS: tuple[tuple[str, int, Callable[[StepReport, int], str]], ...] = (
    ("rows", 6, lambda report, t: _short(report.examples[t])),
    ("norm", 9, lambda report, t: _short(report.norm[t])),
    ("signal", 9, lambda report, t: _short(report.signal[t])),
    ("overwrite", 19, lambda report, t: _short(report.overwrite[t], report.overwrite_se[t])),
    ("retention", 9, lambda report, t: _short(report.retention[t])),
    ("cos others", 10, lambda report, t: _short(report.others_cosine[t])),
    ("seen", 7, _seen),
)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
