"""The append-only weight ledger: every mix that was ever in force, from which batch on, and why.

Weights are integers that sum to 2**40, so the ledger reads the same on every machine. Together with seed, sizes and
batch size it determines the whole stream of batches.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import FloatArray, IntArray, frozen_ints
from .quota import ONE, from_units


@dataclass(frozen=True)
class Entry:
    """Weights int64 [T] (units of 2**-40) in force from batch ``effective_at`` on.

    ``cause`` says where they come from, ``bound`` names the guards that changed what the policy had asked for.
    """

    effective_at: int
    weights: IntArray
    cause: str
    bound: tuple[str, ...] = ()


class Ledger:
    """Entries for data of fixed ``sizes``, from batch ``start`` on; ``data`` says which example is of which task.

    When the data change, a new ledger takes over (``succeed``): ``era`` counts them, ``past`` holds the earlier ones
    in JSON form, and the digest covers them.
    """

    def __init__(
        self,
        sizes: Sequence[int] | IntArray,
        *,
        data: str = "",
        start: int = 0,
        era: int = 0,
        past: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.sizes = tuple(int(n) for n in sizes)
        self.data = data
        self.start = start
        self.era = era
        self.past = tuple(past)
        self._entries: list[Entry] = []
        self._starts: list[int] = []
        self._hash = hashlib.sha256()
        for earlier in self.past:
            self._hash.update(bytes.fromhex(earlier["digest"]))
        self._hash.update(np.array([era, start, *self.sizes], dtype="<i8").tobytes() + data.encode())

    def append(self, effective_at: int, weights: IntArray, cause: str, bound: Sequence[str] = ()) -> Entry:
        """Add an entry. Raises ValueError unless it is later than the last one and its weights fit the ledger."""
        weights = np.asarray(weights)
        if weights.dtype != np.int64 or weights.shape != (len(self.sizes),):
            raise ValueError(
                f"weights must be int64 of shape ({len(self.sizes)},), got {weights.dtype} of shape {weights.shape}"
            )
        if (weights < 0).any() or int(weights.sum()) != ONE:
            raise ValueError(f"weights must not be negative and must sum to 2**40, got a sum of {int(weights.sum())}")
        if not self._entries and effective_at != self.start:
            raise ValueError(f"the first entry must take effect at batch {self.start}, got {effective_at}")
        if self._entries and effective_at <= self._starts[-1]:
            raise ValueError(
                f"the ledger is append-only: batch {effective_at} is not after its last entry, at {self._starts[-1]}"
            )
        entry = Entry(int(effective_at), frozen_ints(weights), cause, tuple(bound))
        self._entries.append(entry)
        self._starts.append(entry.effective_at)
        self._hash.update(entry.effective_at.to_bytes(8, "little") + entry.weights.astype("<i8").tobytes())
        return entry

    def at(self, batch: int) -> Entry:
        """The entry in force at ``batch``."""
        if batch < self.start:
            raise ValueError(f"batch {batch} lies before batch {self.start}, where this ledger begins")
        return self._entries[bisect_right(self._starts, batch) - 1]

    def mean(self, start: int, stop: int) -> FloatArray:
        """Intended mix over batches ``start:stop``: probabilities [T], float64."""
        total = np.zeros(len(self.sizes))
        for i, entry in enumerate(self._entries):
            until = self._starts[i + 1] if i + 1 < len(self._starts) else stop
            batches = min(until, stop) - max(entry.effective_at, start)
            if batches > 0:
                total += from_units(entry.weights) * batches
        return total / max(stop - start, 1)

    def digest(self) -> str:
        """SHA-256 over data, batches and weights, in hexadecimal: equal digests mean equal streams."""
        return self._hash.hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._entries[index]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: about 14 characters per task and entry."""
        return {
            "sizes": list(self.sizes),
            "data": self.data,
            "start": self.start,
            "era": self.era,
            "past": list(self.past),
            "entries": [[e.effective_at, e.weights.tolist(), e.cause, list(e.bound)] for e in self._entries],
            "digest": self.digest(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ledger:
        """The ledger that ``to_dict`` wrote. Raises ValueError where its digest does not match its content."""
        ledger = cls(data["sizes"], data=data["data"], start=data["start"], era=data["era"], past=data["past"])
        for effective_at, weights, cause, bound in data["entries"]:
            ledger.append(effective_at, np.array(weights, dtype=np.int64), cause, bound)
        if ledger.digest() != data["digest"]:
            raise ValueError("the ledger does not match its digest: the saved state was changed or cut")
        return ledger
