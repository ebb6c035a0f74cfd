"""A tracked module: what its calls are attributed to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .base import Capture, Gauge, Unattributed
from .route import class_forward, connect, disconnect
from .task_rows import Rows


class Owner(Protocol):
    """What a site asks of the tracker, at every call of its module."""

    observer: Callable[[Site, tuple[Any, ...], dict[str, Any]], None] | None

    @property
    def regrouped(self) -> bool: ...

    @property
    def examples(self) -> int: ...

    def current_rows(self) -> Rows | None: ...


class Site:
    """A tracked module: its capture, its gauges, and why it was left out, if it was.

    The state lives here and nothing of it on the module, so copies and pickles of the module come out untracked.
    """

    def __init__(self, name: str, module: nn.Module, capture: Capture, owner: Owner) -> None:
        self.name = name
        self.place = name or "the model itself"
        self.module = module
        self.capture = capture
        self.owner = owner
        self.gauges: Mapping[str, Gauge] = {}
        self.route: Any = None  # the function that calls it
        self.reason: str | None = None
        self.unfit: str | None = None  # what a call said of the ids, until the batch is over
        connect(self)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What a call of the module does."""
        observer = None if torch.compiler.is_compiling() else self.owner.observer  # looks only; never traced
        if observer is not None:
            observer(self, args, kwargs)
        out = self._run(*args, **kwargs)
        if observer is None:
            return out
        return self.capture.watch(out, self.owner.examples, lambda x: observer(self, (x,), {}))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.owner.current_rows()
        # no rows, no gradient: an expert without tokens
        if rows is None or not self.gauges or not rows.entries or transformed():
            return self.plain(*args, **kwargs)
        try:
            refuse_layouts(args, kwargs)
            out = self.capture.forward(self.module, rows, self.gauges, *args, **kwargs)
            rows.fitted = True
            return out
        except Unattributed as error:
            self.unfit = str(error)  # takes effect between steps: a recomputation must do as this call does
            return self.plain(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward."""
        return class_forward(type(self.module))(self.module, *args, **kwargs)  # type: ignore[no-any-return]

    def remove(self) -> None:
        disconnect(self)


def transformed() -> bool:
    """Whether a transform of torch.func, forward-mode differentiation or ``torch.jit.trace`` runs, which a Function
    with taps cannot take part in. What it adds to gradients is in no statistics, and compared at the step."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def refuse_layouts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise Unattributed for an input whose rows are no rows of a dense array of real numbers."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            if x.is_nested or x.layout is not torch.strided:
                kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
                raise Unattributed(f"its input is a {kind} tensor; only dense ones are split by task")
            if x.is_complex():
                raise Unattributed(f"its input is complex ({x.dtype}); only real ones are split by task")
