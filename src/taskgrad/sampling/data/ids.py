"""The task of each example and the names of the tasks, as a user has them, checked and brought into arrays."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import to_numpy

_CHUNK = 1 << 16


def check_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Distinct names, at least one; raises TypeError or ValueError."""
    if isinstance(tasks, str | bytes | set | frozenset):  # a set has another order in the next process
        raise TypeError(f"tasks must be a sequence of names, got {reprlib.repr(tasks)}")
    try:
        given = tuple(tasks)
    except TypeError:
        raise TypeError(f"tasks must be a sequence of names, got {reprlib.repr(tasks)}") from None
    for entry in given:
        if not isinstance(entry, str):
            raise TypeError(
                f"tasks must be a sequence of names, got a {type(tasks).__name__} with {reprlib.repr(entry)}"
            )
    names = tuple(str.__str__(name) for name in given)  # NumPy's, or of an enum
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be distinct names, at least one, got {list(names)}")
    return names


def check_ids(argument: str, value: Any, names: tuple[str, ...] | None) -> npt.NDArray[Any]:
    """One integer per example, [examples] of any integer dtype, from integers or, with ``names``, from names.

    ``argument``: what the user calls ``value``. Integers in an array are taken as they are, not copied. Raises
    TypeError or ValueError.
    """
    needs = f"{argument} must hold one task per example"
    try:
        array = to_numpy(value)
    except Exception as error:  # whatever it is that has been passed
        raise TypeError(
            f"{needs}, integers or names, got {reprlib.repr(value)}, which NumPy cannot take: {error}"
        ) from None
    if array.ndim == 0:
        raise TypeError(f"{needs}, in a list, an array or a tensor, got {reprlib.repr(value)}")
    if array.ndim > 1 or not len(array):
        more = "; ids per token are for the tracker, a sampler needs one per example" if array.ndim > 1 else ""
        raise ValueError(f"{needs}, got shape {array.shape}{more}")
    if np.ma.is_masked(value):
        raise ValueError(f"{needs}, got a masked array with {int(np.ma.count_masked(value))} masked entries")
    if array.dtype.kind in "UST" or (array.dtype.kind == "O" and any(isinstance(x, str | bytes) for x in array)):
        # NumPy has made texts of numbers in a list, and cut zero characters off
        return _numbers(argument, value if isinstance(value, list | tuple) else array, names)
    if array.dtype.kind == "O":
        return _from_objects(argument, array)
    if array.dtype.kind not in "iu":
        hint = ": convert whole numbers to integers, NaN is no task" if array.dtype.kind == "f" else ""
        raise TypeError(f"{argument} must hold integers or names, got {array.dtype}{hint}")
    return array


def _numbers(argument: str, entries: Any, names: tuple[str, ...] | None) -> npt.NDArray[np.int32]:
    if names is None:
        raise ValueError(f"{argument} holds names: pass tasks=[...] too, in the order the tracker has them")
    number: dict[Any, int] = {name: t for t, name in enumerate(names)}
    number |= {name.encode(errors="surrogatepass"): t for t, name in enumerate(names)}
    out = np.empty(len(entries), dtype=np.int32)
    for first in range(0, len(entries), _CHUNK):
        chunk = entries[first : first + _CHUNK]
        texts = chunk.tolist() if isinstance(chunk, np.ndarray) else chunk
        try:
            out[first : first + len(texts)] = [number[text] for text in texts]
        except (KeyError, TypeError):  # TypeError: not hashable
            plain = [str.__str__(text) if isinstance(text, str) else text for text in texts]
            _refuse_strangers(argument, first, plain, number, names)
            out[first : first + len(texts)] = [number[text] for text in plain]
    return out


def _refuse_strangers(
    argument: str, first: int, texts: list[Any], number: dict[Any, int], names: tuple[str, ...]
) -> None:
    for at, text in enumerate(texts):
        if not isinstance(text, str | bytes):
            raise TypeError(f"{argument} holds names, but example {first + at} has {reprlib.repr(text)}")
    unknown = [(at, text) for at, text in enumerate(texts) if text not in number]
    if unknown:
        strangers = sorted({str(text) for _, text in unknown})
        raise ValueError(
            f"{argument} names unknown tasks {strangers}, the first at example {first + unknown[0][0]}; the tasks are "
            f"{list(names)}"
        )


def _from_objects(argument: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Integers in an array of objects, as pandas may hold them."""
    for at, entry in enumerate(array):
        if isinstance(entry, bool | np.bool_) or not hasattr(entry, "__index__"):
            raise TypeError(f"{argument} must hold integers or names, but example {at} has {reprlib.repr(entry)}")
        if not -(1 << 63) <= entry.__index__() < 1 << 63:
            raise ValueError(f"{argument} has the id {entry} at example {at}, but an id must fit in 64 bits")
    return array.astype(np.int64)
