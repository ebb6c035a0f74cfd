"""What a step takes off the taps and off its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor

from ..capture import Gauge
from ..capture.task_rows import sent
from .batches import Batch


@dataclass
class Counts:
    """Sums over a step's batches, [T + 1] each, the last entry is rest."""

    weight: Tensor  # of the rows, float64
    mass: Tensor  # shares of the loss: 1 in all for every batch whose loss is its rows' mean
    entered: Tensor  # the same, times what the task's losses were multiplied with
    examples: Tensor  # float64
    loss: Tensor
    loss_mass: Tensor  # of the batches that the losses are of
    given: Tensor  # bool: every batch entered its losses

    @cached_property
    def to_mean(self) -> Tensor:
        """What makes g_t the mean gradient of the task's loss as it was before any factor [T]; 0 for absent tasks."""
        return torch.where(self.mass > 0, self.mass.sum() / self.entered, 0.0)[:-1]

    def add_losses(self, loss: Tensor, mass: Tensor) -> None:
        """Those of steps that were not measured."""
        self.loss, self.loss_mass = self.loss + loss, self.loss_mass + mass

    @property
    def by_task(self) -> dict[str, Tensor]:
        """The fields of a report that these fill, [T] each."""
        return {
            "examples": self.examples[:-1],
            "tokens": self.weight[:-1],
            "loss": (self.loss / self.loss_mass)[:-1],
        }


def counts_of(batches: Sequence[Batch], num_tasks: int, device: torch.device) -> Counts:
    """What a step's batches add up to, on the device."""

    def total(parts: list[Tensor]) -> Tensor:
        if not parts:
            return torch.zeros(num_tasks + 1, dtype=torch.float64, device=device)
        return reduce(torch.add, [sent(p, device) for p in parts])

    losses = [b.task_losses for b in batches if b.task_losses is not None]
    mass = total([b.mass for b in batches])
    return Counts(
        weight=total([b.task_rows.weight for b in batches]),
        mass=mass,
        entered=total([b.entered for b in batches]),
        examples=total([b.examples for b in batches]),
        loss=total(losses),
        loss_mass=mass,
        given=torch.full((), len(losses) == len(batches), device=device),
    )


class Carried:
    """Losses of the steps since the last one that was measured: sums and their shares, float64 [T + 1]."""

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self.loss = torch.zeros(num_tasks + 1, dtype=torch.float64, device=device)
        self.mass = torch.zeros_like(self.loss)

    def add(self, loss: Tensor, mass: Tensor) -> None:
        loss, mass = sent(loss, self.loss.device), sent(mass, self.loss.device)
        finite = torch.isfinite(loss).all()  # a step of other losses would not be valid either
        self.loss = self.loss + torch.where(finite, loss, 0.0)
        self.mass = self.mass + torch.where(finite, mass, 0.0)

    def take(self) -> tuple[Tensor, Tensor]:
        """Both, which begin anew."""
        taken = self.loss, self.mass
        self.loss, self.mass = torch.zeros_like(self.loss), torch.zeros_like(self.mass)
        return taken


def wrong_ids(batches: Sequence[Batch], device: torch.device) -> Tensor | None:
    """Whether ids or weights on a GPU were none, bool; ``None`` where all were checked."""
    flags = [b.task_rows.wrong for b in batches if b.task_rows.wrong is not None]
    return torch.stack(flags).any().to(device) if flags else None


@dataclass
class Collected:
    """Statistics taken off the taps, optimizer by optimizer; by the names of the parameters.

    ``first`` and ``gone`` are over the parameters with statistics: all gradients are those of the passes after
    ``gone``, if ``first`` is one of these.
    """

    taps: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)  # sketches of the gradients that were read
    others: set[str] = field(default_factory=set)  # whose gradient others wrote after the last pass
    foreign: set[str] = field(default_factory=set)  # to which a pass without statistics added
    squares: dict[str, Tensor] = field(default_factory=dict)  # [3], of the passes that were checked
    names: set[str] = field(default_factory=set)
    first: int = 1 << 62  # the first pass whose statistics are held
    gone: int = 0  # the last pass whose gradients are gone
    passes: int = 0  # backward passes so far, as the first was taken
    strays: list[Tensor] = field(default_factory=list)  # not looked at on the host

    def take(self, gauge: Gauge, counts: bool, read: bool) -> None:
        """Take a gauge's statistics. ``counts``: it is not left out; ``read``: look at its gradient in any case."""
        held, grad, name = gauge.held, gauge.param.grad, gauge.name
        self.names.add(name)
        if counts:
            if gauge.tap.grad is not None:
                self.taps[name] = gauge.tap.grad
                self.first, self.gone = min(self.first, held.first), max(self.gone, held.gone)
            if grad is not None and (held.written or held.foreign or read or gauge.hooked):
                self.written[name] = gauge.sketch_of(grad if grad.layout is torch.strided else grad.to_dense())
            if held.written:
                self.others.add(name)
            if held.foreign:
                self.foreign.add(name)
            if gauge.squares is not None:
                self.squares[name] = gauge.squares
        gauge.discard()

    def all_squares(self, gauges: Sequence[Gauge], device: torch.device) -> Tensor | None:
        """[P, 3], zeros for parameters that no checked pass reached; ``None`` if none was checked."""
        if not self.squares:
            return None
        none = torch.zeros(3, dtype=torch.float64, device=device)
        return torch.stack([self.squares.get(p.name, none) for p in gauges])

    def all_written(self, gauges: Sequence[Gauge], gradient: Tensor) -> Tensor:
        """Sketch of ``param.grad`` [K] in float64: read where others may have written it, else what the taps,
        ``gradient`` [T + 1, K], add up to."""
        out: Tensor = gradient.double().sum(0)
        for gauge in gauges:
            if gauge.name in self.written:
                out[gauge.columns] = self.written[gauge.name]
        return out
