"""What one step said about the tasks."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._text import printable
from .capture.sketch import SketchMap
from .statistics.cosine import cosine_error

NAME_WIDTH = 40  # characters of a task's name in the table


@dataclass(frozen=True, eq=False)
class Sketches:
    """The sketched gradients of a step's tasks, ``block`` [T, K] on any device, side by side as in ``maps``. The
    tracker owns them until its next step; reports hold them weakly."""

    block: Tensor
    maps: tuple[SketchMap, ...]


@dataclass(frozen=True)
class StepReport:
    """Per-task gradient statistics of one optimizer step.

    Tensors are float64 on the CPU unless said otherwise, [T] where no shape is given, NaN where undefined. g_t is the
    part of the loss gradient that flows through rows of task t, ḡ_t = g_t · Σw / Σ_{rows of t} w the task's mean
    gradient (any ``loss_weight`` divided out), m_t the memory of ḡ_t before this step. In sketch mode products are
    estimates, see ``cosine_se``.

    Attributes:
        tasks: names of the T tasks.
        step: steps closed so far, abandoned ones included; 0 before the first.
        valid: False for a step that was abandoned (non-finite or vanished gradients); then the numbers are NaN and the
            memory was left alone.
        reason: why the report is not valid, and what to do; ``None`` if it is.
        examples: int64, examples of the batch that hold the task; float64 and NaN where ids (1, S) are the tokens of
            several examples.
        tokens: summed loss weights of the task's rows (``batch(ids, weight=…)``; the number of rows without).
        loss: weighted mean loss of the task's rows, or ``None`` if ``Batch.losses`` was not called.
        gram: [T, T], ⟨g_s, g_t⟩.
        cosine: [T, T], cosine of g_s and g_t.
        others_cosine: cos(g − g_t, g_t), with ``others_cosine_mean`` and ``others_cosine_std`` over a window of
            appearances (arXiv 2605.29548 reads any nonzero value as interference).
        norm: ‖ḡ_t‖.
        signal: ⟨m_t, ḡ_t⟩; at fixed parameters an unbiased estimate of ‖E ḡ_t‖².
        memory_dot: [T, T + 1], ⟨m_t, g_s⟩; negative: s pushes against t. The last column is rest (rows of no task).
        overwrite: ρ_t = max(0, pull_t) / own_pull_t, with its standard error ``overwrite_se``; NaN unless the
            denominator exceeds two of its standard errors.
        pull, own_pull: windowed means of −Σ_{s≠t}⟨m_t, g_s⟩ and of ⟨m_t, g_t⟩, over all steps.
        own_effect, others_effect, update_effect: first-order change of the task's loss since it was last seen: by its
            own step, by everything after it, and in all. Negative is progress. The slope is that at the end of the
            path: steps that overshoot read as losses; ``curvature`` indicates by how much.
        gained, undone: −Σ own and Σ others over a window of appearances.
        retention: 1 − undone / gained, with ``retention_se``; NaN where gained is under two standard errors.
        curvature: ½⟨ḡ_t − m_t, θ_k − θ_j⟩, indicative.
        predicted_effect: ⟨m_t, θ_{k+1} − θ_k⟩, what this step does to every task by its memory; biased in training.
        steps_since_seen: int64, 0 if the task is in this step, −1 if it was never seen.
    """

    tasks: tuple[str, ...]
    step: int
    valid: bool
    reason: str | None
    examples: Tensor
    tokens: Tensor
    loss: Tensor | None
    gram: Tensor
    cosine: Tensor
    others_cosine: Tensor
    others_cosine_mean: Tensor
    others_cosine_std: Tensor
    norm: Tensor
    signal: Tensor
    memory_dot: Tensor
    overwrite: Tensor
    overwrite_se: Tensor
    pull: Tensor
    own_pull: Tensor
    own_effect: Tensor
    others_effect: Tensor
    update_effect: Tensor
    gained: Tensor
    undone: Tensor
    retention: Tensor
    retention_se: Tensor
    curvature: Tensor
    predicted_effect: Tensor
    steps_since_seen: Tensor
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
        cpu = torch.device("cpu")
        return cosine_error(sketches.block.to(cpu).double(), self.gram, tuple(m.to(cpu) for m in sketches.maps))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: with ``cosine_se`` as it is to be had now."""
        _ = self.cosine_se
        return {**self.__dict__, "_sketches": None}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able lists, ``None`` for NaN; ``cosine_se`` as it is to be had now."""
        names = [f.name for f in fields(self) if not f.name.startswith("_")]
        return {name: _plain(getattr(self, name)) for name in [*names, "cosine_se"]}

    def __str__(self) -> str:
        # ASCII but for the names: a terminal may know no more
        names = [printable(t, NAME_WIDTH) for t in self.tasks]
        width = max(len(t) for t in (*names, "task"))
        title = f"step {self.step}" + ("" if self.valid else f": no numbers: {printable(self.reason or '')}")
        columns = (
            ("rows", 6),
            ("norm", 9),
            ("signal", 9),
            ("overwrite", 19),
            ("retention", 9),
            ("cos others", 10),
            ("seen", 7),
        )
        lines = [title, " ".join([f"{'task':<{width}}", *(f"{name:>{size}}" for name, size in columns)])]
        for t, name in enumerate(names):
            seen = int(self.steps_since_seen[t])
            cells = (
                _short(self.examples[t]),
                _short(self.norm[t]),
                _short(self.signal[t]),
                _short(self.overwrite[t], self.overwrite_se[t]),
                _short(self.retention[t]),
                _short(self.others_cosine[t]),
                "never" if seen < 0 else str(-seen),
            )
            padded = (f"{cell:>{size}}" for cell, (_, size) in zip(cells, columns, strict=True))
            lines.append(" ".join([f"{name:<{width}}", *padded]))
        if self.valid and self.loss is None:
            lines.append(
                "losses were not entered (batch.losses(per_row)): OverwriteBoost goes by gradients alone then and "
                "cannot tell noise from learning, and policies that read losses refuse the report"
            )
        return "\n".join(lines)


def _short(x: Tensor, error: Tensor | None = None) -> str:
    if math.isnan(float(x)):
        return "-"
    return f"{float(x):.3g}" + ("" if error is None else f" +-{_short(error)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
