"""Array types shared by the sampling modules."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


def frozen_floats(values: npt.ArrayLike) -> FloatArray:
    """A read-only float64 copy."""
    out = np.array(values, dtype=np.float64)
    out.setflags(write=False)
    return out


def frozen_ints(values: npt.ArrayLike) -> IntArray:
    """A read-only int64 copy."""
    out = np.array(values, dtype=np.int64)
    out.setflags(write=False)
    return out


def frozen_flags(values: npt.ArrayLike) -> BoolArray:
    """A read-only bool copy."""
    out = np.array(values, dtype=np.bool_)
    out.setflags(write=False)
    return out


class ReadOnlyArrays:
    """Attributes that are arrays stay read-only in copies and pickles, where NumPy makes them writable."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        for value in state.values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
        self.__dict__.update(state)


def to_numpy(value: Any) -> npt.NDArray[Any]:
    """An array from a tensor on any device, an array or a sequence."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)
