"""``wgrad_gram``: the weight gradient of a linear layer and the exact Gram of its tasks' parts, in one kernel.

With X_s, dY_s the rows of segment s (a task, or the rows of no task), G_s = dY_sᵀ X_s is that segment's part of the
weight gradient:

    dW         = sum_s G_s              [d_out, d_in]
    gram[s, t] = <G_s, G_t>             [S, S] float64

Splitting the product by segment costs no multiplications, and both results are sums over tiles of dW. So a tile's S
parts are all that is alive at a time (on a CPU: a panel of rows), never S gradients of the layer.

Not for a weight that is used more than once in a step: the Gram of a sum is not the sum of Grams.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from . import _shared
from ._shared import stat_dtype, triton_obstacle
from .wgrad_sketch import masked_products

PANEL_BYTES = 8 << 20  # of a CPU's panel, S blocks of rows: it stays in a last-level cache between product and Gram

torch.library.define(
    "taskgrad::wgrad_gram", "(Tensor dy, Tensor x, Tensor offsets, bool tf32) -> (Tensor dw, Tensor gram)"
)
torch.library.define(
    "taskgrad::wgrad_gram_into", "(Tensor dy, Tensor x, Tensor offsets, Tensor(a!) into, bool tf32) -> Tensor gram"
)


def wgrad_gram(
    dy: Tensor, x: Tensor, offsets: Tensor, *, accumulate_into: Tensor | None = None, tf32: bool = False
) -> tuple[Tensor, Tensor]:
    """The weight gradient dYᵀ X and the inner products of its parts by segment.

    Args:
        dy: [N, d_out], gradient of the output, rows sorted by segment; float32, float64, bfloat16 or float16.
        x: [N, d_in], input, same dtype and device. Both of any strides (copied if columns are not adjacent).
        offsets: int32 or int64 [S + 1], segment s owns rows ``offsets[s]:offsets[s + 1]``; from 0 to N, segments may be
            empty. On the CPU, or for CUDA inputs on their device, where its values are never looked at by the host.
        accumulate_into: float32 (float64 for float64 inputs) [d_out, d_in] with adjacent columns; dW is added to it in
            place, unrounded, and it is returned.
        tf32: let a GPU round float32 inputs to TF32, for its tensor cores.

    Returns:
        dW [d_out, d_in] in the dtype of ``dy`` (or ``accumulate_into``) and the Gram [S, S] in float64, symmetric to
        the bit. Products of 16-bit inputs are accumulated in float32. Neither carries a gradient. NaN throughout where
        offsets on a GPU are malformed.

    Raises:
        TypeError: a dtype or device is none of the above.
        ValueError: a shape, stride or the offsets (where they are on the CPU) are none of the above.
    """
    check_rows(dy, x, offsets)
    if accumulate_into is not None:
        _check_into(dy, x, accumulate_into)
    _shared.check_real("dy", dy)
    dy, x = dy.detach(), x.detach()
    wrong = _shared.fault_on_gpu(None, offsets, dy.shape[0])
    if accumulate_into is None:
        dw, gram = torch.ops.taskgrad.wgrad_gram(dy, x, offsets, tf32)
        return _shared.spoiled(dw, wrong), _shared.spoiled(gram, wrong)
    gram = torch.ops.taskgrad.wgrad_gram_into(dy, x, offsets, accumulate_into.detach(), tf32)
    _shared.spoiled(accumulate_into.detach(), wrong)
    return accumulate_into, _shared.spoiled(gram, wrong)


def check_rows(dy: Tensor, x: Tensor, offsets: Tensor) -> None:
    """Raise unless ``dy``, ``x`` [N, ·] and ``offsets`` [S + 1] are as ``wgrad_gram`` says, but for their values."""
    _shared.check_operand("dy", dy)
    _shared.check_like("x", x, "dy", dy)
    _shared.check_segments(None, offsets, "dy", dy)
    if dy.dim() != 2 or x.dim() != 2 or x.shape[0] != dy.shape[0]:
        raise ValueError(
            f"dy and x must have shapes [N, d_out] and [N, d_in], got {list(dy.shape)} and {list(x.shape)}: "
            "flatten their leading dimensions first"
        )
    _shared.check_segment_shapes(None, offsets, dy.shape[0])


def _check_into(dy: Tensor, x: Tensor, into: Tensor) -> None:
    _shared.check_like("accumulate_into", into, "dy", dy, stat_dtype(dy))
    shape = [dy.shape[1], x.shape[1]]
    if list(into.shape) != shape:
        raise ValueError(f"accumulate_into must have shape {shape}, got {list(into.shape)}")
    if into.numel() == 0:
        return
    if (shape[1] > 1 and into.stride(1) != 1) or (shape[0] > 1 and into.stride(0) < shape[1]):
        raise ValueError(
            "accumulate_into must have adjacent columns and rows that do not overlap, got strides "
            f"{into.stride()}: pass a row-major one"
        )


def _check_apart(dy: Tensor, x: Tensor, into: Tensor) -> None:
    memory, *others = (t.untyped_storage().data_ptr() for t in (into, dy, x))
    if into.numel() and memory in others:
        raise ValueError("accumulate_into must not share memory with dy or x: they are read while it is written")


def reference(dy: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``wgrad_gram`` in plain torch, dW unrounded. Rows are masked, so that no value of ``offsets`` is looked at."""
    wide_dy, wide_x = dy.to(stat_dtype(dy)), x.to(stat_dtype(x))
    segments = offsets.shape[0] - 1
    dw = wide_dy.new_empty(dy.shape[1], x.shape[1])
    gram = wide_dy.new_zeros(segments, segments, dtype=torch.float64)
    for rows, columns in zip(dw.split(128), wide_dy.split(128, dim=1), strict=True):
        parts = masked_products(columns, wide_x, offsets)
        torch.sum(parts, 0, out=rows)
        wide = parts.flatten(1).double()
        gram.addmm_(wide, wide.mT)
    return dw, (gram + gram.mT) / 2


def panels(dy: Tensor, x: Tensor, offsets: Tensor, dw: Tensor, *, accumulate: bool) -> Tensor:
    """The CPU's way: write (or add) dW into ``dw`` by panels of its rows and return the Gram."""
    bounds = offsets.tolist()
    segments, width = len(bounds) - 1, x.shape[1]
    gram = dy.new_zeros(segments, segments, dtype=torch.float64)
    wide_dy, wide_x = dy.to(stat_dtype(dy)), x.to(stat_dtype(x))
    room = PANEL_BYTES // max(1, segments * width * wide_x.itemsize)
    height = max(64, room - room % 16)  # a product of fewer rows than that leaves MKL idle
    for rows, columns in zip(dw.split(height), wide_dy.split(height, dim=1), strict=True):
        parts = wide_x.new_empty(segments, rows.shape[0], width)
        for part, (start, end) in zip(parts, pairwise(bounds), strict=True):
            if end > start:
                torch.mm(columns[start:end].mT, wide_x[start:end], out=part)
            else:
                part.zero_()
        total, products = torch.ops.taskgrad.sum_gram(parts.view(segments, rows.numel()))
        gram += products
        rows.add_(total.view_as(rows)) if accumulate else rows.copy_(total.view_as(rows))
    return gram


@torch.library.register_fake("taskgrad::wgrad_gram")  # type: ignore[untyped-decorator]
def _fake(dy: Tensor, x: Tensor, offsets: Tensor, tf32: bool) -> tuple[Tensor, Tensor]:
    check_rows(dy, x, offsets)
    segments = offsets.shape[0] - 1
    return dy.new_empty(dy.shape[1], x.shape[1]), dy.new_empty(segments, segments, dtype=torch.float64)


@torch.library.register_fake("taskgrad::wgrad_gram_into")  # type: ignore[untyped-decorator]
def _fake_into(dy: Tensor, x: Tensor, offsets: Tensor, into: Tensor, tf32: bool) -> Tensor:
    check_rows(dy, x, offsets)
    _check_into(dy, x, into)
    segments = offsets.shape[0] - 1
    return dy.new_empty(segments, segments, dtype=torch.float64)


@torch.library.impl("taskgrad::wgrad_gram", "CPU")
def _cpu(dy: Tensor, x: Tensor, offsets: Tensor, tf32: bool) -> tuple[Tensor, Tensor]:
    check_rows(dy, x, offsets)
    _shared.check_values(None, offsets, dy.shape[0])
    dw = dy.new_empty(dy.shape[1], x.shape[1])
    return dw, panels(dy, x, offsets, dw, accumulate=False)


@torch.library.impl("taskgrad::wgrad_gram_into", "CPU")
def _cpu_into(dy: Tensor, x: Tensor, offsets: Tensor, into: Tensor, tf32: bool) -> Tensor:
    check_rows(dy, x, offsets)
    _check_into(dy, x, into)
    _check_apart(dy, x, into)
    _shared.check_values(None, offsets, dy.shape[0])
    return panels(dy, x, offsets, into, accumulate=True)


@torch.library.impl("taskgrad::wgrad_gram", "CUDA")
def _cuda(dy: Tensor, x: Tensor, offsets: Tensor, tf32: bool) -> tuple[Tensor, Tensor]:
    check_rows(dy, x, offsets)
    _shared.check_values(None, offsets, dy.shape[0])
    dw = dy.new_empty(dy.shape[1], x.shape[1])
    return dw, _on_gpu(dy, x, offsets, dw, accumulate=False, tf32=tf32)


@torch.library.impl("taskgrad::wgrad_gram_into", "CUDA")
def _cuda_into(dy: Tensor, x: Tensor, offsets: Tensor, into: Tensor, tf32: bool) -> Tensor:
    check_rows(dy, x, offsets)
    _check_into(dy, x, into)
    _check_apart(dy, x, into)
    _shared.check_values(None, offsets, dy.shape[0])
    return _on_gpu(dy, x, offsets, into, accumulate=True, tf32=tf32)


def _on_gpu(dy: Tensor, x: Tensor, offsets: Tensor, dw: Tensor, *, accumulate: bool, tf32: bool) -> Tensor:
    offsets = offsets.to(dy.device, non_blocking=True)
    empty = dw.numel() == 0 or dy.shape[0] == 0 or offsets.shape[0] == 1
    if empty or dy.dtype == torch.float64 or triton_obstacle(dy.device) is not None:
        total, gram = reference(dy, x, offsets)
        dw.add_(total) if accumulate else dw.copy_(total)
        return gram
    from .triton import wgrad_gram as kernel

    with torch.cuda.device(dy.device):
        properties = torch.cuda.get_device_properties(dy.device)
        processors = properties.multi_processor_count
        tile = kernel.tile_config(dy.dtype, tf32, dw.shape[0], dw.shape[1], processors, properties.major)
        programs = processors * (2 if tile.warps == 4 else 1)
        return kernel.launch(dy, x, offsets, dw, tile, programs, accumulate=accumulate, tf32=tf32)
