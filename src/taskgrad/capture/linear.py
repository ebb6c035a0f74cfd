"""``nn.Linear``, and transformers' ``Conv1D``, which is a Linear with a transposed weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.segment_sum import stat_dtype
from .base import (
    NOTHING,
    Capture,
    Probe,
    autocast_dtype,
    by_entry,
    receipt_grad,
    refuse_double_backward,
    register_capture,
    rows_of,
)
from .sketch import scaled
from .tap import tap_grad, tap_grad_of, wants_gram
from .task_rows import Rows


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b; with ``transposed`` y = x W + b. Gradients: dX = dY W, dW = Σ_t dY_tᵀ X_t, db = Σ_t Σ_{rows of t}
    dY."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        entries: int,
        order: Tensor | None,
        offsets: Tensor,
        receipt: Tensor,
        w_tap: Tensor | None,
        w_left: Tensor | None,
        w_right: Tensor | None,
        b_tap: Tensor | None,
        b_left: Tensor | None,
        b_right: Tensor | None,
    ) -> Tensor:
        # what is not needed is not kept: it may be written to before the backward pass, as without tracking
        x_kept = x if weight.requires_grad else None
        w_kept = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x_kept, w_kept, order, offsets, receipt, w_left, w_right, b_left, b_right)
        ctx.transposed, ctx.entries = transposed, entries
        ctx.track_weight, ctx.track_bias = w_tap is not None, b_tap is not None
        ctx.w_gram = wants_gram(w_tap, weight, w_left, w_right)
        ctx.b_gram = wants_gram(b_tap, bias, b_left, b_right)
        return nn.functional.linear(x, weight.t() if transposed else weight, bias).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        x, weight, order, offsets, receipt, w_left, w_right, b_left, b_right = ctx.saved_tensors
        dx = dw = db = w_stats = b_stats = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (weight.t() if ctx.transposed else weight)
        dy3 = dy.reshape(by_entry(dy, ctx.entries))
        if ctx.needs_input_grad[1]:
            x3 = x.reshape(by_entry(x, ctx.entries))
            first, second = (x3, dy3) if ctx.transposed else (dy3, x3)
            if ctx.w_gram:
                dw, stats, gram = torch.ops.taskgrad.wgrad_stats(first, second, order, offsets, w_left, w_right)
                w_stats = tap_grad(scaled(stats, w_left, w_right), gram)
            elif ctx.track_weight:
                dw, stats = torch.ops.taskgrad.wgrad_sketch(first, second, order, offsets, w_left, w_right)
                w_stats = scaled(stats, w_left, w_right)
            else:
                dw = first.flatten(0, 1).mT @ second.flatten(0, 1)
        if ctx.needs_input_grad[2]:
            if ctx.track_bias:
                sums = torch.ops.taskgrad.segment_sum(dy3, order, offsets)
                db, b_stats = sums.sum(0).to(dy.dtype), tap_grad_of(sums, ctx.b_gram, b_left, b_right)
            else:
                db = dy3.sum((0, 1), dtype=stat_dtype(dy)).to(dy.dtype)
        none = (None,) * 4
        return dx, dw, db, *none, receipt_grad(receipt), w_stats, None, None, b_stats, None, None


@register_capture(nn.Linear)
class LinearCapture(Capture):
    transposed = False

    def forward(self, module: nn.Module, rows: Rows, probes: Mapping[str, Probe], *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["x" if self.transposed else "input"]
        entries = rows_of(rows, x)
        weight, bias = module.weight, module.bias
        dtype = autocast_dtype(x)
        if dtype is not None:
            # what autocast does by itself outside of a custom Function; the gradient of the cast returns to param.grad
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        rows.half |= x.dtype in (torch.bfloat16, torch.float16)
        w_probe, b_probe = probes.get("weight"), probes.get("bias")
        out = _Linear.apply(
            x,
            weight,
            bias,
            self.transposed,
            entries,
            rows.order,
            rows.offsets,
            rows.receipt,
            *(NOTHING if w_probe is None else w_probe.tensors),
            *(NOTHING if b_probe is None else b_probe.tensors),
        )
        return out  # type: ignore[no-any-return]


class Conv1DCapture(LinearCapture):
    """transformers' ``Conv1D``: weight [d_in, d_out]. Registered by ``register_transformers``, without importing it."""

    transposed = True
