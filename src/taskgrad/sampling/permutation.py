"""Keyed permutations of range(n): the order in which one pass over a task's examples is drawn.

Computed, not stored: any window of a pass over 10**9 examples costs only its own length. Domains up to ``SORTED_UP_TO``
are sorted by a 64-bit hash (distinct inputs have distinct hashes, so there are no ties, and every order is as likely
as the hash is good); larger ones go through an unbalanced Feistel network over the next power of two, walked until the
value lies inside the domain (fewer than two steps on average). Only 64-bit integer arithmetic modulo 2**64, so that
another implementation can agree to the bit.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .arrays import IntArray

SORTED_UP_TO = 4096
"""Largest domain that is sorted whole: 32 KiB, and well under a millisecond a pass."""

_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB

_UintArray: TypeAlias = npt.NDArray[np.uint64]


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers (each taken modulo 2**64): SplitMix64's output function, chained."""
    key = 0
    for part in parts:
        key = (key + _GOLDEN) & _MASK ^ (part & _MASK)
        key = ((key ^ (key >> 30)) * _MIX1) & _MASK
        key = ((key ^ (key >> 27)) * _MIX2) & _MASK
        key ^= key >> 31
    return key


def hash_range(count: int, key: int) -> _UintArray:
    """SplitMix64 outputs of a stream started at ``key``: ``count`` distinct uint64 values."""
    values = np.arange(1, count + 1, dtype=np.uint64)
    values *= np.uint64(_GOLDEN)
    values += np.uint64(key)
    return _mix(values)


def permutation_window(size: int, key: int, start: int, stop: int) -> IntArray:
    """Values at positions ``start:stop`` of the permutation of ``range(size)`` under ``key``, int64."""
    if not 0 <= start <= stop <= size:
        raise ValueError(f"window {start}:{stop} is outside of range({size})")
    if size <= SORTED_UP_TO:
        return np.argsort(hash_range(size, key), kind="stable")[start:stop]
    return _feistel(size, key, np.arange(start, stop, dtype=np.uint64)).astype(np.int64)


def _mix(values: _UintArray) -> _UintArray:
    values ^= values >> np.uint64(30)
    values *= np.uint64(_MIX1)
    values ^= values >> np.uint64(27)
    values *= np.uint64(_MIX2)
    values ^= values >> np.uint64(31)
    return values


def _feistel(size: int, key: int, values: _UintArray) -> _UintArray:
    bits = (size - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [np.uint64(derive_key(key, i)) for i in range(_ROUNDS)]
    out = values
    walking = np.arange(len(values))
    while len(walking):
        current = out[walking]
        low, high = current & low_mask, current >> low_bits
        for i in range(0, _ROUNDS, 2):
            high = high ^ (_mix(low ^ keys[i]) & high_mask)
            low = low ^ (_mix(high ^ keys[i + 1]) & low_mask)
        out[walking] = current = high << low_bits | low
        walking = walking[current >= np.uint64(size)]
    return out
