"""Control: the average mix of another run, from the first batch to the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import FloatArray
from ..inputs import count_of
from ..ledger import Ledger
from .base import FixedPolicy, PolicyState


class Replay(FixedPolicy):
    """p_t = the mean of an earlier run's weights over its batches.

    What an adaptive run reaches beyond this control, it owes to *when* it gave each task its share; if both do as well,
    adapting bought nothing. Aioli (arXiv 2411.05735) found no published method that beat even fixed mixes reliably.

    ``source``: the earlier sampler's saved state (``sampler.state_dict()``), averaged over its consumed batches, or a
    ledger (or ``ledger.to_dict()``), which does not know how far the run went: give ``batches``, the batch it ended at.
    The weights are those intended, guards included, since the data last changed. Raises TypeError or ValueError for
    anything else, and, when the sampler is built, for data of other sizes or tasks.
    """

    def __init__(self, source: Ledger | Mapping[str, Any], batches: int | None = None) -> None:
        self.tasks: tuple[str, ...] | None = None
        if isinstance(source, Ledger):
            ledger = source
        elif isinstance(source, Mapping) and "ledger" in source:
            ledger = Ledger.from_dict(source["ledger"])
            batches = source["consumed"] if batches is None else batches
            self.tasks = tuple(source["tasks"]) if source["named"] else None
        elif isinstance(source, Mapping) and "entries" in source:
            ledger = Ledger.from_dict(dict(source))
        else:
            raise TypeError(f"source must be a sampler's state_dict() or a ledger, got {type(source).__name__}")
        if batches is None:
            raise ValueError(
                "a ledger does not say how many batches were drawn: pass batches=..., or a sampler's state"
            )
        self.batches = count_of("batches", batches, ledger.start + 1)
        self.sizes = ledger.sizes
        self.values = ledger.mean(ledger.start, self.batches)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        """The average mix [T], whatever the report."""
        sizes = (1,) * len(state.tasks) if state.sizes is None else tuple(state.sizes.tolist())
        if self.sizes != sizes:
            raise ValueError(
                f"Replay has the ledger of tasks of sizes {list(self.sizes)}, the sampler's tasks have "
                f"{list(sizes)}: replay a run on the same data"
            )
        if self.tasks is not None and state.tasks not in (self.tasks, _numbers(len(self.tasks))):
            raise ValueError(
                f"Replay has the ledger of the tasks {list(self.tasks)}, the sampler has {list(state.tasks)}"
            )
        return np.asarray(self.values / self.values.sum(), dtype=np.float64)

    def __repr__(self) -> str:
        return f"Replay({self.values.tolist()})"


def _numbers(count: int) -> tuple[str, ...]:
    """The names of tasks that were given none."""
    return tuple(str(t) for t in range(count))
