"""Where every epoch of a run began."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


class Epochs:
    """First batches of the epochs from ``first`` on, each expected ``length`` batches after the one before.

    Kept as runs (epoch, batch, stride): epochs of one length, whether all were run through or all left at the same
    batch, take three numbers together.
    """

    def __init__(self, first: int, start: int, length: int) -> None:
        self.runs: list[tuple[int, int, int]] = [(first, start, length)]

    @property
    def first(self) -> int:
        """The earliest epoch known."""
        return self.runs[0][0]

    def start(self, epoch: int) -> int:
        """The first batch of ``epoch``, where it did or is expected to begin."""
        base, batch, stride = next(run for run in reversed(self.runs) if run[0] <= epoch)
        return batch + (epoch - base) * stride

    def find(self, batch: int) -> int:
        """The last epoch that begins at ``batch`` or before; the first one where none does."""
        base, start, stride = next((run for run in reversed(self.runs) if run[1] <= batch), self.runs[0])
        return base + max(batch - start, 0) // max(stride, 1)

    def begin(self, epoch: int, batch: int) -> None:
        """``epoch`` begins at ``batch``; what was known of later ones no longer holds."""
        while len(self.runs) > 1 and self.runs[-1][0] >= epoch:
            self.runs.pop()
        if self.start(epoch) == batch:
            return
        base, start, _ = self.runs[-1]
        if base == epoch - 1:
            self.runs[-1] = (base, start, batch - start)
        else:
            start = self.start(epoch - 1)
            self.runs.append((epoch - 1, start, batch - start))

    @classmethod
    def resumed(cls, runs: Sequence[Sequence[int]]) -> Epochs:
        """With the ``runs`` of a saved state."""
        epochs = cls(*runs[0])
        epochs.runs = [(epoch, batch, stride) for epoch, batch, stride in runs]
        return epochs

    @staticmethod
    def fit(runs: Sequence[Sequence[int]]) -> bool:
        """Whether these can be ``runs``: each begins where the one before it ends."""
        return all(stride > 0 for _, _, stride in runs) and all(
            after - epoch > 0 and batch + (after - epoch) * stride == start
            for (epoch, batch, stride), (after, start, _) in pairwise(runs)
        )
