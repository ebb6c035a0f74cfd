"""What a layer kind has to say about itself so that its weight gradient is split by task.

A captured layer runs its forward through an ``autograd.Function`` that takes over the weight gradient and returns, as
the gradient of an unregistered leaf (the parameter's *tap*, see ``capture.tap``), the sketch of every task's part of
it. Autograd then accumulates the statistics exactly when it accumulates ``param.grad``: over uses of a shared weight
and over micro-batches, and not under ``autograd.grad(loss, x)``. All tensors are saved with ``save_for_backward``,
which keeps the memory saving of activation checkpointing, and the output is returned detached, which lets in-place ops
follow.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..ops import sketch_all
from .accumulation import Accumulation, Held
from .route import class_forward
from .sketch import SketchMap
from .tap import Keeps, TapLayout, tap_dtype
from .task_rows import Rows


class Unattributed(Exception):
    """Raised by ``Capture.forward`` where the rows of this call cannot be matched with the task ids; says why."""


@dataclass
class Arrived:
    """What a pass brought to a parameter, sketched [dim], and, sketched, to its tap [T + 1, dim]."""

    param: Tensor | None = None
    tap: Tensor | None = None


class Gauge:
    """One parameter's map, and the leaf whose gradient is what is kept of every task's part of the parameter's
    gradient.

    Attributes:
        stray: scalar leaf; a gradient arrives at it where a part of the parameter's gradient cannot be split.
        layout: what is where in what the tap adds up.
        shape: the parameter's shape as tracking began, which the sketch is for.
        seen: the parameter had statistics in some step.
        squares: [3] float64, of the passes that were checked: squared norms of the difference between the gradient and
            the sum over tasks, of the tasks' parts, and of the gradient.
    """

    def __init__(
        self,
        name: str,
        param: nn.Parameter,
        sketch: SketchMap,
        num_tasks: int,
        column: int,
        keeps: Keeps,
        accumulation: Accumulation,
    ) -> None:
        self.name = name
        self.param = param
        self.layout = TapLayout(num_tasks, sketch, keeps)
        self.columns = slice(column, column + sketch.dim)
        self.shape = param.shape
        self.seen = False
        self.held = Held()
        self.arrived = Arrived()
        self.squares: Tensor | None = None
        self._accumulation = accumulation
        self._handle: RemovableHandle | None = None
        self._make_leaves()

    def _make_leaves(self) -> None:
        self.tap = self.layout.leaf(tap_dtype(self.param), self.param.device)
        self.tap.register_hook(functools.partial(self._before_tap, self.layout))
        self.stray = torch.zeros((), device=self.param.device, requires_grad=True)
        self.packed = (self.layout.keeps, self.tap, *self.layout.maps)  # for ``capture.function.pack``

    @property
    def sketch(self) -> SketchMap:
        return self.layout.sketch

    def _before_param(self, gradient: Tensor | None) -> None:
        if gradient is None:  # a Function that has no gradient for it: nothing is added
            return
        self.held.param_pass = self._accumulation.arrive()
        self.held.expect(self.param.grad, gradient)
        if self._accumulation.checking and gradient.layout is torch.strided:
            self.arrived.param = self.sketch_of(gradient).clone()

    def _before_tap(self, layout: TapLayout, gradient: Tensor) -> None:
        number = self._accumulation.arrive()
        if layout is not self.layout:  # of a forward from before the tap was laid out anew: its statistics are lost
            self.held.foreign = True
            return
        self.held.tap_pass = number
        self.seen = True
        if self._accumulation.checking:
            self.arrived.tap = self.layout.sketches(gradient).detach().clone()

    def sketch_of(self, values: Tensor) -> Tensor:
        """The sketch of ``values`` of the parameter's shape, [dim] in float64."""
        return sketch_all([values.detach()], [self.sketch.left], [self.sketch.right])

    def compare(self) -> None:
        """The pass is over: what it brought to the parameter against the sum of what it brought to the tap."""
        brought, self.arrived = self.arrived, Arrived()
        if brought.param is None or brought.tap is None:  # a pass that is not tracked is compared at the step
            return
        tap = brought.tap.double()
        squares = torch.stack([x.square().sum() for x in (brought.param - tap.sum(0), tap, brought.param)])
        self.squares = squares if self.squares is None else self.squares + squares

    def discard(self) -> None:
        """Forget the statistics of the step."""
        self.tap.grad = self.stray.grad = self.squares = None
        self.arrived = Arrived()

    def follow(self) -> None:
        """Listen to the parameter's gradient, and move to its device and dtype where the model was moved after tracking
        began."""
        if self._handle is None and self.param.requires_grad:
            self._handle = self.param.register_hook(self._before_param)
        if self.tap.device != self.param.device or self.tap.dtype != tap_dtype(self.param):
            self.layout = replace(self.layout, sketch=self.sketch.to(self.param.device))
            self._make_leaves()

    def keep(self, keeps: Keeps) -> None:
        """From now on the tap keeps this of the tasks' parts; only between steps, when nothing is under way."""
        if keeps != self.layout.keeps:
            self.layout = replace(self.layout, keeps=keeps)
            self._make_leaves()

    def remove(self) -> None:
        """Take the hook off the parameter."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if not self.param._backward_hooks:
            self.param._backward_hooks = None  # as before the first hook

    @property
    def hooked(self) -> bool:
        """Whether somebody else's hook may change the gradient on its way."""
        after = getattr(self.param, "_post_accumulate_grad_hooks", None)
        return bool(after) or len(self.param._backward_hooks or ()) > 1


class Capture(abc.ABC):
    """A layer kind. Subclass it, decorate it with ``register_capture(ModuleType)``, and the kind is tracked.

    ``params`` names the parameters whose gradient the kind takes over.
    """

    params: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def refuse(self, module: nn.Module) -> str | None:
        """Why this very module cannot be captured (an option of it, say), or ``None``."""
        return None

    @abc.abstractmethod
    def forward(self, module: nn.Module, rows: Rows, gauges: Mapping[str, Gauge], *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward, with the statistics attached.

        Args:
            module: the tracked module.
            rows: the rows of the batch, sorted by task.
            gauges: of the parameters in ``params`` that require a gradient; at least one.
            *args, **kwargs: as the module was called.

        Raises:
            Unattributed: the rows of this call are not the rows of the batch.
        """

    def watch(self, out: Any, examples: int, see: Callable[[Tensor], None]) -> Any:
        """The module's output while rows are being checked: ``see`` is to be shown what else, beside the module's
        input, must hold rows of the batch."""
        return out


_REGISTRY: dict[type[nn.Module], tuple[Capture, Any]] = {}  # with the forward that it knows


def register_capture(module_type: type[nn.Module]) -> Callable[[type[Capture]], type[Capture]]:
    """Class decorator: use this ``Capture`` for ``module_type`` and for subclasses that do not override ``forward``."""

    def register(capture: type[Capture]) -> type[Capture]:
        _REGISTRY[module_type] = capture(), class_forward(module_type)
        return capture

    return register


def find_capture(module: nn.Module) -> Capture | None:
    """The capture of the module's kind: of its type or the nearest base that has the same ``forward``, if that is the
    one the kind was registered with: a patched class computes something else."""
    forward = class_forward(type(module))
    return next((_REGISTRY[c][0] for c in type(module).__mro__ if c in _REGISTRY and _REGISTRY[c][1] is forward), None)


def shape_text(x: Tensor) -> str:
    """The shape of ``x`` for messages; sizes that depend on data cannot be printed while they are traced."""
    return "another shape" if torch.compiler.is_compiling() else f"shape {tuple(x.shape)}"


def rows_of(rows: Rows, x: Tensor, feature_dims: int = 1) -> int:
    """Number of ids E if ``x`` [*ids.shape, ..., features] has a row block for each of them; raises Unattributed
    else."""
    if not rows.match(x, feature_dims):
        raise Unattributed(f"input of {shape_text(x)} does not start with the shape of the ids, {rows.shape}")
    return rows.entries


def by_entry(x: Tensor, entries: int, feature_dims: int = 1) -> tuple[int, int, int]:
    """The shape [E, M, features] of ``x`` with ``feature_dims`` dimensions of features and M rows for each of E ids."""
    lead = x.dim() - feature_dims
    return entries, math.prod(x.shape[:lead]) // entries, math.prod(x.shape[lead:])
