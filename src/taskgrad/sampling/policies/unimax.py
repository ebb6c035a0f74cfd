"""UniMax: as even as a limit on the passes over each task allows."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ..arrays import FloatArray, IntArray
from .base import FixedPolicy, PolicyState
from .updates import horizon, number


class UniMax(FixedPolicy):
    """p_t proportional to U_t: the run's examples, split evenly, but to no task more than ``max_epochs`` passes.

    From the smallest task to the largest, with b examples left for m tasks, U_t = min(b / m, max_epochs n_t). As
    published in arXiv 2304.09151 (ICLR 2023), algorithm 1, which counts characters where this counts examples. Needs
    the sampler's ``horizon``; the run has horizon x batch size examples.

    Where even ``max_epochs`` passes over everything do not fill the run, the paper's normalisation exceeds the limit:
    there the sampler's construction warns. Raises ValueError unless ``max_epochs`` is positive.
    """

    def __init__(self, max_epochs: float) -> None:
        self.max_epochs = number("max_epochs", max_epochs, 0.0, open_low=True)

    def initial(self, state: PolicyState) -> FloatArray:
        """The same probabilities as ever after; warns where the limit cannot be kept."""
        examples = horizon(state, "UniMax") * state.batch_size
        sizes = _sizes(state)
        placed = self.allocate(examples, sizes)
        if placed.sum() < examples * (1 - 1e-9):
            warnings.warn(
                f"UniMax({self.max_epochs:g}) can place {placed.sum():.0f} of the run's {examples} examples: every "
                f"task will be passed over {examples / sizes.sum():.3g} times; raise max_epochs or shorten the "
                "run",
                stacklevel=2,
            )
        return self.weights(None, state)

    def allocate(self, examples: int, sizes: IntArray) -> FloatArray:
        """U [T]: examples of each task in a run of ``examples``."""
        out = np.zeros(len(sizes))
        left = float(examples)
        order = np.argsort(sizes, kind="stable")
        for rank, task in enumerate(order):
            out[task] = min(left / (len(order) - rank), self.max_epochs * float(sizes[task]))
            left -= out[task]
        return out

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """U / sum(U) [T], whatever the report."""
        placed = self.allocate(horizon(state, "UniMax") * state.batch_size, _sizes(state))
        return np.asarray(placed / placed.sum(), dtype=np.float64)

    def __repr__(self) -> str:
        return f"UniMax({self.max_epochs:g})"


def _sizes(state: PolicyState) -> IntArray:
    if state.sizes is None:
        raise ValueError("UniMax counts passes over the tasks' examples, whose number is not known with shares")
    return state.sizes
