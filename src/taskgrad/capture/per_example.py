"""The building block for layer kinds of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Gauge
from .function import keep, kept, pack
from .task_rows import Rows


class _PerExample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, entries: int, *packed: Any) -> Tensor:
        keep(ctx, packed)
        return param.detach().expand(entries, *param.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (part,) = saved.parts
        grad, stats = part.of_tasks(part.segments(dy.flatten(1)[:, None]), dy.shape[1:], dy.dtype)
        return saved.gradients((grad, None), stats)


def per_example(param: Tensor, gauge: Gauge, rows: Rows) -> Tensor:
    """``param`` once per task id: [E, *param.shape], an expanded view whose gradient is split by task.

    Write the forward of a layer kind of your own with the copies instead of the parameter.
    """
    return _PerExample.apply(param, rows.entries, *pack(rows, gauge))  # type: ignore[no-any-return]
