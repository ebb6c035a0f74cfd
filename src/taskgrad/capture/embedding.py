"""``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..rows import Rows
from ..sketch import scaled
from .base import (
    Capture,
    Probe,
    Unattributed,
    receipt_grad,
    refuse_double_backward,
    register_capture,
    tap_grad,
    wants_gram,
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        index: Tensor,
        weight: Tensor,
        padding_idx: int,
        entries: int,
        order: Tensor | None,
        offsets: Tensor,
        receipt: Tensor,
        tap: Tensor,
        left: Tensor | None,
        right: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(index, order, offsets, receipt, left, right)
        ctx.padding_idx, ctx.entries, ctx.num_embeddings = padding_idx, entries, weight.shape[0]
        ctx.gram = wants_gram(tap, weight, left, right)
        return nn.functional.embedding(index, weight).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        index, order, offsets, receipt, left, right = ctx.saved_tensors
        dy, index = dy.reshape(ctx.entries, -1, dy.shape[-1]), index.reshape(ctx.entries, -1)
        rows = (dy, index, order, offsets, ctx.num_embeddings, ctx.padding_idx)
        dw, stats = torch.ops.taskgrad.embedding_stats(*rows, left, right)
        gram = torch.ops.taskgrad.embedding_gram(*rows) if ctx.gram else None
        none = (None,) * 4
        return None, dw, *none, receipt_grad(receipt), tap_grad(scaled(stats, left, right), gram), None, None


@register_capture(nn.Embedding)
class EmbeddingCapture(Capture):
    params = ("weight",)

    def refuse(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.sparse:
            return "Embedding(sparse=True): sparse gradients are not split by task"
        if module.max_norm is not None or module.scale_grad_by_freq:
            return "Embedding with max_norm or scale_grad_by_freq is not split by task"
        return None

    def forward(self, module: nn.Module, rows: Rows, probes: Mapping[str, Probe], *args: Any, **kwargs: Any) -> Tensor:
        index = args[0] if args else kwargs["input"]
        if not rows.match(index, 0):
            index = broadcast_index(rows, index)
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        out = _Embedding.apply(
            index,
            module.weight,
            padding_idx,
            rows.entries,
            rows.order,
            rows.offsets,
            rows.receipt,
            *probes["weight"].tensors,
        )
        return out  # type: ignore[no-any-return]


def broadcast_index(rows: Rows, index: Tensor) -> Tensor:
    """[1, L] indices (GPT-2's and BERT's positions) as [B, L], so that the gradient of the output arrives per
    example."""
    if index.dim() >= 2 and index.shape[0] == 1 and rows.match(index.expand(rows.shape[0], *index.shape[1:]), 0):
        return index.expand(rows.shape[0], *index.shape[1:])
    raise Unattributed(
        f"input of shape {tuple(index.shape)} neither starts with the shape of the ids, {rows.shape}, "
        "nor is one row [1, ...] that is shared by all examples"
    )
