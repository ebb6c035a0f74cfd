"""The same batch with some of its examples, or tokens, in other places.

Examples are exchanged among themselves, so what every example sees of the others as a whole (the statistics of
BatchNorm, the mean of the batch) stays what it is. The choice is random, from a generator of its own.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import types
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES

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


class Unmovable(TypeError):
    """An input of which no copy with other tensors can be made that is sure to share nothing with it."""


def rebuild(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``value`` with every tensor in it replaced by ``change`` of it: in tuples, lists, dicts, UserDicts (and
    subclasses: their items and attributes), dataclasses and the nodes that pytree knows. Nothing of ``value`` is
    written, and what runs with the copy cannot write it. Of other objects a deep copy, if they hold no tensors.

    Raises:
        Unmovable: there is something else in it: an object that holds tensors or that cannot be copied (an iterator,
            a lock, a file), a module.
    """
    return _Rebuilding(change)(value)


_BASES: tuple[Any, ...] = (OrderedDict, defaultdict, dict, list)  # the nearest first


class _Rebuilding:
    """What is met twice in an input is one object in the copy too."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change
        self._done: dict[int, tuple[Any, Any]] = {}  # id -> the object (kept, so that its id stays its own), its copy

    def __call__(self, value: Any) -> Any:
        if id(value) in self._done:
            return self._done[id(value)][1]
        if isinstance(value, (type, types.ModuleType)):
            return value
        if isinstance(value, (nn.Module, Iterator)):
            what = "is a module" if isinstance(value, nn.Module) else "can be read only once"
            raise Unmovable(f"an input of type {type(value).__name__} {what}")
        if isinstance(value, torch.Generator):
            return self._note(value, copy.deepcopy(value))
        if isinstance(value, Tensor):
            return self._note(value, self._change(value))
        kind = type(value)
        if kind is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
            return self._note(value, tuple.__new__(kind, [self(v) for v in tuple.__iter__(value)]))
        if kind in SUPPORTED_NODES and kind not in _BASES:
            return self._node(value)
        base = next((base for base in _BASES if isinstance(value, base)), None)
        if base is not None or isinstance(value, UserDict) or dataclasses.is_dataclass(value):
            return self._object(value, base or object)
        return self._copy(value)

    def _note(self, value: Any, new: Any) -> Any:
        self._done[id(value)] = value, new
        return new

    def _object(self, value: Any, base: Any) -> Any:
        """An object that is its attributes and, with a ``base``, its items; no method of its own is called."""
        try:
            new = self._note(value, base.__new__(type(value)))  # raises where the type has another builtin in it
        except TypeError as error:
            raise Unmovable(f"an input of type {type(value).__name__} cannot be rebuilt: {error}") from None
        if base is defaultdict:
            new.default_factory = value.default_factory
        if base is list:
            list.extend(new, [self(v) for v in list.__iter__(value)])
        elif base is not object:
            for key, held in base.items(value):
                base.__setitem__(new, key, self(held))
        attributes = getattr(value, "__dict__", {})
        for name in (*attributes, *copyreg._slotnames(type(value))):  # type: ignore[attr-defined]
            if name in attributes or hasattr(value, name):
                held = attributes[name] if name in attributes else getattr(value, name)
                object.__setattr__(new, name, self(held))
        return new

    def _node(self, value: Any) -> Any:
        node = SUPPORTED_NODES[type(value)]
        try:
            children, context = node.flatten_fn(value)
            new = node.unflatten_fn([self(child) for child in children], self._copy(context))
        except Unmovable:
            raise
        except Exception as error:
            raise Unmovable(f"an input of type {type(value).__name__} cannot be rebuilt: {error}") from None
        if new is value:
            raise Unmovable(f"an input of type {type(value).__name__} is not rebuilt, but given back, by pytree")
        return self._note(value, new)

    def _copy(self, value: Any) -> Any:
        memo: dict[int, Any] = {}
        try:
            new = copy.deepcopy(value, memo)
        except Exception as error:  # whatever an object's own copying raises
            raise Unmovable(f"an input of type {type(value).__name__} cannot be copied: {error}") from None
        if new is value and hasattr(value, "__deepcopy__") and not isinstance(value, Enum):
            raise Unmovable(f"an input of type {type(value).__name__} is not copied, but given back, by deepcopy")
        if isinstance(new, Tensor) or any(isinstance(made, Tensor) for made in memo.values()):
            raise Unmovable(
                f"an input of type {type(value).__name__} holds tensors; dicts, dataclasses can be looked into"
            )
        return new
