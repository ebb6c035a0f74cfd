"""``sketch_all``: the sketches of a list of parameters or of their gradients, side by side, in fp64.

    matrix [d0, d1]   left [d0, r0], right [d1, r1] of +-1        leftᵀ V right / sqrt(r0 r1)   r0 r1 numbers
    vector [d0]       left [r, m] positions, right [d0] of +-1    out[j] = sum of right[i] V[i] over i in left[j]
                      or d0 for none                                                            r numbers
    any shape         neither                                     the values

A parameter of more than two dimensions is a matrix [d0, numel / d0]; a side of a matrix that is ``None`` is the
identity and is not in the scale. Why in fp64, and what it costs: see ``sketch_params``. No fp64 copy of a large
parameter is made; same input, same bits.

The same stem is in ``csrc/ops/sketch_all.cpp`` (CPU) and ``tests/ops``; on a GPU it is a loop over ``sketch_params``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check
from ._register import Values, register


def sketch_all(values: Sequence[Tensor], left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
    """Sketch every one of ``values`` under its own map.

    Args:
        values: at least one, each float32, float64, bfloat16 or float16, all on a CPU or on one CUDA device; of any
            shapes and strides.
        left: as many; see above, floating for a matrix and int64 for a vector, on the same device.
        right: as many; floating, float32 or float64 for a vector.

    Returns:
        [K] in float64.

    Raises:
        TypeError: another dtype or kind of device, or not the same for all.
        ValueError: no values, lists of different lengths, shapes that do not fit, or positions outside of [0, d0].
    """
    out: Tensor = _OP(values, left, right)
    return out


def _is_vector(values: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    return values.dim() < 2 and not (left is None and right is None)


def _check_lists(values: Sequence[Tensor], left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> None:
    for name, given in (("values", values), ("left", left), ("right", right)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {type(given).__name__}")
    if not len(values) == len(left) == len(right) or not values:
        raise ValueError(
            "values, left and right must be lists of one length, not 0, "
            f"got the lengths {len(values)}, {len(left)} and {len(right)}"
        )
    for i in range(len(values)):
        x, a, b, name = values[i], left[i], right[i], f"values[{i}]"
        _check.check_operand(name, x)
        _check.check_like(name, x, "values[0]", values[0], x.dtype)
        if _is_vector(x, a, b):
            _check_vector(i, x, a, b)
        else:
            _check_matrix(i, x, a, b)


def _check_vector(i: int, x: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    if x.dim() != 1 or left is None or right is None:
        missing = "no dimensions" if x.dim() != 1 else "one of them alone"
        raise ValueError(f"left[{i}] and right[{i}] must both be there for a vector, or neither, got {missing}")
    _check.check_like(f"left[{i}]", left, f"values[{i}]", x, torch.int64)
    _check.check_operand(f"right[{i}]", right, (torch.float32, torch.float64))
    _check.check_map(f"right[{i}]", right, f"values[{i}]", x)
    if left.dim() != 2:
        raise ValueError(f"left[{i}] of a vector must have shape [r, m], got {list(left.shape)}")
    if right.shape != x.shape:
        raise ValueError(f"right[{i}] must have shape {list(x.shape)}, got {list(right.shape)}")


def _check_matrix(i: int, x: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    if left is None and right is None:
        return
    _check.check_map(f"left[{i}]", left, f"values[{i}]", x)
    _check.check_map(f"right[{i}]", right, f"values[{i}]", x)
    _check.check_map_shape(f"left[{i}]", left, x.shape[0])
    _check.check_map_shape(f"right[{i}]", right, math.prod(x.shape[1:]))


def _check_positions(values: Sequence[Tensor], left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> None:
    for i, (x, a, b) in enumerate(zip(values, left, right, strict=True)):
        if a is not None and _is_vector(x, a, b):
            _check.check_index(f"left[{i}]", a, x.shape[0] + 1)


def _one(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    if left is None and right is None:
        return x.reshape(-1).double()
    if _is_vector(x, left, right):
        assert left is not None and right is not None
        padded = torch.nn.functional.pad(x.double() * right.double(), (0, 1))
        return padded[left].sum(-1)
    matrix = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    stats: Tensor = torch.ops.taskgrad.sketch_params(matrix, left, right)
    rank = math.prod(1 if side is None else side.shape[1] for side in (left, right))
    return stats.flatten() if rank == 0 else stats.flatten() * rank**-0.5


def reference(values: Sequence[Tensor], left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
    """``sketch_all`` in plain torch, one after the other."""
    return torch.cat([_one(*entry) for entry in zip(values, left, right, strict=True)])


def _fake(values: Sequence[Tensor], left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
    width = 0
    for x, a, b in zip(values, left, right, strict=True):
        if a is None and b is None:
            width += x.numel()
        elif a is not None and _is_vector(x, a, b):
            width += a.shape[0]
        else:
            r0, r1 = x.shape[0] if a is None else a.shape[1], math.prod(x.shape[1:]) if b is None else b.shape[1]
            width += r0 * r1
    return values[0].new_empty(width, dtype=torch.float64)


_OP = register(
    "sketch_all(Tensor[] values, Tensor?[] left, Tensor?[] right) -> Tensor",
    check=_check_lists,
    fake=_fake,
    reference=reference,
    values=Values(_check_positions, lambda values, left, right: None),  # on a GPU torch's own indexing looks
    native=True,
)
