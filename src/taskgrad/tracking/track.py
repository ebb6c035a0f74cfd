"""``track``: what it is given, checked, and the tracker that comes of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .._ranks import world_size
from .._without import without
from .tracker import Mode, TaskGradTracker

EXACT_LIMIT = 8 << 30  # bytes of state that exact mode may take


@without(accumulate='mode="exact" adds up always, and the exact Gram without keeping gradients is mode="exact_gram"')
def track(
    model: nn.Module,
    tasks: Sequence[str],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    mode: Mode = "sketch",
    sketch_dim: int = 1024,
    memory_decay: float = 0.98,
    loss_scale: GradScaler | Tensor | None = None,
    verify: bool = True,
    process_group: dist.ProcessGroup | None = None,
    include: Callable[[str, nn.Module], bool] | None = None,
) -> TaskGradTracker:
    """Track per-task gradients of ``model``, in place: parameters, ``state_dict`` and ``param.grad`` stay as they are.

    Args:
        model: any module with trainable parameters.
        tasks: names of the T tasks; ids index them.
        optimizer: one or several; the step closes when all have stepped. Without one, ``tracker.step()`` closes it.
        mode: "sketch", cost about flat in T, T · ``sketch_dim`` numbers per parameter. "exact_gram": ``gram``,
            ``cosine``, ``others_cosine`` and ``norm`` are exact, memory, signal and effects are sketched. In its first
            step it keeps (T + 1) · P numbers, P parameters; from then on only of weights that were used more than once
            in a step (tied ones, or every one with micro-batches): the Gram of the others is computed inside the
            product that gives the weight gradient (``taskgrad.ops.wgrad_gram``), and nothing of this size is kept
            between steps. Where a weight with one use then has a second one, these four are NaN in that step (on a GPU
            until its report has arrived), and one warning names it. "exact": all is exact, (T + 1) · P numbers for the
            taps, T · P for the memory and 2 · T · P float64 for the effects.
        sketch_dim: numbers per parameter in sketch mode; smaller parameters are kept exactly.
        memory_decay: decay of the memory per appearance of a task, in [0, 1). A short memory mostly holds noise that
            the parameters have just moved along, which biases ``signal`` downwards: at 0.9 it is negative for tasks
            that are being learned (docs/policy-log.md).
        loss_scale: the GradScaler (or a scalar tensor) the loss is multiplied with.
        verify: check the rows of every layer on the first tracked batch (two more forward passes without gradients,
            two more with an id per token, one more where BatchNorm trains or parts are compiled; on the second and
            third batch too where one could not tell, and on three more at most where layers are first called later),
            and on some steps that the tasks' gradients add up to ``param.grad``. A pass leaves the model and the random
            states as they were, as far as ``taskgrad.checks.undisturbed.Snapshot`` says.
        process_group: the ranks whose gradients are averaged (DistributedDataParallel); ``None`` for the default group.
        include: ``include(name, module)`` says whether a module is tracked.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message says which and what it needs.
    """
    _check_settings(mode, sketch_dim, memory_decay, loss_scale, include)
    _check_tasks(tasks)
    trainable = _trainable(model)
    optimizers = _optimizers(optimizer, trainable)
    if mode == "exact":
        _check_memory(trainable, len(tasks))
    if world_size(process_group) > 1 and mode != "sketch":
        raise ValueError(
            f'mode="{mode}" works on one rank: the Gram of a mean over ranks needs the gradients of all of them; use '
            'mode="sketch"'
        )
    with torch.inference_mode(False):  # what training writes later
        return TaskGradTracker(
            model,
            tasks,
            optimizers,
            mode=mode,
            sketch_dim=sketch_dim,
            memory_decay=memory_decay,
            loss_scale=loss_scale,
            verify=verify,
            process_group=process_group,
            include=include,
        )


def _check_tasks(tasks: Any) -> None:
    if isinstance(tasks, str) or not all(isinstance(t, str) for t in tasks):
        raise TypeError(f"tasks must be a sequence of names, got {tasks!r}")
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks must be distinct names, at least one, got {list(tasks)}")


def _check_settings(mode: Any, sketch_dim: Any, memory_decay: float, loss_scale: Any, include: Any) -> None:
    if mode not in ("sketch", "exact_gram", "exact"):
        raise ValueError(f'mode must be "sketch", "exact_gram" or "exact", got {mode!r}')
    if not isinstance(sketch_dim, int):
        raise TypeError(f"sketch_dim must be an int, got {type(sketch_dim).__name__}")
    if sketch_dim < 16:
        raise ValueError(f"sketch_dim must be at least 16, got {sketch_dim}")
    if not 0 <= memory_decay < 1:
        raise ValueError(f"memory_decay must lie in [0, 1), got {memory_decay}")
    if loss_scale is not None and not isinstance(loss_scale, GradScaler | Tensor):
        raise TypeError(f"loss_scale must be a GradScaler or a scalar tensor, got {type(loss_scale).__name__}")
    if include is not None and not callable(include):
        raise TypeError(f"include must be a function of (name, module), got {type(include).__name__}")


def _trainable(model: Any) -> list[nn.Parameter]:
    """The model's trainable parameters, none of which may be spread over several devices."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model has no trainable parameters: every requires_grad is False")
    for name, module in model.named_modules():
        if any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__):
            raise ValueError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), which is not supported; "
                "use DistributedDataParallel"
            )
    # importing it takes 0.6 s, and where nobody has there are none
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    if any(isinstance(p, dtensor) for p in params):
        raise ValueError("sharded parameters (DTensor: FSDP2, tensor parallelism) are not supported; use DDP")
    devices = {str(p.device) for p in params}
    if len(devices) > 1:
        raise ValueError(
            f"the trainable parameters are on several devices ({', '.join(sorted(devices))}), which is not supported: "
            "put the model on one device per process"
        )
    return params


def _optimizers(given: Any, trainable: Sequence[nn.Parameter]) -> list[Optimizer]:
    """One optimizer, several or none as a list, without the wrappers of frameworks (AcceleratedOptimizer), whose steps
    may be skipped."""
    if given is None:
        return []
    if isinstance(given, Optimizer) or not isinstance(given, Iterable):
        given = [given]
    found: list[Optimizer] = []
    for o in given:
        while isinstance(inner := getattr(o, "optimizer", None), Optimizer):
            o = inner
        if not isinstance(o, Optimizer):
            raise TypeError(f"optimizer must be a torch Optimizer or a sequence of them, got {type(o).__name__}")
        if all(o is not other for other in found):
            found.append(o)
    for o in found:
        held = {id(p) for group in o.param_groups for p in group["params"]}
        if held.isdisjoint(id(p) for p in trainable):
            raise ValueError("optimizer holds none of the model's trainable parameters; pass the one that trains it")
    return found


def _check_memory(params: Sequence[nn.Parameter], tasks: int) -> None:
    """Raise ValueError where exact gradients would be too large to keep."""
    size = sum(math.prod(p.shape) * ((2 * tasks + 1) * p.element_size() + 2 * tasks * 8) for p in params)
    if size > EXACT_LIMIT:
        raise ValueError(
            f'mode="exact" would hold {size / 2**30:.1f} GiB for {tasks} tasks, more than {EXACT_LIMIT >> 30}; '
            'use mode="sketch", or mode="exact_gram" for the exact Gram alone'
        )
