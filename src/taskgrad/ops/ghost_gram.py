"""``ghost_gram``: the exact Gram of a linear layer's per-task gradients from products of rows, for short batches.

With G_s = Σ_{n in s} dy_n x_nᵀ, the part of the weight gradient from the rows of segment s (a task, or the rows of no
task),

    gram[s, t] = <G_s, G_t> = Σ_{n in s} Σ_{m in t} (x_n · x_m) (dy_n · dy_m)        [S, S] float64

so no gradient is formed: N² (d_in + d_out) operations (half of the matrix is computed) against 2 N d_in d_out of the
weight gradient. It pays below about N = d / 2.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import _check
from ._register import Triton, register, tf32_allowed
from .segments import segments_at


def ghost_gram(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Inner products of the parts, by segment, of the weight gradient dYᵀ X.

    Args:
        dy, x, offsets: as of ``wgrad_gram``.

    Returns:
        The Gram [S, S] in float64, symmetric to the bit. It carries no gradient. On a GPU its rounding error (in
        float32, for inputs that are not float64) is relative to Σ |x_n| |dy_n| over the segments' rows: where rows
        cancel each other that is more than <G_s, G_t>. A CPU multiplies in float64.

    Raises:
        TypeError, ValueError: as ``wgrad_gram``.
    """
    gram: Tensor = _OP(dy, x, offsets)
    return gram


def reference(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """``ghost_gram`` in plain torch, by blocks of rows, without a look at the values of ``offsets``. Also the CPU's
    way: its products are MKL's."""
    dy, x = dy.double(), x.double()  # rows may cancel each other
    rows, segments = dy.shape[0], offsets.shape[0] - 1
    gram = torch.zeros(segments, segments, dtype=torch.float64, device=dy.device)
    if dy.shape[1] == 0 or x.shape[1] == 0:  # 0, also where the other holds NaN
        return gram
    offsets = offsets.to(dy.device, torch.int64, non_blocking=True).clamp(0, rows)  # segment_reduce believes them
    height = max(64, (1 << 20) // max(1, rows))  # 8 MiB of products at a time
    for start in range(0, rows, height):
        end = min(start + height, rows)
        products = (x[start:end] @ x[start:].mT) * (dy[start:end] @ dy[start:].mT)
        products[:, : end - start] *= 0.5  # the block on the diagonal is there twice in gram + gram.mT
        bounds = (offsets - start).clamp(min=0)
        by_row = torch.segment_reduce(
            products, "sum", offsets=bounds.clamp(max=end - start), axis=0, initial=0, unsafe=True
        )
        gram += torch.segment_reduce(by_row.mT.contiguous(), "sum", offsets=bounds, axis=0, initial=0, unsafe=True).mT
    return gram + gram.mT


def segment_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """int32 [N]: the segment of every row."""
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    segment = torch.searchsorted(offsets[1:].contiguous(), row, right=True, out_int32=True)
    return segment.clamp_(max=offsets.shape[0] - 2)  # rows behind malformed offsets are nobody's


def _fake(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    segments = offsets.shape[0] - 1
    return dy.new_empty(segments, segments, dtype=torch.float64)


def _fits(dy: Tensor, x: Tensor, offsets: Tensor) -> bool:
    return dy.numel() > 0 and x.numel() > 0 and offsets.shape[0] > 1 and dy.dtype != torch.float64


def _launch(kernel: ModuleType, dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    properties, tf32 = torch.cuda.get_device_properties(dy.device), tf32_allowed()
    tile = kernel.tile_config(dy.dtype, tf32, properties.major)
    offsets = offsets.to(dy.device, non_blocking=True)
    gram: Tensor = kernel.launch(dy, x, offsets, tile, properties.multi_processor_count, tf32=tf32)
    return gram


_OP = register(
    "ghost_gram(Tensor dy, Tensor x, Tensor offsets) -> Tensor gram",
    check=_check.check_rows,
    values=segments_at(order=None, offsets=2),
    fake=_fake,
    reference=reference,
    cuda=(Triton("ghost_gram", _fits, _launch),),
)
