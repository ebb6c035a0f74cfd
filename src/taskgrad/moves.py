"""The same batch with some of its examples, or tokens, in other places.

Examples are exchanged among themselves, so what every example sees of the others as a whole (the statistics of
BatchNorm, the mean of the batch) stays what it is. The choice is random, from a generator of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fingerprint import row_sums


@dataclass(frozen=True)
class Move:
    """Place i is given what place ``source[i]`` [n] held, in dimension ``dim`` of the batch's tensors."""

    source: Tensor
    dim: int = 0

    @property
    def moved(self) -> Tensor:
        """Bool [n]: the places that are given something else."""
        return self.source != torch.arange(len(self.source), device="cpu")


@dataclass
class Moved:
    """The inputs after a move.

    Attributes:
        args, kwargs: for the model; copies throughout, since a model may write into its input.
        differs: bool, in the shape of the ids' dimensions that were moved, [B] or [B, S]: what came is not what was
            there; ``None`` without a tensor that could be moved.
        contents: float64 [n, k], a fingerprint per moved tensor of what place n held before (moves of examples).
        doubtful: whether a tensor was moved that may well not be the batch's.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    differs: Tensor | None
    contents: Tensor | None
    doubtful: bool


def example_moves(batch: int, generator: torch.Generator) -> list[Move]:
    """Two sets of examples, which together are all; in each the examples go round in a circle.

    Halves where they hold three at least: two that change places cannot be told from a layer that exchanges the same
    two. Of two examples one replaces the other. A batch of one stays as it is.
    """
    order = torch.randperm(batch, generator=generator, device="cpu")
    size = max((batch + 1) // 2, min(batch - 1, 3))
    moves = []
    for part in (order[:size], order[batch - size :]):
        source = torch.arange(batch, device="cpu")
        source[part] = part.roll(1) if batch != 2 else 1 - part
        moves.append(Move(source))
    return moves


def token_moves(length: int, generator: torch.Generator) -> list[Move]:
    """In a random half of the places of a sequence the next token takes the token's place; then in the other half."""
    order = torch.randperm(length, generator=generator, device="cpu")
    moves = []
    for part in (order[: length // 2], order[length // 2 :]):
        source = torch.arange(length, device="cpu")
        source[part] = (part + 1) % length
        moves.append(Move(source, dim=1))
    return moves


def apply(
    move: Move, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, ...], leave_doubtful: bool
) -> Moved:
    """Move, in all tensors of ``args`` and ``kwargs`` whose leading dimensions are those of ``shape`` up to the moved
    one. ``leave_doubtful``: not in those that may well not be the batch's, (B,) or (B, B) without integers: class
    weights, a mask of positions."""
    lead = shape[: move.dim + 1]
    differs: list[Tensor] = []
    contents: list[Tensor] = []
    doubtful = False

    def carry(t: Tensor) -> Tensor:
        nonlocal doubtful
        if t.layout is not torch.strided or t.is_nested or t.shape[: move.dim + 1] != lead or not t.numel():
            return t.clone()
        if tuple(t.shape) in ((lead[0],), (lead[0], lead[0])) and (t.is_floating_point() or t.dtype == torch.bool):
            if leave_doubtful:
                return t.clone()
            doubtful = True
        new = t.index_select(move.dim, move.source.to(t.device))
        differs.append(((new != t) & ((new == new) | (t == t))).reshape(*lead, -1).any(-1))
        if move.dim == 0 and not t.is_complex():
            contents.append(row_sums(t, 1)[0])
        return new

    with torch.no_grad():
        new_args, new_kwargs = rebuild(tuple(args), carry), rebuild(dict(kwargs), carry)
    device = differs[0].device if differs else None
    return Moved(
        new_args,
        new_kwargs,
        torch.stack([d.to(device) for d in differs]).any(0) if differs else None,
        torch.stack([c.to(device) for c in contents], 1) if contents else None,
        doubtful,
    )


def rebuild(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``value`` with every tensor in tuples, lists, mappings and dataclasses replaced by ``change`` of it.
    Raises TypeError for an iterator, which cannot be copied."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuild(v, change) for v in value))
    if type(value) in (list, tuple):
        return type(value)(rebuild(v, change) for v in value)
    if isinstance(value, Mapping) and hasattr(value, "__setitem__"):
        new: Any = copy.copy(value)
        for key in value:
            new[key] = rebuild(value[key], change)
        return new
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(new, field.name, rebuild(getattr(value, field.name), change))
        return new
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Iterator):
        raise TypeError(f"an input of type {type(value).__name__} can be read only once")
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever an object's own copying raises: it is handed over as it is
        return value
