"""``segment_sum``: sums of rows by task, the weight gradient of biases and norm layers split by task."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


@torch.library.custom_op("taskgrad::segment_sum", mutates_args=())
def segment_sum(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Sum ``values`` [E, d] over the rows of every task: [T + 1, d], float64 for float64, else float32.

    Args:
        values: [E, d], floating.
        order: int64 [E], rows sorted by task; ``None`` if ``values`` is sorted already.
        offsets: int64 [T + 2] on the CPU; task t owns ``order[offsets[t]:offsets[t + 1]]``.
    """
    bounds = offsets.tolist()
    out = values.new_zeros(len(bounds) - 1, values.shape[1], dtype=stat_dtype(values))
    if order is not None:
        values = values.index_select(0, order)
    for t, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.sum(values[start:end], 0, dtype=out.dtype, out=out[t])
    return out


@segment_sum.register_fake
def _(values: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, values.shape[1], dtype=stat_dtype(values))


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics of ``x``: float64 stays, everything else is accumulated in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
