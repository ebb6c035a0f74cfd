"""Tasks of which only their natural shares are known: streams, whose examples nobody has counted."""

from __future__ import annotations

import hashlib
import json
import numbers
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import FloatArray, ReadOnlyArrays, frozen_floats
from .ids import check_names


@dataclass(frozen=True, eq=False)
class TaskShares(ReadOnlyArrays):
    """``natural`` float64 [T], sums to 1; ``digest``: of names and shares."""

    tasks: tuple[str, ...]
    natural: FloatArray
    digest: str
    named: bool = True

    @classmethod
    def build(cls, shares: Any, tasks: Sequence[str] | None) -> TaskShares:
        """From a mapping name -> share of the stream, positive; they are divided by their sum. Raises TypeError or
        ValueError."""
        if not isinstance(shares, Mapping):
            raise TypeError(f'shares must be a mapping like {{"text": 0.9, "code": 0.1}}, got {shares!r}')
        if not shares:
            raise ValueError("shares must name at least one task, got an empty mapping")
        if not all(isinstance(name, str) for name in shares):
            raise TypeError(f"shares must have the names of tasks as its keys, got {reprlib.repr(list(shares))}")
        names = check_names(list(shares))
        if tasks is not None and check_names(tasks) != names:
            raise ValueError(f"tasks must be the names in shares, in their order: {list(tasks)}, {list(names)}")
        odd = {
            name: type(share).__name__
            for name, share in zip(names, shares.values(), strict=True)
            if isinstance(share, bool) or not isinstance(share, numbers.Real)
        }
        if odd:
            raise TypeError(f"shares must be numbers, got {odd}")
        values = np.array([_number(share) for share in shares.values()])
        wrong = {name: share for name, share in zip(names, values.tolist(), strict=True) if not 0 < share < np.inf}
        if wrong:
            raise ValueError(
                f"shares must be positive and finite, got {wrong}: leave out a task that is not to be drawn"
            )
        scaled = np.ldexp(values, -np.frexp(values.max())[1])  # exact, and no sum overflows
        natural = frozen_floats(scaled / scaled.sum())
        lost = [names[t] for t in np.flatnonzero(natural == 0)]
        if lost:
            raise ValueError(f"shares of {lost} are so small beside the others that they are 0: leave these tasks out")
        content = json.dumps([names, natural.tolist()]).encode()
        return cls(names, natural, f"shares-sha256:{hashlib.sha256(content).hexdigest()}")


def _number(share: numbers.Real) -> float:
    try:
        return float(share)
    except OverflowError:
        return np.inf
