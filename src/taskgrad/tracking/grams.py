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
from ..capture import Gauge
from ..capture.sketch import SketchMap
from ..ops.sum_gram import sum_gram
from ..parameters.gauges import Gauges
from ..parameters.left_out import NAMED
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

    def of_step(self, gauges: Gauges, taps: Mapping[str, Tensor]) -> StepGram:
        """From what was taken off the taps, by name."""

    def sent(self, source: StepGram, delivery: Delivery) -> None:
        """The step with this source is on its way to the host."""

    def maps(self, gauges: Gauges) -> tuple[SketchMap, ...]:
        """The sketches that the Gram is an estimate from; none where it is exact."""


class OfBlock:
    """The Gram of the block of all parameters' columns, sketches or parts."""

    exact_norms = False
    uses: Tensor | None = None

    def begin(self) -> None:
        pass

    def of_step(self, gauges: Gauges, taps: Mapping[str, Tensor]) -> StepGram:
        return self

    def sent(self, source: StepGram, delivery: Delivery) -> None:
        pass

    def maps(self, gauges: Gauges) -> tuple[SketchMap, ...]:
        return tuple(p.sketch for p in gauges.gauges.values())

    def value(self, gradient: Tensor, gone: Tensor, scale: Tensor | None) -> Tensor:
        return sum_gram(gradient)[1]


class ByParameter:
    """The exact Gram, by parameter. What each keeps follows from how it was used: first the parts, counted; after one
    use a step the Gram of that use; after more than one the parts, for good."""

    exact_norms = True

    def __init__(self) -> None:
        self._on_the_way: deque[tuple[list[Gauge], Delivery]] = deque()

    def begin(self) -> None:
        """Learn from the steps that have arrived; on a CPU from all."""
        while self._on_the_way and self._on_the_way[0][1].arrived:
            gauges, delivery = self._on_the_way.popleft()
            self._learn(gauges, delivery.values["uses"].tolist(), delivery.step)

    def _learn(self, gauges: list[Gauge], uses: list[float], step: int) -> None:
        surprised = [p.name for p, n in zip(gauges, uses, strict=True) if n > 1 and p.layout.keeps == "gram"]
        for gauge, n in zip(gauges, uses, strict=True):
            if n > 1:
                gauge.keep("parts")
            elif gauge.layout.keeps == "counted parts":
                gauge.keep("gram")
        if surprised:
            more = f" and {len(surprised) - NAMED} more" if len(surprised) > NAMED else ""
            warnings.warn(
                f"taskgrad: Gram, cosines and norms of step {step} are NaN: {printable(', '.join(surprised[:NAMED]))}"
                f"{more} had one use a step before, and now more (a second micro-batch, or a second call). Their "
                "gradients by task are kept from now on",
                stacklevel=2,
            )

    def of_step(self, gauges: Gauges, taps: Mapping[str, Tensor]) -> StepGram:
        return _Parameters(gauges, taps)

    def sent(self, source: StepGram, delivery: Delivery) -> None:
        assert isinstance(source, _Parameters)
        if source.uses is not None:
            self._on_the_way.append((source.counted, delivery))
            self.begin()

    def maps(self, gauges: Gauges) -> tuple[SketchMap, ...]:
        return ()


class _Parameters:
    """The Grams of one step's parameters: of those whose parts are in the gradient as they are, from there together; of
    every other by itself.

    Attributes:
        counted: the parameters whose ``uses`` are counted.
    """

    def __init__(self, gauges: Gauges, taps: Mapping[str, Tensor]) -> None:
        size = gauges.num_tasks + 1
        sketched = [(i, p) for i, p in enumerate(gauges.gauges.values()) if not p.sketch.exact]
        self._exact = gauges.mask(p.sketch.exact for p in gauges.gauges.values())
        self._spread = gauges.spread
        places = torch.tensor([i for i, p in sketched if p.name in taps], dtype=torch.int64, device="cpu")
        self._places = places.to(gauges.device, non_blocking=True)
        found = [(p, taps[p.name]) for _, p in sketched if p.name in taps]
        none = torch.zeros(0, size, size, dtype=torch.float64, device=gauges.device)
        self._grams = torch.stack([p.layout.gram(tap) for p, tap in found]).double() if found else none
        counted = [(p, p.layout.uses(tap)) for p, tap in found if p.layout.counts_uses]
        self.counted = [p for p, _ in counted]
        self.uses = torch.stack([n for _, n in counted]) if counted else None
        single = [p.layout.keeps == "gram" for p, _ in counted]
        self._single = torch.tensor(single, device="cpu").to(gauges.device, non_blocking=True) if any(single) else None

    def value(self, gradient: Tensor, gone: Tensor, scale: Tensor | None) -> Tensor:
        kept = ~gone.index_select(0, self._places)
        total = torch.where(kept[:, None, None], self._grams, 0.0).sum(0)
        total = (total + total.mT) / 2  # the tap may have rounded to float32
        if scale is not None:
            total = total / scale.double() ** 2
        total = total + sum_gram(gradient * self._spread(self._exact))[1]
        if self._single is None or self.uses is None:
            return total
        return total.masked_fill(((self.uses > 1) & self._single).any(), torch.nan)
