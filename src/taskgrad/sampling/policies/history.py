"""What policies keep of a task's losses: averages, and blocks of growing size. All of it lives in a dict of arrays with
one value per task, so that it can be saved as it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import FloatArray

BLOCK, BLOCKS = 16, 24
"""Appearances in the first blocks of a history, and blocks at which neighbours are merged."""


class Average:
    """Bias-corrected exponential average over a task's appearances, with its standard error; ``kept[name]``.

    ``window``: appearances, None for a plain mean.
    """

    def __init__(self, kept: dict[str, Any], name: str, window: float | None) -> None:
        self._kept, self._name = kept, name
        self._decay = 1.0 if window is None else 1.0 - 1.0 / window

    @staticmethod
    def begin(kept: dict[str, Any], name: str, count: int) -> None:
        """An empty one for each of ``count`` tasks."""
        kept[name] = np.zeros((3, count))

    def enter(self, n: FloatArray, total: FloatArray, squares: FloatArray | None = None) -> None:
        """``n`` appearances [T] with this sum, and sum of squares."""
        weight, mean, square = self._kept[self._name]
        old = self._decay**n * weight
        new = n if self._decay == 1.0 else (1.0 - self._decay**n) / (1.0 - self._decay)
        part = new / np.maximum(old + new, 1e-300)
        each = np.maximum(n, 1.0)
        mean = mean + part * (total / each - mean)
        square = square if squares is None else square + part * (squares / each - square)
        self._kept[self._name] = np.stack([old + new, mean, square])

    @property
    def weight(self) -> FloatArray:
        """Effective number of appearances [T]."""
        return np.asarray(self._kept[self._name][0])

    @property
    def mean(self) -> FloatArray:
        return np.asarray(self._kept[self._name][1])

    @property
    def error(self) -> FloatArray:
        """Standard error of the mean [T]."""
        weight, mean, square = self._kept[self._name]
        return np.asarray(np.sqrt(np.maximum(square - mean**2, 0.0) / np.maximum(weight, 1.0)))


class History:
    """Losses in blocks of appearances, which grow as the history does; ``kept["blocks"]`` and its neighbours."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self._kept = kept

    @staticmethod
    def begin(kept: dict[str, Any], count: int) -> None:
        """An empty one for each of ``count`` tasks: sums of n, loss and squared loss in each block and in the one under
        way, how many blocks there are, and how many appearances fill one."""
        kept["blocks"] = np.zeros((count, BLOCKS, 3))
        kept["block"] = np.zeros((count, 3))
        kept["filled"] = np.zeros(count, dtype=np.int64)
        kept["size"] = np.full(count, BLOCK)

    def enter(self, n: FloatArray, total: FloatArray, squares: FloatArray) -> None:
        """``n`` losses [T] with this sum and sum of squares."""
        kept = self._kept
        kept["block"] = kept["block"] + np.stack([n, total, squares], 1)
        full = np.flatnonzero(kept["block"][:, 0] >= kept["size"])
        kept["blocks"][full, kept["filled"][full]] = kept["block"][full]
        kept["block"][full] = 0.0
        kept["filled"][full] += 1
        half = BLOCKS // 2
        for t in np.flatnonzero(kept["filled"] == BLOCKS):
            kept["blocks"][t, :half] = kept["blocks"][t].reshape(half, 2, 3).sum(1)
            kept["filled"][t], kept["size"][t] = half, 2 * kept["size"][t]

    def fall(self) -> FloatArray:
        """By how many standard errors the mean of the last third is below that of the third before [T]; 0 while there
        are fewer than six blocks."""
        filled = self._kept["filled"]
        sums = np.concatenate([np.zeros((len(filled), 1, 3)), np.cumsum(self._kept["blocks"], 1)], 1)
        third, rows = np.maximum(2, filled // 3), np.arange(len(filled))
        marks = [sums[rows, np.maximum(filled - i * third, 0)] for i in range(3)]
        (late, late_var), (before, before_var) = (_mean(marks[i] - marks[i + 1]) for i in range(2))
        error = np.sqrt(late_var + before_var + 1e-20)
        return np.where(filled >= 6, (before - late) / error, 0.0)


def _mean(sums: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and its variance, from n, sum and sum of squares [T, 3]."""
    n = np.maximum(sums[:, 0], 1.0)
    mean = sums[:, 1] / n
    return mean, np.maximum(sums[:, 2] / n - mean**2, 0.0) / n
