"""What was drawn, against what was intended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._text import printable
from .arrays import FloatArray, IntArray
from .engine.index import IndexEngine
from .ledger import Ledger
from .settings import Settings


@dataclass(frozen=True)
class Realised:
    """What was drawn up to a batch, against what was intended; arrays [T].

    ``examples`` int64; ``share`` of all examples; ``intended``: mean of the weights over the same batches;
    ``epochs``: passes over each task's examples, ``None`` where only shares are known; ``probes`` int64: slots that
    ``probe_every`` took; ``capped``: tasks drawn ``max_epochs`` times, which get no more.
    """

    tasks: tuple[str, ...]
    batches: int
    examples: IntArray
    share: FloatArray
    intended: FloatArray
    epochs: FloatArray | None
    probes: IntArray
    capped: tuple[str, ...]

    @classmethod
    def until(
        cls, stop: int, tasks: tuple[str, ...], settings: Settings, ledger: Ledger, engine: IndexEngine
    ) -> Realised:
        """Of the batches of the ledger's era before ``stop``."""
        examples = engine.totals(stop)
        used_up = examples >= settings.max_draws if settings.max_draws is not None else np.zeros(len(examples), bool)
        return cls(
            tasks=tasks,
            batches=stop - ledger.start,
            examples=examples.copy(),
            share=examples / max(int(examples.sum()), 1),
            intended=ledger.mean(ledger.start, stop),
            epochs=None if settings.fresh else examples / settings.sizes,
            probes=engine.probes(stop).copy(),
            capped=tuple(tasks[t] for t in np.flatnonzero(used_up)),
        )

    def __str__(self) -> str:
        names = [printable(task, 40) for task in self.tasks]
        width = max(4, *(len(name) for name in names))
        lines = [f"{self.batches} batches", f"{'task':<{width}}  examples   share  intended  epochs  probes"]
        passes = ["     -"] * len(names) if self.epochs is None else [f"{n:>6.2f}" for n in self.epochs]
        for t, task in enumerate(self.tasks):
            lines.append(
                f"{names[t]:<{width}}  {self.examples[t]:>8}  {self.share[t]:.4f}    {self.intended[t]:.4f}  "
                f"{passes[t]}  {self.probes[t]:>6}" + ("  capped" if task in self.capped else "")
            )
        return "\n".join(lines)
