"""``sketch_params``: the two-sided sketch of a parameter matrix, in fp64, in one pass over it.

    theta [d0, d1], L [d0, r0], R [d1, r1] of +-1  ->  Lᵀ theta R   [r0, r1], fp64

Differences of two of these are sketches of an update. An update is 1e-6 of the parameter and cancels out of fp32 sums,
so everything is accumulated in fp64.

Cost: d0 d1 elements of theta read once, and d0 d1 r1 + d0 r0 r1 fp64 multiply-adds. A 4096 x 4096 matrix in fp32 at
r = 32 is 67 MB and 0.55 G multiply-adds: 22 us of an H100's memory at 3 TB/s, 32 us of its 34 TFLOP/s (fp64, vector
units) and half of that on its tensor cores. By the step that is about r / (3 N) of a step's multiplications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._register import Triton, register

BLOCK_ELEMENTS = 1 << 18  # 2 MiB of fp64: stays in the cache between conversion and product


def sketch_params(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Sketch a parameter matrix on both sides, in fp64 and not scaled.

    Args:
        theta: [d0, d1], float32, float64, bfloat16 or float16, on a CPU or a CUDA device, of any strides.
        left: [d0, r0] of ±1, floating, on the same device, or ``None`` for the identity.
        right: [d1, r1] of ±1, floating, on the same device, or ``None`` for the identity.

    Returns:
        [r0, r1] in float64.

    Raises:
        TypeError: another dtype, or a device of another kind.
        ValueError: shapes that do not fit.
    """
    out: Tensor = _OP(theta, left, right)
    return out


def _check_matrix(theta: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    _check.check_operand("theta", theta)
    _check.check_map("left", left, "theta", theta)
    _check.check_map("right", right, "theta", theta)
    if theta.dim() != 2:
        raise ValueError(f"theta must have shape [d0, d1], got {list(theta.shape)}: flatten(1) it first")
    _check.check_map_shape("left", left, theta.shape[0])
    _check.check_map_shape("right", right, theta.shape[1])


def reference(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``sketch_params`` in plain torch; by blocks of rows, so that no fp64 copy of a large parameter is made."""
    if left is None:
        half = theta.double()
    else:
        half = theta.new_zeros(left.shape[1], theta.shape[1], dtype=torch.float64)
        size = max(1, BLOCK_ELEMENTS // max(1, theta.shape[1]))
        for rows, signs in zip(theta.split(size), left.split(size), strict=True):
            half.addmm_(signs.double().mT, rows.double())
    if right is not None:
        return half @ right.double()
    return half.clone() if half is theta else half  # an op must not return its input


def _fake(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    r0 = theta.shape[0] if left is None else left.shape[1]
    r1 = theta.shape[1] if right is None else right.shape[1]
    return theta.new_empty(r0, r1, dtype=torch.float64)


def _fits(theta: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and theta.numel() > 0 and theta.dtype != torch.float64


_OP = register(
    "sketch_params(Tensor theta, Tensor? left, Tensor? right) -> Tensor",
    check=_check_matrix,
    fake=_fake,
    reference=reference,
    native=True,
    cuda=(Triton("sketch_params", _fits, lambda kernel, theta, left, right: kernel.launch(theta, left, right)),),
)
