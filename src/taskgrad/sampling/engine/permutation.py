"""Keyed permutations of range(n): the order in which one pass over a task's examples is drawn.

Computed, not stored: any position of a pass over 10**9 examples costs the same. Domains up to ``SORTED_UP_TO`` are
sorted by a 56-bit hash, so that every order is as likely as the hash is good; larger ones go through an unbalanced
Feistel network of eight rounds over the next power of two, walked until the value lies inside the domain (fewer than
two steps on average). Only integer arithmetic modulo 2**32 and 2**64: ``csrc/index_engine/permutation.cpp`` agrees to
the bit.

Hashes: the output functions of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) and of MurmurHash3's 32-bit variant.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..arrays import IntArray

SORTED_UP_TO = 256
"""Largest domain that is sorted whole: its order takes a byte an example to keep, and microseconds to make."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_INDEX = np.uint64(SORTED_UP_TO - 1)

UintArray: TypeAlias = npt.NDArray[np.uint64]
Uint32Array: TypeAlias = npt.NDArray[np.uint32]


def fold(key: int, part: int) -> int:
    """The 64-bit key that ``part`` (taken modulo 2**64) leads to from ``key``."""
    key = (key + _GOLDEN) & _MASK ^ (part & _MASK)
    key = ((key ^ (key >> 30)) * _MIX1) & _MASK
    key = ((key ^ (key >> 27)) * _MIX2) & _MASK
    return key ^ (key >> 31)


def fold_each(keys: UintArray, parts: IntArray) -> UintArray:
    """``fold`` of arrays, uint64."""
    return _mix64((keys + np.uint64(_GOLDEN)) ^ parts.astype(np.uint64))


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers (each taken modulo 2**64)."""
    key = 0
    for part in parts:
        key = fold(key, part)
    return key


def hash32(values: Uint32Array) -> Uint32Array:
    """A bijection of 32-bit integers under which close inputs have unrelated outputs, uint32."""
    values = values ^ (values >> np.uint32(16))
    values *= np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(16)
    return values


def permutation_window(size: int, key: int, start: int, stop: int) -> IntArray:
    """Values at positions ``start:stop`` of the permutation of ``range(size)`` under ``key``, int64."""
    if not 0 <= start <= stop <= size:
        raise ValueError(f"window {start}:{stop} is outside of range({size})")
    if size <= SORTED_UP_TO:
        return sorted_order(size, key)[start:stop].astype(np.int64)
    positions = np.arange(start, stop, dtype=np.int64)
    return permute(np.full(stop - start, size), np.full(stop - start, key, dtype=np.uint64), positions)


def sorted_order(size: int, key: int) -> npt.NDArray[np.uint8]:
    """The whole permutation of ``range(size)``, up to ``SORTED_UP_TO``, uint8."""
    index = np.arange(size, dtype=np.uint64)
    hashes = _mix64(np.uint64(key) + (index + np.uint64(1)) * np.uint64(_GOLDEN)) & ~_INDEX
    order: npt.NDArray[np.uint8] = (np.sort(hashes | index) & _INDEX).astype(np.uint8)
    return order


def permute(sizes: IntArray, keys: UintArray, positions: IntArray) -> IntArray:
    """Element i: the value at ``positions[i]`` of the permutation of ``range(sizes[i])`` under ``keys[i]``, int64.

    By the Feistel network, whatever the size (at least 2).
    """
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)  # exact: sizes are below 2**53
    low_bits = bits // np.uint64(2)
    one = np.uint64(1)
    low_mask = ((one << low_bits) - one).astype(np.uint32)
    high_mask = ((one << (bits - low_bits)) - one).astype(np.uint32)
    rounds: list[Uint32Array] = []
    for i in range(1, 5):
        pair = _mix64(keys + np.uint64(i * _GOLDEN & _MASK))
        rounds += [pair.astype(np.uint32), (pair >> np.uint64(32)).astype(np.uint32)]
    out = positions.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        value, shift = out[walking], low_bits[walking]
        low = value.astype(np.uint32) & low_mask[walking]
        high = (value >> shift).astype(np.uint32)
        for i in range(0, 8, 2):
            high ^= hash32(low ^ rounds[i][walking]) & high_mask[walking]
            low ^= hash32(high ^ rounds[i + 1][walking]) & low_mask[walking]
        value = high.astype(np.uint64) << shift | low
        out[walking] = value
        walking = walking[value >= sizes[walking].astype(np.uint64)]
    return out.astype(np.int64)


def _mix64(values: UintArray) -> UintArray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX2)
    values ^= values >> np.uint64(31)
    return values
