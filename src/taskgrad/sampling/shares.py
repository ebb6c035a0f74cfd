"""Tasks of which only their natural shares are known: streams, whose examples nobody has counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import FloatArray, ReadOnlyArrays, frozen_floats
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
        names = check_names(list(shares))
        if tasks is not None and check_names(tasks) != names:
            raise ValueError(f"tasks must be the names in shares, in their order: {list(tasks)}, {list(names)}")
        wrong = {
            name: share
            for name, share in shares.items()
            if isinstance(share, bool)
            or not isinstance(share, int | float | np.number)
            or not (np.isfinite(share) and share > 0)
        }
        if wrong:
            raise ValueError(f"shares must be positive numbers, got {wrong}: leave out a task that is not to be drawn")
        values = np.array([float(share) for share in shares.values()])
        natural = frozen_floats(values / values.sum())
        content = json.dumps([names, natural.tolist()]).encode()
        return cls(names, natural, f"shares-sha256:{hashlib.sha256(content).hexdigest()}")
