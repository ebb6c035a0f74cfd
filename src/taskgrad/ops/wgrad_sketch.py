"""``wgrad_sketch``: the weight gradient of a linear layer and, per task, its sketch, from one pair (dY, X).

With X_s, dY_s the rows of segment s (a task, or the rows of no task), its part of the gradient is G_s = dY_sᵀ X_s and
dW = Σ_s G_s. Its two-sided sketch is Lᵀ G_s R = U_sᵀ V_s with U = dY L and V = X R: two skinny products of cost r/d of
the dense one, whatever the number of tasks (LoGra, arXiv 2405.13954). Where the G_s are small (or wanted: without L and
R) they are formed instead, and dW is their sum: splitting the product by task costs no extra multiplications.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from . import _shared
from ._shared import stat_dtype, triton_obstacle

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
    check_entries(dy, x, order, offsets, left, right)
    _shared.check_real("dy", dy)
    maps = (None if side is None else side.detach() for side in (left, right))
    dw, stats = torch.ops.taskgrad.wgrad_sketch(dy.detach(), x.detach(), order, offsets, *maps)
    wrong = _shared.fault_on_gpu(order, offsets, dy.shape[0])
    return _shared.spoiled(dw, wrong), _shared.spoiled(stats, wrong)


def check_entries(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> None:
    """Raise unless everything is as ``wgrad_sketch`` says, but for the values of ``order`` and ``offsets``."""
    _shared.check_operand("dy", dy)
    _shared.check_like("x", x, "dy", dy)
    _shared.check_segments(order, offsets, "dy", dy)
    _shared.check_map("left", left, "dy", dy)
    _shared.check_map("right", right, "dy", dy)
    if dy.dim() != 3 or x.dim() != 3 or x.shape[:2] != dy.shape[:2]:
        raise ValueError(
            f"dy and x must have shapes [E, M, d_out] and [E, M, d_in], got {list(dy.shape)} and {list(x.shape)}"
        )
    _shared.check_segment_shapes(order, offsets, dy.shape[0])
    _shared.check_map_shape("left", left, dy.shape[2])
    _shared.check_map_shape("right", right, x.shape[2])


def reference(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``wgrad_sketch`` in plain torch. Rows are masked, so that no value of ``offsets`` is looked at."""
    u, v = (rows.flatten(0, 1).to(stat_dtype(dy)) for rows in (dy, x))
    dw = (u.mT @ v).to(dy.dtype)
    u = u if left is None else u @ left.to(u.dtype)
    v = v if right is None else v @ right.to(v.dtype)
    if order is not None:
        order = _shared.within(order, dy.shape[0])
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


@torch.library.register_fake("taskgrad::wgrad_sketch")  # type: ignore[untyped-decorator]
def _fake(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_entries(dy, x, order, offsets, left, right)
    r0 = dy.shape[-1] if left is None else left.shape[1]
    r1 = x.shape[-1] if right is None else right.shape[1]
    stats = dy.new_empty(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))
    return dy.new_empty(dy.shape[-1], x.shape[-1]), stats


@torch.library.impl("taskgrad::wgrad_sketch", "CPU")
def _cpu(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_entries(dy, x, order, offsets, left, right)
    _shared.check_values(order, offsets, dy.shape[0])
    if splitting_is_cheaper(dy, x, offsets, left, right):
        dtype = stat_dtype(dy)
        grads = segment_products(dy.to(dtype), x.to(dtype), order, offsets)
        stats = grads if left is None else left.to(dtype).mT @ grads
        stats = stats if right is None else stats @ right.to(dtype)
        return grads.sum(0).to(dy.dtype), stats
    stats = sketch_of_rows(dy, x, order, offsets, left, right)
    return dy.flatten(0, 1).mT @ x.flatten(0, 1), stats


def sketch_of_rows(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """(dY_s L)ᵀ (X_s R) for every segment: ``wgrad_sketch`` without the weight gradient, on either device."""
    if dy.shape[2] == 0 or x.shape[2] == 0:  # 0, also where the other holds NaN
        r0, r1 = (rows.shape[2] if side is None else side.shape[1] for rows, side in ((dy, left), (x, right)))
        return dy.new_zeros(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))
    if dy.device.type == "cpu":
        u, v = _sketched(dy, left), _sketched(x, right)
        return segment_products(u.to(stat_dtype(u)), v.to(stat_dtype(v)), order, offsets)
    offsets = offsets.to(dy.device, non_blocking=True)
    u, v = _sketched(dy.flatten(0, 1), left), _sketched(x.flatten(0, 1), right)
    empty = u.numel() * v.numel() == 0 or offsets.shape[0] == 1
    if empty or u.dtype == torch.float64 or triton_obstacle(dy.device) is not None:
        u, v = (rows.to(stat_dtype(rows)).unflatten(0, dy.shape[:2]) for rows in (u, v))
        if order is not None:
            order = _shared.within(order, dy.shape[0])
            u, v = u.index_select(0, order), v.index_select(0, order)
        return masked_products(u.flatten(0, 1), v.flatten(0, 1), offsets.long() * dy.shape[1])
    from .triton import wgrad_sketch as kernel

    with torch.cuda.device(dy.device):
        processors = torch.cuda.get_device_properties(dy.device).multi_processor_count
        return kernel.launch(u, v, dy.shape[1], order, offsets, processors)


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
    u, v = u.flatten(0, 1), v.flatten(0, 1)
    out = u.new_zeros(len(bounds) - 1, u.shape[-1], v.shape[-1])
    for t, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(u[start * rows : end * rows].mT, v[start * rows : end * rows], out=out[t])
    return out


@torch.library.impl("taskgrad::wgrad_sketch", "CUDA")
def _cuda(
    dy: Tensor, x: Tensor, order: Tensor | None, offsets: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_entries(dy, x, order, offsets, left, right)
    _shared.check_values(None, offsets, dy.shape[0])
    stats = sketch_of_rows(dy, x, order, offsets, left, right)
    if left is None and right is None:  # the product is there already, split by segment
        return stats.sum(0).to(dy.dtype), stats
    return dy.flatten(0, 1).mT @ x.flatten(0, 1), stats
