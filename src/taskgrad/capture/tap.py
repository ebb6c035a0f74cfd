"""What a tap holds; the order of its columns is known here only.

A tap is the unregistered leaf whose gradient is what a parameter's gradient is made of, [T + 1, width], the last row
rest: the sketch of every task's part and, where the exact Gram of a single use is wanted, that Gram's row and a 1. Its
gradient is added up as ``param.grad`` is, so the last column counts the uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sketch import project


@dataclass(frozen=True)
class TapLayout:
    """Columns of the tap of a parameter: ``dim`` of its sketch, then, with ``gram``, T + 1 of the Gram and one of the
    uses, for T ``tasks``. The accessors are views of what was added up at the tap, ``stats`` [T + 1, width]."""

    tasks: int
    dim: int
    gram: bool

    @property
    def width(self) -> int:
        return self.dim + (self.tasks + 2 if self.gram else 0)

    def leaf(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tap, zeros."""
        return torch.zeros(self.tasks + 1, self.width, dtype=dtype, device=device, requires_grad=True)

    def sketches(self, stats: Tensor) -> Tensor:
        """The tasks' parts of the gradient, sketched: [T + 1, dim]."""
        return stats[:, : self.dim]

    def gram_of(self, stats: Tensor) -> Tensor:
        """Their Gram [T + 1, T + 1], right where ``uses`` is 1."""
        return stats[:, self.dim : -1]

    def uses(self, stats: Tensor) -> Tensor:
        """How often the parameter was used, scalar."""
        return stats[0, -1]


def tap_dtype(param: Tensor) -> torch.dtype:
    """What a parameter's statistics are added up in."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def tap_grad(sketches: Tensor, gram: Tensor | None) -> Tensor:
    """The gradient of a tap from the sketches [T + 1, dim] and, where it wants one, the Gram [T + 1, T + 1]."""
    if gram is None:
        return sketches
    return torch.cat([sketches, gram.to(sketches.dtype), sketches.new_ones(sketches.shape[0], 1)], 1)


def tap_grad_of(values: Tensor, gram: bool, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The same from the tasks' gradients themselves, [T + 1, *shape]."""
    products = torch.ops.taskgrad.sum_gram(values.flatten(1))[1] if gram else None
    return tap_grad(project(values, left, right), products)
