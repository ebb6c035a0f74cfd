"""One row [1, ...] that all examples share, as GPT-2's and BERT's positions are.

The model sees the tensor that it would see without tracking, one row, and all of its gradient flows through that
tensor, its hooks and whatever was done to it. Where it is added to rows of the batch, and only there, the addition is
given the row once per example instead (an expanded view, so the same sum), whose gradient arrives by example: that is
split by task. What arrived so is added up once more beside the row, at its *echo*; where the row's own gradient turns
out to be another, the row was used for more than that, and the gauge's ``stray`` leaf gets to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .task_rows import equal_sizes

_ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}
_CASTS = {torch.Tensor.to, torch.Tensor.contiguous}  # they return the tensor itself where there is nothing to do


class SharedRow(torch.Tensor):
    """A tensor [1, ...] that knows how to be one row per example. In eager mode it is one until the batch is left."""

    examples: int
    spread: Callable[[Tensor], Tensor] | None
    see: Callable[[Tensor], None] | None = None  # shown the rows that it is added to, while rows are checked
    traced = False  # made while torch.compile traces
    packed = False  # added where saved tensors are packed, as in activation checkpointing, which adds it once more

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ADDITIONS and len(args) == 2:
            args = _spread(args[0], args[1]), _spread(args[1], args[0])
        if any(not issubclass(cls, t) for t in types):  # somebody else's kind of tensor takes over
            plain = tree_map(lambda x: _plain(x) if isinstance(x, SharedRow) else x, (args, kwargs))
            return func(*plain[0], **plain[1])
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if func in _CASTS and isinstance(args[0], SharedRow) and not kwargs.get("copy") and _alike(out, args[0]):
                return args[0]
        return out


def shared_row(row: Tensor, examples: int, spread: Callable[[Tensor], Tensor] | None) -> SharedRow:
    """``row`` [1, ...] as a ``SharedRow``; ``spread(row)`` is [examples, ...], the same row for each."""
    if torch.compiler.is_compiling():
        out = row.as_subclass(SharedRow)
        out.traced = True
    else:
        row.__class__ = SharedRow  # not a view of it: what can be done to a tensor that is none can be done to it
        out = row  # type: ignore[assignment]
    out.examples, out.spread = examples, spread
    return out


def make_plain(rows: list[Tensor]) -> None:
    """Turn each ``SharedRow`` into the plain tensor that it is, wherever a model or a hook keeps it; empty the list.
    What activation checkpointing will add once more has to stay what it is."""
    for row in rows:
        if isinstance(row, SharedRow) and not row.packed:
            row.__class__ = torch.Tensor  # type: ignore[assignment]
            for name in ("examples", "spread", "see", "packed"):
                row.__dict__.pop(name, None)
    rows.clear()


def _plain(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # Dynamo knows no way back to the base class, and needs none
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


def _spread(x: Any, other: Any) -> Any:
    """``x`` once per example where it is a shared row and ``other`` holds rows of the batch."""
    if not isinstance(x, SharedRow) or not isinstance(other, Tensor) or isinstance(other, SharedRow):
        return x
    if not hasattr(x, "examples") or not equal_sizes(other.shape, (x.examples, *x.shape[1:])):
        return x
    if torch.compiler.is_compiling() and not x.traced:  # it came into a compiled part from outside
        return x
    if not torch.compiler.is_compiling():
        if x.see is not None:
            x.see(other)
        x.packed |= torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return x if x.spread is None else x.spread(_plain(x))
