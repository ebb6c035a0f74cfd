"""Hooks on the user's model that are there during a batch only.

Between batches the model can be copied, pickled and scripted as if it were not tracked. Every time they come back under
the same keys as the same objects: ``torch.compile`` guards on both, and hooks registered anew for every batch make it
compile again for every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn


class RootHooks:
    """Calls ``before(args, kwargs)`` and ``after(args, kwargs, output)`` around every call of ``model`` between ``put``
    and ``take_away``; ``after`` also, with ``None``, where the call raised."""

    def __init__(self, model: nn.Module, before: Callable[..., None], after: Callable[..., Any]) -> None:
        self._before, self._after = _Hook(model, before), _Hook(model, after)
        handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )
        first, second = (handle.id for handle in handles)
        self._places: list[tuple[dict[int, Any], int, Any]] = [
            (model._forward_pre_hooks, first, self._before),
            (model._forward_pre_hooks_with_kwargs, first, True),
            (model._forward_hooks, second, self._after),
            (model._forward_hooks_with_kwargs, second, True),
            (model._forward_hooks_always_called, second, True),
        ]
        self.take_away()

    def put(self) -> None:
        for hooks, key, value in self._places:
            hooks[key] = value

    def take_away(self) -> None:
        for hooks, key, _ in self._places:
            hooks.pop(key, None)


class _Hook:
    """A shallow copy of the model, made during the batch, has it too: on another model it does nothing."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        self.model, self.function = model, function

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        if model is self.model:
            return self.function(args, kwargs, *output)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        # something that takes any arguments and returns None, wherever it is loaded: also where taskgrad is not
        return getattr, (nullcontext(), "__exit__")
