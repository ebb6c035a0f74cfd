"""``wgrad_sketch``: the weight gradient of a linear layer and, per task, its sketch, from one pair (dY, X).

With X_s, dY_s the rows of segment s (a task, or the rows of no task), its part of the gradient is G_s = dY_sᵀ X_s and
dW = Σ_s G_s. Its two-sided sketch is Lᵀ G_s R = U_sᵀ V_s with U = dY L and V = X R: two skinny products of cost r/d of
the dense one, whatever the number of tasks (LoGra, arXiv 2405.13954). Where the G_s are small (or wanted: without L and
R) they are formed instead, and dW is their sum: splitting the product by task costs no extra multiplications.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from . import _check, _native
from ._register import Triton, register
from .segment_sum import stat_dtype
from .segments import segments_at, within

PANEL_BYTES = (
    8 << 20
)  # of a CPU's panel, S blocks of rows: it stays in a last-level cache between product and sum or Gram


def wgrad_sketch(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight gradient and its unscaled sketch per segment.

    Args:
        dy: [E, M, d_out], gradient of the output: E entries with a task id each, M rows per entry; float32, float64,
            bfloat16 or float16.
        x: [E, M, d_in], input, same dtype and device as ``dy``.
        order: int64 [E], entries sorted by segment, on the device of ``dy``; ``None`` if sorted already.
        offsets: int32 or int64 [S + 1], rising from 0 to E; segment s owns entries
            ``order[offsets[s]:offsets[s + 1]]``. On the CPU, or for CUDA inputs on their device, where its values are
            never looked at by the host.
        left: [d_out, r0] or ``None`` for the identity.
        right: [d_in, r1] or ``None`` for the identity. Both with entries that the dtype of ``dy`` holds exactly, as ±1.

    Returns:
        dW [d_out, d_in] in the dtype of ``dy`` and S [S, r0, r1] with S_s = leftᵀ G_s right, float64 for float64 and
        float32 otherwise. NaN throughout where order or offsets on a GPU are malformed.

    Raises:
        TypeError: a dtype or a device that is not supported.
        ValueError: a shape that is not, or the values of order or offsets on a CPU.
    """
    dw, stats = _OP(dy, x, order, offsets, left, right)
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
        order = within(order, dy.shape[0])
        u, v = (rows.unflatten(0, dy.shape[:2]).index_select(0, order).flatten(0, 1) for rows in (u, v))
    return dw, masked_products(u, v, offsets.long() * dy.shape[1])


def masked_products(u: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """U_sᵀ V_s of u [N, r0] and v [N, r1], sorted: [S, r0, r1]. S times the work, but nothing is read on the host."""
    row = torch.arange(u.shape[0], device=u.device)
    out = u.new_empty(offsets.shape[0] - 1, u.shape[1], v.shape[1])
    for s in range(out.shape[0]):
        inside = ((row >= offsets[s]) & (row < offsets[s + 1]))[:, None]
        torch.mm(torch.where(inside, u, 0).mT, torch.where(inside, v, 0), out=out[s])  # 0 times NaN is not 0
    return out


def _fake_rows(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    return dy.new_empty(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))


def _fake(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[-1], x.shape[-1]), _fake_rows(dy, x, order, offsets, left, right)


def _on_cpu(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    if splits(dy, x, offsets, left, right):
        dtype = stat_dtype(dy)
        total, grads = split_product(dy.to(dtype), x.to(dtype), order, offsets)
        stats = grads if left is None else left.to(dtype).mT @ grads
        stats = stats if right is None else stats @ right.to(dtype)
        return total.to(dy.dtype), stats
    stats = sketch_of_rows(dy, x, order, offsets, left, right)
    return dy.flatten(0, 1).mT @ x.flatten(0, 1), stats


def sketch_of_rows(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """(dY_s L)ᵀ (X_s R) for every segment: ``wgrad_sketch`` without the weight gradient, on either device."""
    out: Tensor = torch.ops.taskgrad.sketch_of_rows(dy, x, order, offsets, left, right)
    return out


def rows_reference(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """``sketch_of_rows`` by torch's products, and on a GPU by the Triton kernel for those of the segments."""
    if dy.shape[2] == 0 or x.shape[2] == 0:  # 0, also where the other holds NaN
        return _fake_rows(dy, x, order, offsets, left, right).zero_()
    if dy.device.type == "cpu":
        u, v = _sketched(dy, left), _sketched(x, right)
        return segment_products(u.to(stat_dtype(u)), v.to(stat_dtype(v)), order, offsets)
    offsets = offsets.to(dy.device, non_blocking=True)
    u, v = _sketched(dy.flatten(0, 1), left), _sketched(x.flatten(0, 1), right)
    if _PRODUCTS.takes(u, v, dy.shape[1], order, offsets):
        with torch.cuda.device(dy.device):
            out: Tensor = _PRODUCTS(u, v, dy.shape[1], order, offsets)
        return out
    u, v = (rows.to(stat_dtype(rows)).unflatten(0, dy.shape[:2]) for rows in (u, v))
    if order is not None:
        order = within(order, dy.shape[0])
        u, v = u.index_select(0, order), v.index_select(0, order)
    return masked_products(u.flatten(0, 1), v.flatten(0, 1), offsets.long() * dy.shape[1])


def _fits(u: Tensor, v: Tensor, rows_per_entry: int, order: Tensor | None, offsets: Tensor) -> bool:
    return u.numel() > 0 and v.numel() > 0 and offsets.shape[0] > 1 and u.dtype != torch.float64


def _launch(
    kernel: ModuleType, u: Tensor, v: Tensor, rows_per_entry: int, order: Tensor | None, offsets: Tensor
) -> Tensor:
    gpu = torch.cuda.get_device_properties(u.device)
    out: Tensor = kernel.launch(u, v, rows_per_entry, order, offsets, gpu.multi_processor_count, gpu.major)
    return out


_PRODUCTS = Triton("wgrad_sketch", _fits, _launch)


def _sketched(rows: Tensor, side: Tensor | None) -> Tensor:
    """``rows @ side`` in float32 or float64: rounded to 16 bits it would not add up to the sketch of dW."""
    if side is None:
        return rows
    if rows.device.type == "cpu" or rows.dtype == stat_dtype(rows):
        return rows.to(stat_dtype(rows)) @ side.to(stat_dtype(rows))
    return torch.mm(rows, side.to(rows.dtype), out_dtype=torch.float32)


def splits(dy: Tensor, x: Tensor, offsets: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    """Whether the G_t are formed and sketched, rather than dY and X sketched: multiplications beyond those of dW.

    On a CPU, where they are fewer, the G_t together are smaller than the activations. A GPU's way is always to sketch
    dY and X. Without sketch there is nothing else to do.
    """
    if left is None and right is None:
        return True
    if not dy.is_cpu or _native.ready():  # the native kernel sketches by additions: nothing is cheaper
        return False
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
    return split_product(u, v, order, offsets)[1]


def split_product(u: Tensor, v: Tensor, order: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Uᵀ V [r0, r1], and its parts as from ``segment_products``; both by panels of rows, summed while in the cache."""
    if order is not None:
        u, v = u.index_select(0, order), v.index_select(0, order)
    bounds = [at * u.shape[1] for at in offsets.tolist()]
    u, v = u.flatten(0, 1), v.flatten(0, 1)
    parts = u.new_empty(len(bounds) - 1, u.shape[1], v.shape[1])
    total = u.new_empty(u.shape[1], v.shape[1])
    height = panel_height(PANEL_BYTES, parts.shape[0], v)
    for start in range(0, u.shape[1], height):
        rows = slice(start, start + height)
        panel = parts[:, rows]
        for part, (first, last) in zip(panel, pairwise(bounds), strict=True):
            if last > first:
                torch.mm(u[first:last, rows].mT, v[first:last], out=part)
            else:
                part.zero_()
        torch.sum(panel, 0, out=total[rows])
    return total, parts


def panel_height(size: int, segments: int, v: Tensor) -> int:
    """How many rows of the segments' products with v [N, r1] a panel of ``size`` bytes has."""
    room = size // max(1, segments * v.shape[1] * v.itemsize)
    return max(64, room - room % 16)  # a product of fewer rows than that leaves MKL idle


def _on_gpu(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    stats = sketch_of_rows(dy, x, order, offsets, left, right)
    if splits(dy, x, offsets, left, right):  # the product is there already
        return stats.sum(0).to(dy.dtype), stats
    return dy.flatten(0, 1).mT @ x.flatten(0, 1), stats


register(
    "sketch_of_rows(Tensor dy, Tensor x, Tensor? order, Tensor offsets, Tensor? left, Tensor? right) -> Tensor",
    check=_check.check_entries,
    values=segments_at(order=2, offsets=3),
    fake=_fake_rows,
    reference=rows_reference,
    native=True,
)

_OP = register(
    "wgrad_sketch(Tensor dy, Tensor x, Tensor? order, Tensor offsets, Tensor? left, Tensor? right)"
    " -> (Tensor dw, Tensor stats)",
    check=_check.check_entries,
    values=segments_at(order=2, offsets=3),
    fake=_fake,
    reference=_on_gpu,
    cpu=_on_cpu,
)
