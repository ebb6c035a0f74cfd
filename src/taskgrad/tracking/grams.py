"""Where a step's Gram comes from: the tasks' gradients as they were added up, or every parameter by itself.

The Gram of a sum is not the sum of Grams: what is used twice, or in two micro-batches, needs the tasks' parts of its
gradient. ``OfBlock`` has the parts, or sketches of them, of all parameters side by side. ``ByParameter`` keeps the
parts of a parameter only where they are needed: after a step in which it was used once, its Gram comes from the very
product that gives its gradient.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .._text import printable
from ..capture import Probe
from ..capture.sketch import SketchMap
from ..ops.sum_gram import sum_gram
from ..parameters.left_out import NAMED
from ..parameters.probes import Probes
from .delivery import Delivery


class StepGram(Protocol):
    """The Gram of one step on its way.

    Attributes:
        uses: how often parameters were used [P'], to be read on the host; ``None`` where nobody asks.
    """

    uses: Tensor | None

    def value(self, gradient: Tensor, gone: Tensor, scale: Tensor | None) -> Tensor:
        """[T + 1, T + 1] float64, of the step's ``gradient`` [T + 1, K]; ``gone`` [P], bool: parameters that are zero
        there; ``scale``: what the gradient was divided by."""


class Grams(Protocol):
    """Where the Grams of a tracker's steps come from.

    Attributes:
        exact_norms: the norms are taken from the Gram, which is exact where the gradient's sketch is not.
    """

    exact_norms: bool

    def begin(self) -> None:
        """Between two steps: what the taps keep may change."""

    def of_step(self, probes: Probes, taps: Mapping[str, Tensor]) -> StepGram:
        """From what was taken off the taps, by name."""

    def sent(self, source: StepGram, delivery: Delivery) -> None:
        """The step with this source is on its way to the host."""

    def maps(self, probes: Probes) -> tuple[SketchMap, ...]:
        """The sketches that the Gram is an estimate from; none where it is exact."""


class OfBlock:
    """The Gram of the block of all parameters' columns, sketches or parts."""

    exact_norms = False
    uses: Tensor | None = None

    def begin(self) -> None:
        pass

    def of_step(self, probes: Probes, taps: Mapping[str, Tensor]) -> StepGram:
        return self

    def sent(self, source: StepGram, delivery: Delivery) -> None:
        pass

    def maps(self, probes: Probes) -> tuple[SketchMap, ...]:
        return tuple(p.sketch for p in probes.probes.values())

    def value(self, gradient: Tensor, gone: Tensor, scale: Tensor | None) -> Tensor:
        return sum_gram(gradient)[1]


class ByParameter:
    """The exact Gram, by parameter. What each keeps follows from how it was used: first the parts, counted; after one
    use a step the Gram of that use; after more than one the parts, for good."""

    exact_norms = True

    def __init__(self) -> None:
        self._on_the_way: deque[tuple[list[Probe], Delivery]] = deque()

    def begin(self) -> None:
        """Learn from the steps that have arrived; on a CPU from all."""
        while self._on_the_way and self._on_the_way[0][1].arrived:
            probes, delivery = self._on_the_way.popleft()
            self._learn(probes, delivery.values["uses"].tolist(), delivery.step)

    def _learn(self, probes: list[Probe], uses: list[float], step: int) -> None:
        surprised = [p.name for p, n in zip(probes, uses, strict=True) if n > 1 and p.layout.keeps == "gram"]
        for probe, n in zip(probes, uses, strict=True):
            if n > 1:
                probe.keep("parts")
            elif probe.layout.keeps == "counted parts":
                probe.keep("gram")
        if surprised:
            more = f" and {len(surprised) - NAMED} more" if len(surprised) > NAMED else ""
            warnings.warn(
                f"taskgrad: Gram, cosines and norms of step {step} are NaN: {printable(', '.join(surprised[:NAMED]))}"
                f"{more} had one use a step before, and now more (a second micro-batch, or a second call). Their "
                "gradients by task are kept from now on, so this is said once",
                stacklevel=2,
            )

    def of_step(self, probes: Probes, taps: Mapping[str, Tensor]) -> StepGram:
        return _Parameters(probes, taps)

    def sent(self, source: StepGram, delivery: Delivery) -> None:
        assert isinstance(source, _Parameters)
        if source.uses is not None:
            self._on_the_way.append((source.counted, delivery))
            self.begin()

    def maps(self, probes: Probes) -> tuple[SketchMap, ...]:
        return ()


class _Parameters:
    """The Grams of one step's parameters.

    Attributes:
        counted: the parameters whose ``uses`` are counted.
    """

    def __init__(self, probes: Probes, taps: Mapping[str, Tensor]) -> None:
        size = probes.num_tasks + 1
        none = torch.zeros(size, size, dtype=torch.float64, device=probes.device)
        found = [(p, taps.get(p.name)) for p in probes.probes.values()]
        self._grams = torch.stack([none if tap is None else p.layout.gram(tap).double() for p, tap in found])
        counted = [(p, p.layout.uses(tap)) for p, tap in found if tap is not None and p.layout.counts_uses]
        self.counted = [p for p, _ in counted]
        self.uses = torch.stack([n for _, n in counted]) if counted else None
        added_up = [n > 1 for p, n in counted if p.layout.keeps == "gram"]
        self._wrong = torch.stack(added_up).any() if added_up else None

    def value(self, gradient: Tensor, gone: Tensor, scale: Tensor | None) -> Tensor:
        total = torch.where(gone[:, None, None], 0.0, self._grams).sum(0)
        total = (total + total.mT) / 2  # the tap may have rounded to float32
        if scale is not None:
            total = total / scale.double() ** 2
        return total if self._wrong is None else total.masked_fill(self._wrong, torch.nan)
