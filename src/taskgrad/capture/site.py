"""Where a layer kind is put on a module: the instance's ``forward`` is replaced, and put back."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..rows import Rows
from .base import Capture, Probe, Unattributed


class Owner(Protocol):
    """What a site asks of the tracker, at every call of its module."""

    observer: Callable[[Site, tuple[Any, ...], dict[str, Any]], None] | None

    @property
    def regrouped(self) -> bool: ...

    def current_rows(self) -> Rows | None: ...


class Site:
    """A tracked module: its capture, its probes, and why it was left out, if it was.

    The state lives here and not on the module, so copies and pickles of the module come out untracked: the replaced
    ``forward`` of a copy sees that it is not on the module it was made for.
    """

    def __init__(self, name: str, module: nn.Module, capture: Capture, owner: Owner) -> None:
        self.name = name
        self.module = module
        self.capture = capture
        self.owner: Owner | None = owner
        self.probes: Mapping[str, Probe] = {}
        self.reason: str | None = None

        def forward(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            owner = self.owner
            if owner is None or this is not self.module:
                return type(this).forward(this, *args, **kwargs)
            # looks only; never traced by a compiler
            if not torch.compiler.is_compiling() and owner.observer is not None:
                owner.observer(self, args, kwargs)
            rows = owner.current_rows()
            if rows is None or not self.probes:
                return type(this).forward(this, *args, **kwargs)
            try:
                return self.capture.forward(this, rows, self.probes, *args, **kwargs)
            except Unattributed as error:
                self.reason = str(error)  # takes effect between steps: a recomputation must do as this call does
                return type(this).forward(this, *args, **kwargs)

        forward.taskgrad_site = self  # type: ignore[attr-defined]
        self._patched = types.MethodType(forward, module)
        # by __dict__: nn.Module.__setattr__ has nothing to add for a method
        module.__dict__["forward"] = self._patched

    def remove(self) -> None:
        """Put the module back. A wrapper that was laid over ours since keeps working: it calls the plain forward."""
        self.owner = None
        if self.module.__dict__.get("forward") is self._patched:
            del self.module.__dict__["forward"]


def replaced_forward(module: nn.Module) -> bool:
    """Whether the instance has a ``forward`` of somebody's own. What copies and pickles of a tracked module carry is
    not one: it does nothing, and is taken off here."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    function = getattr(forward, "__func__", None)
    site = getattr(function, "taskgrad_site", None)
    stale = site is not None and (site.owner is None or site.module is not module)
    if stale or function is type(module).forward:
        del module.__dict__["forward"]
        return False
    return True
