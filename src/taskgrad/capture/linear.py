"""``nn.Linear``, and transformers' ``Conv1D``, which is a Linear with a transposed weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import Capture, Gauge, by_entry, register_capture, rows_of
from .function import keep, kept, operands, pack
from .task_rows import Rows


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b; with ``transposed`` y = x W + b. Gradients: dX = dY W, dW = Σ_t dY_tᵀ X_t, db = Σ_t Σ_{rows of t}
    dY."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, entries: int, *packed: Any
    ) -> Tensor:
        ctx.transposed, ctx.entries = transposed, entries
        # what is not needed is not kept: it may be written to before the backward pass, as without tracking
        keep(ctx, packed, x if weight.requires_grad else None, weight if ctx.needs_input_grad[0] else None)
        return nn.functional.linear(x, weight.t() if transposed else weight, bias).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = kept(ctx)
        (x, weight), (of_weight, of_bias) = saved.tensors, saved.parts
        dx = dw = db = w_stats = b_stats = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (weight.t() if ctx.transposed else weight)
        dy3 = dy.reshape(by_entry(dy, ctx.entries))
        if ctx.needs_input_grad[1]:
            x3 = x.reshape(by_entry(x, ctx.entries))
            dw, w_stats = of_weight.product(*((x3, dy3) if ctx.transposed else (dy3, x3)))
        if ctx.needs_input_grad[2]:
            db, b_stats = of_bias.sums(dy3, dy.dtype)
        return saved.gradients((dx, dw, db, None, None), w_stats, b_stats)


@register_capture(nn.Linear)
class LinearCapture(Capture):
    transposed = False

    def forward(self, module: nn.Module, rows: Rows, gauges: Mapping[str, Gauge], *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["x" if self.transposed else "input"]
        entries = rows_of(rows, x)
        # each asked for once: a parametrized one is computed
        tensors = operands(rows, x, module.weight, module.bias)  # type: ignore[arg-type]
        packed = pack(rows, gauges.get("weight"), gauges.get("bias"))
        return _Linear.apply(*tensors, self.transposed, entries, *packed)  # type: ignore[no-any-return]


class Conv1DCapture(LinearCapture):
    """transformers' ``Conv1D``: weight [d_in, d_out]. Registered by ``register_transformers``, without importing it."""

    transposed = True
