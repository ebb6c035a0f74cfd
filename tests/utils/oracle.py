"""Two fp64 oracles for per-task gradients that share no code with the package.

``separate_backwards`` restricts the loss to the rows of one task at a time and calls autograd once per task. It
knows nothing of layers or rows inside the model, so it is the judge wherever the model does not mix examples.

``weight_copies`` gives every task its own copy of every weight and lets each row of each layer call use the copy of
its task: one backward then yields all parts at once, they sum to the ordinary gradient by construction, and nothing
has to be independent. It finds a layer's rows by shape, so feed it batches in which no other size equals B or S.

Both return ``{parameter name: Tensor [T + 1, *shape]}``, float64, the last row for rows of no task (id -1).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
RowLoss = Callable[[Any], Tensor]

_CHANNEL_KINDS = (
    nn.GroupNorm,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
)


def to_double(model: nn.Module) -> nn.Module:
    """A deep copy in float64 that shares nothing with ``model`` and keeps its ties, modes and frozen flags."""
    twin = copy.deepcopy(model).double()
    twin.zero_grad(set_to_none=True)
    return twin


def double_inputs(value: Any) -> Any:
    """Floating-point tensors inside tuples, lists and dicts as float64; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: double_inputs(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(double_inputs(item) for item in value)
    return value


def mean_loss(rows: Tensor, weight: Tensor | None) -> Tensor:
    """The weighted mean of the row losses: what training minimises."""
    if weight is None:
        return rows.mean()
    return (rows * weight.to(rows)).sum() / weight.to(rows).sum()


def separate_backwards(
    model: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    row_loss: RowLoss,
    ids: Tensor,
    num_tasks: int,
    weight: Tensor | None = None,
) -> Gradients:
    """g_t by T + 1 backward passes, each with the loss rows of the other tasks multiplied by zero."""
    twin = to_double(model)
    args, kwargs = double_inputs(inputs)
    state = torch.random.get_rng_state()
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    parts: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for task in [*range(num_tasks), -1]:
        torch.random.set_rng_state(state)
        rows = row_loss(twin(*args, **kwargs))
        loss = mean_loss(rows * (ids == task).to(rows), weight)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, p), grad in zip(parameters.items(), grads, strict=True):
            parts[name].append(torch.zeros_like(p) if grad is None else grad)
    torch.random.set_rng_state(state)
    return {name: torch.stack(rows) for name, rows in parts.items()}


def weight_copies(
    model: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    row_loss: RowLoss,
    ids: Tensor,
    num_tasks: int,
    weight: Tensor | None = None,
) -> Gradients:
    """g_t from one backward through T + 1 copies of every weight.

    A use of a weight that no layer call explains (a bare parameter, a functional use, a call whose rows are not the
    batch's) falls into the last row, so that the rows always sum to the ordinary gradient.
    """
    twin = to_double(model)
    args, kwargs = double_inputs(inputs)
    copies = {id(p): [nn.Parameter(p.detach().clone()) for _ in range(num_tasks + 1)] for p in twin.parameters()}
    copied = _RowCopies(ids, num_tasks)
    for module in list(twin.modules()):
        if _row_dims(module) is not None:
            copied.patch(module, copies)
    if hasattr(twin, "row_context"):
        twin.row_context = copied.rows
    state = torch.random.get_rng_state()
    mean_loss(row_loss(twin(*args, **kwargs)), weight).backward()
    torch.random.set_rng_state(state)
    gradients = {}
    for name, p in twin.named_parameters():
        if p.requires_grad:
            parts = torch.stack([torch.zeros_like(c) if c.grad is None else c.grad for c in copies[id(p)]])
            if p.grad is not None:
                parts[-1] += p.grad
            gradients[name] = parts
    return gradients


class _RowCopies:
    """Replaces layer forwards by a sum over tasks of (rows of the task) times (the task's own copy of the layer)."""

    def __init__(self, ids: Tensor, num_tasks: int) -> None:
        self.ids = ids
        self.tasks = [*range(num_tasks), -1]

    @contextlib.contextmanager
    def rows(self, ids: Tensor) -> Iterator[None]:
        """Stands in for ``tracker.rows`` in models that gather rows."""
        outer, self.ids = self.ids, ids
        try:
            yield
        finally:
            self.ids = outer

    def patch(self, module: nn.Module, copies: dict[int, list[nn.Parameter]]) -> None:
        clones = []
        for index in range(len(self.tasks)):
            clone = object.__new__(type(module))
            parameters = {name: p if p is None else copies[id(p)][index] for name, p in module._parameters.items()}
            clone.__dict__.update(module.__dict__, _parameters=parameters)
            clones.append(clone)
        original = type(module).forward  # not module.forward: a copy of a tracked model may carry a replaced one
        row_dims = _row_dims(module)
        assert row_dims is not None

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            (x,) = (*args, *kwargs.values())
            ids = self.ids
            if isinstance(module, nn.Embedding) and x.shape[0] == 1 and ids.shape[0] > 1:
                x = x.expand(ids.shape[0], *x.shape[1:])
            if row_dims(x)[: ids.ndim] != ids.shape:
                return original(module, *args, **kwargs)
            out: Tensor | None = None
            for task, clone in zip(self.tasks, clones, strict=True):
                part = original(clone, x)  # not clone(x): the hooks of the layer have run already
                mask = (ids == task).reshape(ids.shape + (1,) * (part.ndim - ids.ndim))
                part = torch.where(mask, part, 0.0)
                out = part if out is None else out + part
            assert out is not None
            return out

        module.forward = forward  # type: ignore[method-assign]


def _row_dims(module: nn.Module) -> Callable[[Tensor], torch.Size] | None:
    """How the rows of a call of ``module`` are read off its input, or None if the oracle does not know the kind.

    A subclass with a forward of its own is not of the kind.
    """
    name = type(module).__name__
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return lambda x: x.shape[: -len(module.normalized_shape)]
    if name.endswith(("RMSNorm", "T5LayerNorm")) or type(module).forward is nn.Linear.forward:
        return lambda x: x.shape[:-1]
    if name == "Conv1D" and "transformers" in type(module).__module__:
        return lambda x: x.shape[:-1]
    if type(module).forward is nn.Embedding.forward:
        return lambda x: x.shape
    if isinstance(module, _CHANNEL_KINDS):
        return lambda x: x.shape[:1]
    return None
