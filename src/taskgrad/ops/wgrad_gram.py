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
from types import ModuleType

import torch
from torch import Tensor

from . import _check
from ._register import Triton, register, tf32_allowed
from .segment_sum import stat_dtype
from .segments import segments_at
from .wgrad_sketch import PANEL_BYTES, masked_products, panel_height


def wgrad_gram(dy: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The weight gradient dYᵀ X and the inner products of its parts by segment.

    Args:
        dy: [N, d_out], gradient of the output, rows sorted by segment; float32, float64, bfloat16 or float16.
        x: [N, d_in], input, same dtype and device. Both of any strides (copied if columns are not adjacent).
        offsets: int32 or int64 [S + 1], segment s owns rows ``offsets[s]:offsets[s + 1]``; from 0 to N, segments may be
            empty. On the CPU, or for CUDA inputs on their device, where its values are never looked at by the host.

    Returns:
        dW [d_out, d_in] in the dtype of ``dy`` and the Gram [S, S] in float64, symmetric to the bit. Products of 16-bit
        inputs are accumulated in float32; a GPU rounds float32 inputs to TF32 where torch's own products may. Neither
        carries a gradient. NaN throughout where offsets on a GPU are malformed.

    Raises:
        TypeError: a dtype or device is none of the above.
        ValueError: a shape or the offsets (where they are on the CPU) are none of the above.
    """
    dw, gram = _OP(dy, x, offsets)
    return dw, gram


def reference(dy: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``wgrad_gram`` in plain torch. Rows are masked, so that no value of ``offsets`` is looked at."""
    wide_dy, wide_x = dy.to(stat_dtype(dy)), x.to(stat_dtype(x))
    segments = offsets.shape[0] - 1
    dw = wide_dy.new_empty(dy.shape[1], x.shape[1])
    gram = wide_dy.new_zeros(segments, segments, dtype=torch.float64)
    for rows, columns in zip(dw.split(128), wide_dy.split(128, dim=1), strict=True):
        parts = masked_products(columns, wide_x, offsets)
        torch.sum(parts, 0, out=rows)
        wide = parts.flatten(1).double()
        gram.addmm_(wide, wide.mT)
    return dw.to(dy.dtype), (gram + gram.mT) / 2


def panels(dy: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The CPU's way: by panels of dW's rows, and of the segments that have rows."""
    bounds, segments = offsets.tolist(), offsets.shape[0] - 1
    dw = dy.new_empty(dy.shape[1], x.shape[1])
    filled = [s for s, (start, end) in enumerate(pairwise(bounds)) if end > start]
    if not filled:
        return dw.zero_(), dy.new_zeros(segments, segments, dtype=torch.float64)
    wide_dy, wide_x = dy.to(stat_dtype(dy)), x.to(stat_dtype(x))
    height = panel_height(PANEL_BYTES, len(filled), wide_x)
    room = wide_x.new_empty(len(filled), min(height, dw.shape[0]), dw.shape[1])
    products = torch.zeros(len(filled), len(filled), dtype=torch.float64)
    for rows, columns in zip(dw.split(height), wide_dy.split(height, dim=1), strict=True):
        parts = room.view(-1)[: len(filled) * rows.numel()].view(len(filled), *rows.shape)
        for part, s in zip(parts, filled, strict=True):
            torch.mm(columns[bounds[s] : bounds[s + 1]].mT, wide_x[bounds[s] : bounds[s + 1]], out=part)
        total, of_panel = torch.ops.taskgrad.sum_gram(parts.view(len(filled), rows.numel()))
        products += of_panel
        rows.copy_(total.view_as(rows))
    place = torch.tensor(filled)
    nothing = products.new_zeros(segments).index_copy_(
        0, place, products.diagonal() * 0
    )  # 0, or NaN: with an empty one
    return dw, (nothing[:, None] + nothing).index_put_((place[:, None], place), products)


def _fake(dy: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    segments = offsets.shape[0] - 1
    return dy.new_empty(dy.shape[1], x.shape[1]), dy.new_empty(segments, segments, dtype=torch.float64)


def _fits(dy: Tensor, x: Tensor, offsets: Tensor) -> bool:
    return dy.numel() > 0 and x.numel() > 0 and offsets.shape[0] > 1 and dy.dtype != torch.float64


def _launch(kernel: ModuleType, dy: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    dw = dy.new_empty(dy.shape[1], x.shape[1])
    properties, tf32 = torch.cuda.get_device_properties(dy.device), tf32_allowed()
    processors = properties.multi_processor_count
    tile = kernel.tile_config(dy.dtype, tf32, dw.shape[0], dw.shape[1], processors, properties.major)
    programs = processors * (2 if tile.warps == 4 else 1)
    return dw, kernel.launch(dy, x, offsets.to(dy.device, non_blocking=True), dw, tile, programs, tf32=tf32)


_OP = register(
    "wgrad_gram(Tensor dy, Tensor x, Tensor offsets) -> (Tensor dw, Tensor gram)",
    check=_check.check_rows,
    values=segments_at(order=None, offsets=2),
    fake=_fake,
    reference=reference,
    cpu=panels,
    cuda=(Triton("wgrad_gram", _fits, _launch),),
)
