"""The exact Gram of a step without T gradients in memory: every layer gives that of its own weight gradient.

The Gram of a sum is not the sum of Grams, so a parameter counts only where it is used once in a step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capture import Gauge

REASON = "used more than once in a step, and accumulate=False adds up Grams of single uses; use accumulate=True"

SECOND_BATCH = (
    "accumulate=False takes one batch per optimizer step, and a second one ran backward before it: the Gram of "
    "accumulated gradients needs track(..., accumulate=True)"
)


@dataclass
class Uses:
    """What the taps of a step say of the parameters used in it.

    ``grams``: of every parameter [T + 1, T + 1] float64, multiplied as the gradients are; ``nothing``: zeros like them;
    ``repeated``: bool [P].
    """

    gauges: list[Gauge]
    grams: list[Tensor]
    nothing: Tensor
    repeated: Tensor

    def keep(self, kept: Tensor) -> None:
        """Only parameters with ``kept`` [P], bool, are in the Gram."""
        self.grams = [gram * flag for gram, flag in zip(self.grams, kept, strict=True)]

    def gram(self, without: Collection[str], scale: Tensor | None) -> Tensor:
        """The step's Gram [T + 1, T + 1], float64, but for the parameters named in ``without``; symmetric."""
        # not by indexing one tensor: a GPU would be waited for while the indices are on their way
        kept = [gram for gauge, gram in zip(self.gauges, self.grams, strict=True) if gauge.name not in without]
        total = torch.stack([self.nothing, *kept]).sum(0)
        total = (total + total.mT) / 2  # the tap may have rounded to float32
        return total if scale is None else total / scale.double() ** 2


def read_uses(gauges: list[Gauge], taps: Mapping[str, Tensor], num_tasks: int, device: torch.device) -> Uses:
    """What ``taps``, by the names of ``gauges``, say of Grams and uses."""
    nothing = torch.zeros(num_tasks + 1, num_tasks + 1, dtype=torch.float64, device=device)
    uses = torch.stack([nothing[0, 0], *(p.layout.uses(taps[p.name]) for p in gauges)])[1:]
    return Uses(gauges, [p.layout.gram_of(taps[p.name]).double() for p in gauges], nothing, uses > 1)
