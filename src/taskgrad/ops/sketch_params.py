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

from .sum_gram import DTYPES, triton_obstacle

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference runs on its GPUs
    triton = None

torch.library.define("taskgrad::sketch_params", "(Tensor theta, Tensor? left, Tensor? right) -> Tensor")


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
    if theta.dtype not in DTYPES:
        raise TypeError(f"theta must be float32, float64, bfloat16 or float16, got {theta.dtype}: convert it first")
    if theta.device.type not in ("cpu", "cuda"):
        raise TypeError(f"theta must be on a cpu or cuda device, got {theta.device}: move it with .to() first")
    if theta.dim() != 2:
        raise ValueError(f"theta must have shape [d0, d1], got {list(theta.shape)}: flatten(1) it first")
    for side, size, name in ((left, theta.shape[0], "left"), (right, theta.shape[1], "right")):
        if side is not None and (side.dim() != 2 or side.shape[0] != size):
            raise ValueError(f"{name} must have shape [{size}, r], got {list(side.shape)}")
    out: Tensor = torch.ops.taskgrad.sketch_params(theta.detach(), left, right)
    return out


def reference(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``sketch_params`` in plain torch; by blocks of rows, so that no fp64 copy of a large parameter is made."""
    if left is None:
        half = theta.double()
    else:
        half = theta.new_zeros(left.shape[1], theta.shape[1], dtype=torch.float64)
        size = max(1, BLOCK_ELEMENTS // max(1, theta.shape[1]))
        for rows, signs in zip(theta.split(size), left.split(size), strict=True):
            half.addmm_(signs.double().mT, rows.double())
    return half if right is None else half @ right.double()


BLOCK_ELEMENTS = 1 << 18  # 2 MiB of fp64: stays in the cache between conversion and product


@torch.library.register_fake("taskgrad::sketch_params")  # type: ignore[untyped-decorator]
def _fake(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    r0 = theta.shape[0] if left is None else left.shape[1]
    r1 = theta.shape[1] if right is None else right.shape[1]
    return theta.new_empty(r0, r1, dtype=torch.float64)


@torch.library.impl("taskgrad::sketch_params", "CompositeExplicitAutograd")
def _without_kernel(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    return _fresh_reference(theta, left, right)


def _fresh_reference(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    out = reference(theta, left, right)
    return out.clone() if out is theta else out  # an op must not return its input


@torch.library.impl("taskgrad::sketch_params", "CUDA")
def _cuda(theta: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    fits = left is not None and right is not None and theta.numel() > 0 and theta.dtype != torch.float64
    if not fits or triton_obstacle(theta.device) is not None:
        return _fresh_reference(theta, left, right)
    assert left is not None and right is not None
    with torch.cuda.device(theta.device):
        return launch(theta, left, right)


# ----------------------------------------------------------------------------------------------------------
# Triton. The sketch is linear, so that of a matrix is the sum of those of its blocks: a program takes BLOCK_0 rows and
# a stripe of columns, multiplies with R tile by tile, then with L, and writes one [r0, r1] partial sum:
#
#     theta     [d0, d1]        read once (once for every 32 columns of R); tiles [BLOCK_0, BLOCK_1]
#     left      [d0, r0]        BLOCK_0 rows, 32 columns at a time
#     right     [d1, r1]        read by every program of a stripe: from L2
#     partials  [P, r0, r1]     fp64, P row blocks times stripes; added afterwards in a fixed order, no atomics
#
# fp64 products are on the tensor cores of sm_80 and sm_90. No side of 64 may come first in a product: Triton (3.7)
# takes it for one of sm_100's tensor cores, which have no fp64, and aborts.

PROGRAMS = 1024  # about 8 for each SM of an H100


R = 32  # columns of either map at a time: less would spare work at small ranks, but spills on sm_90


def tile_config(dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a tile that spill no registers."""
    return (32, 32) if dtype == torch.float32 else (16, 64)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def sketch_params_kernel(  # type: ignore[no-untyped-def]
        theta,
        left,
        right,
        partials,
        d0,
        d1,
        r0,
        r1,
        row_stride,
        tiles_per_stripe,
        BLOCK_0: tl.constexpr,
        BLOCK_1: tl.constexpr,
        RANK: tl.constexpr,
    ):
        rows = tl.program_id(0).to(tl.int64) * BLOCK_0 + tl.arange(0, BLOCK_0)
        first = tl.program_id(1).to(tl.int64) * tiles_per_stripe * BLOCK_1
        j = tl.program_id(2) * RANK + tl.arange(0, RANK)
        product = tl.zeros((BLOCK_0, RANK), dtype=tl.float64)
        for tile in range(tiles_per_stripe):
            columns = first + tile * BLOCK_1 + tl.arange(0, BLOCK_1)
            inside = (rows < d0)[:, None] & (columns < d1)[None, :]
            a = tl.load(theta + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
            inside = (columns < d1)[:, None] & (j < r1)[None, :]
            b = tl.load(right + columns[:, None] * r1 + j[None, :], mask=inside, other=0.0)
            a = a.to(tl.float64)
            if theta.dtype.element_ty.primitive_bitwidth == 16:
                # a sum of one: else Triton (3.7) sees through the cast, plans for a 16-bit product and aborts
                a = tl.sum(a[:, :, None], axis=2)
            product += tl.dot(a, b.to(tl.float64), out_dtype=tl.float64)
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        for start in range(0, r0, RANK):
            i = start + tl.arange(0, RANK)
            inside = (rows < d0)[None, :] & (i < r0)[:, None]
            signs = tl.load(left + rows[None, :] * r0 + i[:, None], mask=inside, other=0.0)
            sketch = tl.dot(signs.to(tl.float64), product, out_dtype=tl.float64)
            out = partials + (program * r0 + i)[:, None] * r1 + j[None, :]
            tl.store(out, sketch, mask=(i < r0)[:, None] & (j < r1)[None, :])


def launch(theta: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Run the Triton kernel on a matrix that is not empty and not float64, sketched on both sides."""
    theta = theta if theta.stride(1) == 1 else theta.contiguous()
    left, right = left.contiguous(), right.contiguous()
    (d0, d1), r0, r1 = theta.shape, left.shape[1], right.shape[1]
    block_0, block_1 = tile_config(theta.dtype)
    row_blocks, tiles = triton.cdiv(d0, block_0), triton.cdiv(d1, block_1)
    tiles_per_stripe = triton.cdiv(tiles, max(1, PROGRAMS // row_blocks))
    stripes = triton.cdiv(tiles, tiles_per_stripe)
    partials = torch.empty(row_blocks * stripes, r0, r1, dtype=torch.float64, device=theta.device)
    sketch_params_kernel[(row_blocks, stripes, triton.cdiv(r1, R))](
        theta,
        left,
        right,
        partials,
        d0,
        d1,
        r0,
        r1,
        theta.stride(0),
        tiles_per_stripe,
        BLOCK_0=block_0,
        BLOCK_1=block_1,
        RANK=R,
        num_warps=4,
    )
    return partials.sum(0)
