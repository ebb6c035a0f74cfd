"""``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.segment_sum import stat_dtype
from .base import (
    Capture,
    Probe,
    Unattributed,
    receipt_grad,
    refuse_double_backward,
    register_capture,
    shape_text,
)
from .shared_row import SharedRow, shared_row
from .sketch import scaled
from .tap import tap_grad, wants_gram
from .task_rows import Rows


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
        dw, tap = _gradients(ctx, dy, index, order, offsets, left, right)
        none = (None,) * 4
        return None, dw, *none, receipt_grad(receipt), tap, None, None


class _Row(torch.autograd.Function):
    """The row [1, ...], and its echo."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, padding_idx: int, stray: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        ctx.set_materialize_grads(False)
        ctx.padding_idx, ctx.num_embeddings = padding_idx, weight.shape[0]
        row = nn.functional.embedding(index, weight).detach()
        return row, torch.zeros_like(row)

    @staticmethod
    def backward(ctx: Any, d_row: Tensor | None, d_echo: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward()
        (index,) = ctx.saved_tensors
        if d_row is None or d_echo is None:  # detached since, or never added to rows of the batch
            stray = torch.ones((), device=index.device)
            if d_row is None:
                return None, None, None, stray
            d_echo = torch.zeros_like(d_row)
        dw = torch.ops.aten.embedding_dense_backward(d_row, index, ctx.num_embeddings, ctx.padding_idx, False)
        apart, size = (d_row - d_echo).abs().sum(dtype=stat_dtype(d_row)), d_row.abs().sum(dtype=stat_dtype(d_row))
        stray = torch.where(apart > 1e-6 * size, 1.0, 0.0)  # they are sums of the same tensors in the same order
        return None, dw, None, stray.to(torch.float32)


class _Spread(torch.autograd.Function):
    """The row once per example: [1, ...] as [B, ...], a view. The weight's gradient comes through the row."""

    @staticmethod
    def forward(
        ctx: Any,
        row: Tensor,
        echo: Tensor,
        index: Tensor,
        weight: Tensor,
        padding_idx: int,
        examples: int,
        entries: int,
        order: Tensor | None,
        offsets: Tensor,
        receipt: Tensor,
        tap: Tensor,
        left: Tensor | None,
        right: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(index, order, offsets, receipt, left, right)
        ctx.padding_idx, ctx.examples, ctx.entries = padding_idx, examples, entries
        ctx.num_embeddings = weight.shape[0]
        ctx.gram = wants_gram(tap, weight, left, right)
        return row.detach().expand(examples, *row.shape[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        index, order, offsets, receipt, left, right = ctx.saved_tensors
        index = index.expand(ctx.examples, *index.shape[1:])
        tap = _gradients(ctx, dy, index, order, offsets, left, right)[1]
        total = dy.sum(0, keepdim=True)
        none = (None,) * 7
        return total, total, *none, receipt_grad(receipt), tap, None, None


def _gradients(
    ctx: Any,
    dy: Tensor,
    index: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of the weight and of the tap."""
    dy, index = dy.reshape(ctx.entries, -1, dy.shape[-1]), index.reshape(ctx.entries, -1)
    rows = (dy, index, order, offsets, ctx.num_embeddings, ctx.padding_idx)
    dw, stats = torch.ops.taskgrad.embedding_stats(*rows, left, right)
    gram = torch.ops.taskgrad.embedding_gram(*rows) if ctx.gram else None
    return dw, tap_grad(scaled(stats, left, right), gram)


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
        probe = probes["weight"]
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        by_rows = (rows.entries, rows.order, rows.offsets, rows.receipt, *probe.tensors)
        if rows.match(index, 0):
            return _Embedding.apply(index, module.weight, padding_idx, *by_rows)  # type: ignore[no-any-return]
        examples = rows.shape[0]
        if index.dim() == 0 or index.shape[0] != 1 or not rows.match(index.expand(examples, *index.shape[1:]), 0):
            raise Unattributed(
                f"input of {shape_text(index)} neither starts with the shape of the ids, {rows.shape}, "
                "nor is one row [1, ...] that is shared by all examples"
            )
        weight = module.weight
        assert isinstance(weight, Tensor)
        row, echo = _Row.apply(index, weight, padding_idx, probe.stray)
        where = (echo, index, weight.detach(), padding_idx, examples)
        if not torch.compiler.is_compiling():
            rows.shared.append(row)
        return shared_row(row, examples, lambda x: _Spread.apply(x, *where, *by_rows))

    def watch(self, out: Any, examples: int, see: Callable[[Tensor], None]) -> Any:
        if isinstance(out, Tensor) and out.dim() > 1 and out.shape[0] == 1 and examples > 1:
            out = out if isinstance(out, SharedRow) else shared_row(out, examples, None)
            out.see = see
        return out
