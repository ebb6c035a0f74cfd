"""What a tap holds; the order of its columns is known here only.

A tap is the unregistered leaf whose gradient is what a parameter's gradient is made of, [T + 1, width], the last row
rest: of every task's part its sketch, or the part itself. Its gradient is added up as ``param.grad`` is, over uses and
over micro-batches. With ``"gram"`` there is beside the sketch the Gram of one use, which must not be added up: a last
column of ones counts the uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .sketch import SketchMap, project

Keeps = Literal["sketch", "gram", "parts", "counted parts"]


@dataclass(frozen=True)
class TapLayout:
    """Columns of the tap of a parameter, for T ``tasks``. The accessors read what was added up at the tap, ``stats``
    [T + 1, width].

    Attributes:
        sketch: the parameter's map, to ``dim`` numbers.
        keeps: ``"sketch"``: dim columns; ``"gram"``: the same, T + 1 of the Gram, and one of the uses; ``"parts"``: one
            for each of the parameter's entries; ``"counted parts"``: the same, and one of the uses.
    """

    tasks: int
    sketch: SketchMap
    keeps: Keeps

    @property
    def holds_parts(self) -> bool:
        """Whether the tasks' parts are there as they are."""
        return "parts" in self.keeps or self.sketch.exact

    @property
    def counts_uses(self) -> bool:
        return self.keeps in ("gram", "counted parts")

    @property
    def maps(self) -> tuple[Tensor | None, Tensor | None]:
        """What the layer's backward pass sketches with: left and right, ``None`` for the identity."""
        return (None, None) if self.holds_parts else (self.sketch.left, self.sketch.right)

    @property
    def _values(self) -> int:
        return math.prod(self.sketch.shape) if self.holds_parts else self.sketch.dim

    @property
    def width(self) -> int:
        return self._values + self.counts_uses + (self.tasks + 1 if self.keeps == "gram" else 0)

    def leaf(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tap: a zero, seen [T + 1, width], since nobody reads its value."""
        zero = torch.zeros((), dtype=dtype, device=device)
        return zero.expand(self.tasks + 1, self.width).requires_grad_()

    def sketches(self, stats: Tensor) -> Tensor:
        """The tasks' parts of the gradient, sketched: [T + 1, dim]."""
        values = stats[:, : self._values]
        return self.sketch(values.unflatten(1, self.sketch.shape)) if self.holds_parts else values

    def gram(self, stats: Tensor) -> Tensor:
        """Their exact Gram [T + 1, T + 1]; with ``keeps="gram"`` right where ``uses`` is 1. Not there with ``"sketch"``
        unless the sketch is exact."""
        if self.keeps == "gram":
            return stats[:, self._values : -1]
        gram: Tensor = torch.ops.taskgrad.sum_gram(stats[:, : self._values])[1]
        return gram

    def uses(self, stats: Tensor) -> Tensor:
        """How often the parameter was used, scalar, where ``counts_uses``."""
        return stats[0, -1]


def tap_dtype(param: Tensor) -> torch.dtype:
    """What a parameter's statistics are added up in."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def tap_grad(values: Tensor, keeps: Keeps, gram: Tensor | None = None) -> Tensor:
    """The gradient of a tap from the sketches or parts [T + 1, n] and, where it keeps one, the Gram [T + 1, T + 1]."""
    if keeps == "sketch" or keeps == "parts":
        return values
    more = [] if gram is None else [gram.to(values.dtype)]
    return torch.cat([values, *more, values.new_ones(values.shape[0], 1)], 1)


def tap_grad_of(values: Tensor, keeps: Keeps, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The same from the tasks' gradients themselves, [T + 1, *shape]."""
    gram = torch.ops.taskgrad.sum_gram(values.flatten(1))[1] if keeps == "gram" else None
    return tap_grad(project(values, left, right), keeps, gram)
