"""``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.segment_sum import stat_dtype
from .base import Capture, Probe, Unattributed, register_capture, shape_text
from .function import Part, Split, keep, kept, pack, refuse_double_backward
from .shared_row import SharedRow, shared_row
from .task_rows import Rows


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, padding_idx: int, entries: int, *packed: Any) -> Tensor:
        keep(ctx, packed, index)
        ctx.padding_idx, ctx.entries, ctx.num_embeddings = padding_idx, entries, weight.shape[0]
        return nn.functional.embedding(index, weight).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (index,), (part,) = saved.tensors, saved.parts
        dw, stats = _split(ctx, dy, index, part)
        return saved.gradients((None, dw, None, None), stats)


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
        entries: int,
        examples: int,
        *packed: Any,
    ) -> Tensor:
        keep(ctx, packed, index)
        ctx.padding_idx, ctx.entries, ctx.num_embeddings = padding_idx, entries, weight.shape[0]
        ctx.examples = examples
        return row.detach().expand(examples, *row.shape[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (index,), (part,) = saved.tensors, saved.parts
        stats = _split(ctx, dy, index.expand(ctx.examples, *index.shape[1:]), part)[1]
        total = dy.sum(0, keepdim=True)
        return saved.gradients((total, total, None, None, None, None, None), stats)


def _split(ctx: Any, dy: Tensor, index: Tensor, part: Part) -> Split:
    """The gradients of the weight and of its tap."""
    dy, index = dy.reshape(ctx.entries, -1, dy.shape[-1]), index.reshape(ctx.entries, -1)
    where = (dy, index, part.order, part.offsets, ctx.num_embeddings, ctx.padding_idx)
    dw, stats = torch.ops.taskgrad.embedding_stats(*where, part.left, part.right)
    gram = torch.ops.taskgrad.embedding_gram(*where) if part.keeps == "gram" else None
    return dw, part.stats(stats, gram)


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
        packed = pack(rows, probe)
        if rows.match(index, 0):
            where = (index, module.weight, padding_idx, rows.entries)
            return _Embedding.apply(*where, *packed)  # type: ignore[no-any-return]
        examples = rows.shape[0]
        if index.dim() == 0 or index.shape[0] != 1 or not rows.match(index.expand(examples, *index.shape[1:]), 0):
            raise Unattributed(
                f"input of {shape_text(index)} neither starts with the shape of the ids, {rows.shape}, "
                "nor is one row [1, ...] that is shared by all examples"
            )
        weight = module.weight
        assert isinstance(weight, Tensor)
        row, echo = _Row.apply(index, weight, padding_idx, probe.stray)
        at = (echo, index, weight.detach(), padding_idx, rows.entries, examples)
        if not torch.compiler.is_compiling():
            rows.shared.append(row)
        return shared_row(row, examples, lambda x: _Spread.apply(x, *at, *packed))

    def watch(self, out: Any, examples: int, see: Callable[[Tensor], None]) -> Any:
        if isinstance(out, Tensor) and out.dim() > 1 and out.shape[0] == 1 and examples > 1:
            out = out if isinstance(out, SharedRow) else shared_row(out, examples, None)
            out.see = see
        return out
