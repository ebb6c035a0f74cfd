"""One row [1, ...] that all examples share, as GPT-2's and BERT's positions are.

The model sees the tensor that it would see without tracking, one row. Where it adds that row to rows of the batch, and
only there, the addition is given the row once per example instead (an expanded view, so the same sum), whose gradient
arrives by example. All other uses go through the tensor itself, whose gradient cannot be split; it says so by arriving
at the probe's ``stray`` leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..rows import equal_sizes

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
    """A tensor [1, ...] that knows how to be one row per example, as long as nobody writes to it."""

    examples: int
    written: int  # its version as it was made
    spread: Callable[[], Tensor] | None
    see: Callable[[Tensor], None] | None = None  # shown the rows that it is added to, while rows are checked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ADDITIONS and len(args) == 2:
            args = _spread(args[0], args[1]), _spread(args[1], args[0])
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if not isinstance(out, Tensor):
                return out
            for x in args:
                if isinstance(x, SharedRow):
                    if func in _CASTS and not kwargs.get("copy") and _alike(out, x):
                        return x
                    if torch.compiler.is_compiling():
                        x.spread = None  # versions are not traced: it may have been written to
        return out


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


def shared_row(row: Tensor, examples: int, spread: Callable[[], Tensor] | None) -> SharedRow:
    """``row`` [1, ...] as a ``SharedRow``; ``spread()`` is [examples, ...], the same row for each."""
    out = row.as_subclass(SharedRow)
    out.examples, out.spread = examples, spread
    out.written = 0 if torch.compiler.is_compiling() else out._version
    return out


def without_shared_rows(output: Any) -> Any:
    """What a model returned, with every ``SharedRow`` in it as the plain tensor that it is; ``None`` where there is
    none."""
    if torch.compiler.is_compiling() or not any(isinstance(x, SharedRow) for x in tree_leaves(output)):
        return None
    return tree_map(lambda x: x.as_subclass(torch.Tensor) if isinstance(x, SharedRow) else x, output)


def _spread(x: Any, other: Any) -> Any:
    """``x`` once per example where it is a shared row and ``other`` holds rows of the batch."""
    if not isinstance(x, SharedRow) or not isinstance(other, Tensor) or isinstance(other, SharedRow):
        return x
    spread = getattr(x, "spread", None)
    if not hasattr(x, "examples") or not equal_sizes(other.shape, (x.examples, *x.shape[1:])):
        return x
    if not torch.compiler.is_compiling():
        if x.see is not None:
            x.see(other)
        if x._version != x.written:
            return x
    return x if spread is None else spread()
