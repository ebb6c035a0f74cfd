"""Where a step's Gram comes from: the gradients as they were added up, or every parameter's single use.

The Gram of a sum is not the sum of Grams. ``Accumulated`` adds the tasks' gradients up and takes their Gram at the end;
``SingleUse`` never has them, and leaves out what was used more than once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from ..capture import Gauge
from ..capture.sketch import SketchMap
from ..ops.sum_gram import sum_gram
from ..parameters.gauges import Gauges
from ..statistics.single_use import SECOND_BATCH, Uses, read_uses


class StepGram(Protocol):
    """The Gram of one step on its way."""

    def reused(self, on_host: bool) -> tuple[Tensor | None, list[Gauge]]:
        """Of parameters used more than once: whether the whole step says nothing, a bool scalar or ``None`` for no; and
        those to leave out. Where the host is not to wait for which, one of them is enough."""

    def keep(self, kept: Tensor, gauges: list[Gauge]) -> None:
        """Only parameters with ``kept`` [P], bool, of ``gauges`` count."""

    def value(self, gradient: Tensor, without: Collection[str], scale: Tensor | None) -> Tensor:
        """[T + 1, T + 1] float64, of the step's ``gradient`` [T + 1, K] but for the parameters ``without``, which are
        zero there; ``scale``: what the gradient was divided by."""


class Grams(Protocol):
    """Where the Grams of a tracker's steps come from."""

    def refuse(self, batches: int) -> None:
        """Raise RuntimeError where a step cannot be of so many batches."""

    def of_step(self, gauges: Gauges, taps: Mapping[str, Tensor]) -> StepGram:
        """From what was taken off the taps, by name."""

    def maps(self, gauges: Gauges) -> tuple[SketchMap, ...]:
        """The sketches that the Gram is an estimate from; none where it is exact."""


class Accumulated:
    """The Gram of what was added up over uses and micro-batches."""

    def refuse(self, batches: int) -> None:
        pass

    def of_step(self, gauges: Gauges, taps: Mapping[str, Tensor]) -> StepGram:
        return self

    def maps(self, gauges: Gauges) -> tuple[SketchMap, ...]:
        return tuple(p.sketch for p in gauges.gauges.values())

    def reused(self, on_host: bool) -> tuple[Tensor | None, list[Gauge]]:
        return None, []

    def keep(self, kept: Tensor, gauges: list[Gauge]) -> None:
        pass

    def value(self, gradient: Tensor, without: Collection[str], scale: Tensor | None) -> Tensor:
        return sum_gram(gradient)[1]


class SingleUse:
    """Every parameter's Gram from the product that gave its gradient: exact, one batch a step, one use a parameter."""

    def refuse(self, batches: int) -> None:
        if batches > 1:
            raise RuntimeError(SECOND_BATCH)

    def of_step(self, gauges: Gauges, taps: Mapping[str, Tensor]) -> StepGram:
        tapped = [p for p in gauges.gauges.values() if p.name in taps]
        return _StepUses(read_uses(tapped, taps, gauges.num_tasks, gauges.device))

    def maps(self, gauges: Gauges) -> tuple[SketchMap, ...]:
        return ()


class _StepUses:
    """The uses of one step."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses

    def reused(self, on_host: bool) -> tuple[Tensor | None, list[Gauge]]:
        gauges, repeated = self._uses.gauges, self._uses.repeated
        if not on_host or (len(gauges) > 1 and bool(repeated.all())):
            return repeated.any(), []
        return None, [p for p, twice in zip(gauges, repeated.tolist(), strict=True) if twice]

    def keep(self, kept: Tensor, gauges: list[Gauge]) -> None:
        self._uses.keep(kept[[gauges.index(p) for p in self._uses.gauges]])

    def value(self, gradient: Tensor, without: Collection[str], scale: Tensor | None) -> Tensor:
        return self._uses.gram(without, scale)
