"""``wgrad_sketch``: the weight gradient of a linear layer and, per task, its sketch, from one pair (dY, X).

With X_s, dY_s the rows of segment s (a task, or the rows of no task), its part of the gradient is G_s = dY_sᵀ X_s and
dW = Σ_s G_s. Its two-sided sketch is Lᵀ G_s R = U_sᵀ V_s with U = dY L and V = X R: two skinny products of cost r/d of
the dense one, whatever the number of tasks (LoGra, arXiv 2405.13954). Where the G_s are small (or wanted: without L and
R) they are formed instead, and dW is their sum: splitting the product by task costs no extra multiplications.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .segment_sum import stat_dtype
from .sum_gram import DTYPES, triton_obstacle

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference runs on its GPUs
    triton = None

torch.library.define(
    "taskgrad::wgrad_sketch",
    "(Tensor dy, Tensor x, Tensor? order, Tensor offsets, Tensor? left, Tensor? right) -> (Tensor dw, Tensor stats)",
)


def wgrad_sketch(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight gradient and its unscaled sketch per segment.

    Args:
        dy: [E, M, d_out], gradient of the output: E entries with a task id each, M rows per entry; float32, float64,
            bfloat16 or float16.
        x: [E, M, d_in], input, same dtype and device as ``dy``.
        order: int64 [E], entries sorted by segment, on the device of ``dy``; ``None`` if sorted already.
        offsets: int32 or int64 [S + 1]; segment s owns entries ``order[offsets[s]:offsets[s + 1]]``. On the CPU, or
            for CUDA inputs on their device, where its values are never looked at by the host.
        left: [d_out, r0] or ``None`` for the identity.
        right: [d_in, r1] or ``None`` for the identity. Both with entries that the dtype of ``dy`` holds exactly, as ±1.

    Returns:
        dW [d_out, d_in] in the dtype of ``dy`` and S [S, r0, r1] with S_s = leftᵀ G_s right, float64 for float64 and
        float32 otherwise.

    Raises:
        TypeError: a dtype or a device that is not supported.
        ValueError: a shape that is not.
    """
    if dy.dtype not in DTYPES or x.dtype != dy.dtype:
        raise TypeError(f"dy and x must be of one floating dtype, got {dy.dtype} and {x.dtype}: convert them first")
    if dy.device.type not in ("cpu", "cuda") or x.device != dy.device:
        raise TypeError(f"dy and x must be on one cpu or cuda device, got {dy.device} and {x.device}: move them first")
    if offsets.dtype not in (torch.int32, torch.int64) or (order is not None and order.dtype != torch.int64):
        raise TypeError(f"order must be int64 and offsets int32 or int64, got offsets of {offsets.dtype}")
    if dy.dim() != 3 or x.dim() != 3 or x.shape[:2] != dy.shape[:2]:
        raise ValueError(
            f"dy and x must have shapes [E, M, d_out] and [E, M, d_in], got {list(dy.shape)} and {list(x.shape)}"
        )
    if offsets.dim() != 1 or offsets.shape[0] == 0 or (order is not None and order.shape != dy.shape[:1]):
        raise ValueError(
            f"offsets must have shape [S + 1] and order [{dy.shape[0]}], got {list(offsets.shape)} and "
            f"{None if order is None else list(order.shape)}"
        )
    for name, side, d in (("left", left, dy.shape[2]), ("right", right, x.shape[2])):
        if side is not None and (side.dim() != 2 or side.shape[0] != d):
            raise ValueError(f"{name} must have shape [{d}, r], got {list(side.shape)}")
    dw, stats = torch.ops.taskgrad.wgrad_sketch(dy.detach(), x.detach(), order, offsets, left, right)
    return dw, stats


def reference(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``wgrad_sketch`` in plain torch. Rows are masked, so that no value of ``offsets`` is looked at."""
    u, v = (rows.flatten(0, 1).to(stat_dtype(dy)) for rows in (dy, x))
    dw = (u.mT @ v).to(dy.dtype)
    u = u if left is None else u @ left.to(u.dtype)
    v = v if right is None else v @ right.to(v.dtype)
    if order is not None:
        u, v = (rows.unflatten(0, dy.shape[:2]).index_select(0, order).flatten(0, 1) for rows in (u, v))
    return dw, masked_products(u, v, offsets * dy.shape[1])


def masked_products(u: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """U_sᵀ V_s of u [N, r0] and v [N, r1], sorted: [S, r0, r1]. S times the work, but nothing is read on the host."""
    row = torch.arange(u.shape[0], device=u.device)
    out = u.new_empty(offsets.shape[0] - 1, u.shape[1], v.shape[1])
    for s in range(out.shape[0]):
        inside = ((row >= offsets[s]) & (row < offsets[s + 1]))[:, None]
        torch.mm(torch.where(inside, u, 0).mT, torch.where(inside, v, 0), out=out[s])  # 0 times NaN is not 0
    return out


@torch.library.register_fake("taskgrad::wgrad_sketch")  # type: ignore[untyped-decorator]
def _fake(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    stats = dy.new_empty(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))
    return dy.new_empty(dy.shape[-1], x.shape[-1]), stats


@torch.library.impl("taskgrad::wgrad_sketch", "CPU")
def _cpu(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    if splitting_is_cheaper(dy, x, offsets, left, right):
        dtype = stat_dtype(dy)
        grads = segment_products(dy.to(dtype), x.to(dtype), order, offsets)
        stats = grads if left is None else left.to(dtype).mT @ grads
        stats = stats if right is None else stats @ right.to(dtype)
        return grads.sum(0).to(dy.dtype), stats
    stats = sketch_of_rows(dy, x, order, offsets, left, right)
    return dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]), stats


def sketch_of_rows(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """(dY_s L)ᵀ (X_s R) for every segment: ``wgrad_sketch`` without the weight gradient, on either device."""
    if dy.device.type == "cpu":
        u, v = _sketched(dy, left), _sketched(x, right)
        return segment_products(u.to(stat_dtype(u)), v.to(stat_dtype(v)), order, offsets)
    offsets = offsets.to(dy.device, non_blocking=True)
    u, v = _sketched(dy.flatten(0, 1), left), _sketched(x.flatten(0, 1), right)
    empty = u.numel() * v.numel() == 0 or offsets.shape[0] == 1
    if empty or u.dtype == torch.float64 or triton_obstacle(dy.device) is not None:
        u, v = (rows.to(stat_dtype(rows)).unflatten(0, dy.shape[:2]) for rows in (u, v))
        if order is not None:
            u, v = u.index_select(0, order), v.index_select(0, order)
        return masked_products(u.flatten(0, 1), v.flatten(0, 1), offsets * dy.shape[1])
    with torch.cuda.device(dy.device):
        processors = torch.cuda.get_device_properties(dy.device).multi_processor_count
        return launch(u, v, dy.shape[1], order, offsets, processors)


def _sketched(rows: Tensor, side: Tensor | None) -> Tensor:
    """``rows @ side`` in float32 or float64: rounded to 16 bits it would not add up to the sketch of dW."""
    if side is None:
        return rows
    if rows.device.type == "cpu" or rows.dtype == stat_dtype(rows):
        return rows.to(stat_dtype(rows)) @ side.to(stat_dtype(rows))
    return torch.mm(rows, side.to(rows.dtype), out_dtype=torch.float32)


def splitting_is_cheaper(dy: Tensor, x: Tensor, offsets: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    """Whether to form the G_t and sketch them rather than to sketch dY and X: multiplications beyond those of dW.

    Where it is, the G_t together are smaller than the activations. Without sketch there is nothing else to do.
    """
    if left is None and right is None:
        return True
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    rows = dy.shape[0] * dy.shape[1]
    activations = rows * r0 * r1
    activations += 0 if left is None else rows * dy.shape[-1] * r0
    activations += 0 if right is None else rows * x.shape[-1] * r1
    per_task = 0 if left is None else dy.shape[-1] * x.shape[-1] * r0
    per_task += 0 if right is None else r0 * x.shape[-1] * r1
    return (offsets.shape[0] - 1) * per_task < activations


def segment_products(u: Tensor, v: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """S_t = U_tᵀ V_t for u [E, M, r0], v [E, M, r1]: [T + 1, r0, r1], zero for empty tasks."""
    bounds = offsets.tolist()
    if order is not None:
        u, v = u.index_select(0, order), v.index_select(0, order)
    rows = u.shape[1]
    u, v = u.reshape(-1, u.shape[-1]), v.reshape(-1, v.shape[-1])
    out = u.new_zeros(len(bounds) - 1, u.shape[-1], v.shape[-1])
    for t, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(u[start * rows : end * rows].mT, v[start * rows : end * rows], out=out[t])
    return out


@torch.library.impl("taskgrad::wgrad_sketch", "CUDA")
def _cuda(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    stats = sketch_of_rows(dy, x, order, offsets, left, right)
    if left is None and right is None:  # the product is there already, split by segment
        return stats.sum(0).to(dy.dtype), stats
    return dy.flatten(0, 1).mT @ x.flatten(0, 1), stats


# ----------------------------------------------------------------------------------------------------------
# Triton: a product per segment with K of any length, which cuBLAS only does if the host knows the lengths.
#
#     u, v      [E * M, r0], [E * M, r1]   as in memory; row i of the sorted ones is order[i // M] * M + i % M, and
#                                          segment s has the rows offsets[s] * M <= i < offsets[s + 1] * M
#     partials  [S, splits, r0, r1]        fp32; split k of a segment has the k-th of `splits` runs of its rows, so that
#                                          a few tiles fill the GPU; added afterwards in a fixed order, no atomics
#
# Program: (tile of r0 x r1, segment, split).
#
# Why two skinny products and no kernel that sketches inside the dense product. On an H100 at 600 TFLOP/s and 3 TB/s the
# dense product of N = 8192 rows, d = 4096, bfloat16, takes 458 us; U and V read dY and X once more, 134 MB or 45 us,
# whatever S. The fused way ("prefix": never reset the accumulator C, write L_tileᵀ C R_tile at every end of a segment,
# take differences afterwards) was compiled and left out:
# - it writes S r0 r1 numbers for each of 1024 tiles, 151 MB at S = 9 and r0 = r1 = 64, and reads them to add them up;
# - its products take the tensor cores 2 S (128 * 128 r0 + 128 r0 r1) operations a tile at TF32's half rate, a fifth of
#   the dense product's own time, and its dense part would have to be as fast as cuBLAS;
# - TF32 rounds the sum of all tasks so far, which drowns a rare one. In three TF32 products (tf32x3) it spills 1.5 to
#   2.4 KB a thread at 128 x 128 (r = 16, 32, 64; sm_90, Triton 3.7.1), and 0.5 to 1.9 KB at 64 x 128.


class Tile(NamedTuple):
    """Tile of r0 x r1, rows per step, launch shape."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int


def tile_config(dtype: torch.dtype, r0: int, r1: int) -> Tile:
    """The largest tile that spills no registers; fp32 is multiplied on the FMA units."""
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 3) if max(r0, r1) <= 32 else Tile(64, 64, 32, 4, 3)
    return Tile(64, 64, 64, 4, 3) if min(r0, r1) <= 64 else Tile(128, 128, 64, 8, 3)


SPLIT_ROWS = 256  # per segment and program at least, on average
PARTIALS = 1 << 24  # numbers at most

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def segment_products_kernel(  # type: ignore[no-untyped-def]
        u,  # [E * M, r0]
        v,  # [E * M, r1]
        order,  # [E], not read if not ORDERED
        offsets,  # [S + 1]
        partials,
        M,
        r0,
        r1,
        u_stride,
        v_stride,
        HEIGHT: tl.constexpr,
        WIDTH: tl.constexpr,
        DEPTH: tl.constexpr,
        ORDERED: tl.constexpr,
    ):
        across = tl.cdiv(r1, WIDTH)
        a_column = (tl.program_id(0) // across) * HEIGHT + tl.arange(0, HEIGHT)
        b_column = (tl.program_id(0) % across) * WIDTH + tl.arange(0, WIDTH)
        segment, split = tl.program_id(1), tl.program_id(2)
        start = tl.load(offsets + segment).to(tl.int64) * M
        end = tl.load(offsets + segment + 1).to(tl.int64) * M
        steps = tl.cdiv(tl.cdiv(end - start, DEPTH), tl.num_programs(2))
        start += split * steps * DEPTH
        end = tl.minimum(end, start + steps * DEPTH)
        product = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for i in range(tl.cdiv(tl.maximum(end - start, 0), DEPTH).to(tl.int32)):
            row = start + i * DEPTH + tl.arange(0, DEPTH)
            inside = row < end
            if ORDERED:
                row = tl.load(order + row // M, inside, other=0) * M + row % M
            a_inside = inside[:, None] & (a_column < r0)[None, :]
            b_inside = inside[:, None] & (b_column < r1)[None, :]
            a = tl.load(u + row[:, None] * u_stride + a_column[None, :], a_inside, other=0.0)
            b = tl.load(v + row[:, None] * v_stride + b_column[None, :], b_inside, other=0.0)
            product = tl.dot(tl.trans(a), b, product, input_precision="ieee")
        slot = segment.to(tl.int64) * tl.num_programs(2) + split
        out = partials + (slot * r0 + a_column[:, None]) * r1 + b_column[None, :]
        tl.store(out, product, mask=(a_column < r0)[:, None] & (b_column < r1)[None, :])


def launch(u: Tensor, v: Tensor, rows: int, order: Tensor | None, offsets: Tensor, processors: int) -> Tensor:
    """Run the Triton kernel on non-empty u [E * M, r0], v [E * M, r1] with M = ``rows``: [S, r0, r1] in float32."""
    u = u if u.stride(1) == 1 else u.contiguous()
    v = v if v.stride(1) == 1 else v.contiguous()
    (count, r0), r1, segments = u.shape, v.shape[1], offsets.shape[0] - 1
    if u.dtype != v.dtype:  # one side is sketched, the other is the identity
        u, v = u.float(), v.float()
    tile = tile_config(u.dtype, r0, r1)
    tiles = triton.cdiv(r0, tile.height) * triton.cdiv(r1, tile.width)
    splits = min(2 * processors // tiles, triton.cdiv(count, SPLIT_ROWS), PARTIALS // (segments * r0 * r1))
    splits = max(1, splits)
    partials = torch.empty(segments, splits, r0, r1, dtype=torch.float32, device=u.device)
    segment_products_kernel[(tiles, segments, splits)](
        u,
        v,
        offsets if order is None else order,
        offsets,
        partials,
        rows,
        r0,
        r1,
        u.stride(0),
        v.stride(0),
        HEIGHT=tile.height,
        WIDTH=tile.width,
        DEPTH=tile.depth,
        ORDERED=order is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partials.sum(1) if splits > 1 else partials.squeeze(1)
