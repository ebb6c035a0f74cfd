"""Arguments of any kind, checked and brought into arrays."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arrays import FloatArray, to_numpy


def per_task(name: str, value: Any, tasks: Sequence[str], default: float) -> FloatArray:
    """One number per task, float64 [T], from a number for all, a mapping (others: ``default``), or a sequence."""
    if value is None:
        return np.full(len(tasks), default)
    if isinstance(value, Mapping):
        out = np.full(len(tasks), default)
        for task, number in zip(known(name, value, tasks), _floats(name, list(value.values())), strict=True):
            out[list(tasks).index(task)] = number
    else:
        array = _floats(name, value)
        if array.ndim and array.shape != (len(tasks),):
            raise ValueError(f"{name} must be a number or one per task ({len(tasks)}), got shape {array.shape}")
        out = np.broadcast_to(array, (len(tasks),)).copy()
    if not np.isfinite(out).all():
        raise ValueError(f"{name} must be finite, got {out.tolist()}")
    return out


def _floats(name: str, value: Any) -> FloatArray:
    try:
        array = to_numpy(value)
        if array.dtype.kind not in "biufO":  # texts and complex numbers would be converted
            raise TypeError
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold numbers, got {value!r}") from None


def known(name: str, given: Any, tasks: Sequence[str]) -> list[str]:
    """Task names in ``given``; raises ValueError for those that are no task."""
    names = [str(task) for task in given]
    unknown = sorted(set(names) - set(tasks))
    if unknown:
        raise ValueError(f"{name} names unknown tasks {unknown}; the tasks are {list(tasks)}")
    return names


def count_of(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``; raises TypeError or ValueError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # a tensor of a float has an __index__ too, which raises
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
