"""What a user holds: ``track``, ``tracker.batch`` and ``tracker.report``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .batches import Batch, Batches
from .closing import StepHooks, in_backward
from .coverage import Coverage
from .delivery import Mailbox
from .probe import StepProbe
from .probes import Probes
from .reduce import world_size
from .report import StepReport
from .rows import Rows, check_loss_weight
from .steps import Steps
from .verify import FirstCall, failing_sites

SKETCH_SEED = 0
EXACT_LIMIT = 8 << 30  # bytes of state that exact mode may take


class TaskGradTracker:
    """Per-task gradient statistics of a model in training; made by ``taskgrad.track``."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        optimizers: Sequence[Optimizer],
        *,
        mode: Literal["sketch", "exact"],
        sketch_dim: int,
        memory_decay: float,
        loss_scale: GradScaler | Tensor | None,
        verify: bool,
        process_group: dist.ProcessGroup | None,
        include: Callable[[str, nn.Module], bool] | None,
        accumulate: bool,
    ) -> None:
        self.model = model
        self.tasks = tuple(tasks)
        self.mode = mode
        self.accumulate = accumulate
        self.sketch_dim = sketch_dim
        self._batches = Batches()
        width = None if mode == "exact" and accumulate else sketch_dim
        self._probes = Probes(model, self._batches, len(self.tasks), width, SKETCH_SEED, include, not accumulate)
        if not self._probes.probes:
            self._probes.remove()
            raise ValueError(
                "no trainable parameter of the model belongs to a layer kind that taskgrad knows: "
                + "; ".join(f"{n}: {r}" for n, r in list(self._probes.reasons.items())[:5])
            )
        self._steps = Steps(
            self.tasks,
            self._probes,
            self._batches,
            memory_decay=memory_decay,
            loss_scale=loss_scale,
            guard=verify,
            group=process_group,
        )
        self._removed = False
        self._hooks = StepHooks(optimizers, self._steps.read, self._steps.close) if optimizers else None
        hook = FirstCall(self._verify_first)
        self._verify_hook = model.register_forward_pre_hook(hook, with_kwargs=True) if verify else None

    def batch(self, ids: Tensor, weight: Tensor | None = None, *, loss_weight: Any = None) -> Batch:
        """Attribute the rows of the forward pass inside the context to tasks.

        The ids bind at the forward: the backward may run anywhere before the optimizer step. With ids per example and a
        model that does not mix examples, g_t is what a separate backward of task t's part of the loss gives. BatchNorm
        in training mode, in-batch contrastive losses and mixture-of-experts capacity do mix: there g_t is row
        attribution, the part of the gradient that flows through the weights at the rows of task t. The same holds for
        ids per token where tokens of different tasks see each other (packing without document masks).

        Args:
            ids: int64, (B,) one task index per example or (B, S) one per token; -1 belongs to no task ("rest").
            weight: weight of each row in the loss mean, in the shape of ``ids``; ``None`` for 1. For a mean over
                tokens it is the number of tokens counted, or mean gradients, signal and memory are wrong:
                ``(labels != -100).sum(1)``, and ``(labels[:, 1:] != -100).sum(1)`` where the model shifts the labels
                (transformers' causal models).
            loss_weight: [T] (tensor, array or sequence), what the loss multiplies every row of a task with before the
                mean is taken, ``None`` for nothing; the mean still divides by the rows, or their ``weight``. It is
                divided out of what is said about a task alone (``norm``, ``signal``, memory, effects), which is as if
                the loss had not been touched; ``gram``, ``cosine`` and ``memory_dot``'s gradients stay those that flow
                into ``param.grad``. The use is a sampler that boosts tasks while the objective stays the natural mix
                (``AdaptiveBatchSampler.loss_weight``)::

                    for k, (x, y, ids) in enumerate(loader):  # of the whole run
                        factor = torch.from_numpy(sampler.loss_weight(k))
                        with tracker.batch(ids, loss_weight=factor) as b:
                            per_example = loss_fn(model(x), y)
                            b.losses(per_example)
                            (factor[ids].to(per_example) * per_example).mean().backward()

        Raises:
            TypeError, ValueError: ids, weight or loss_weight of the wrong dtype, shape or range.
        """
        if self._removed:
            raise RuntimeError("this tracker was removed from the model; track() again")
        if loss_weight is not None:
            loss_weight = check_loss_weight(loss_weight, len(self.tasks))
        rows = Rows(ids, len(self.tasks), self._probes.device, weight, loss_weight)
        return Batch(rows, weight, self._enter, self._leave)

    def rows(self, ids: Tensor) -> AbstractContextManager[None]:
        """Inside a model's forward: the layers called here work on rows with these ids, int64 (N,) (gathered rows, as
        in a mixture of experts); -1 is rest. Does nothing outside of ``batch``."""
        return self._batches.regroup(lambda: Rows(ids, len(self.tasks), self._probes.device))

    def _enter(self, batch: Batch) -> None:
        if self._batches.active is not None:
            raise RuntimeError("tracker.batch() is open already; leave it before the next batch begins")
        self._steps.begin()
        self._batches.enter(batch)

    def _leave(self, batch: Batch, failed: bool) -> None:
        self._batches.leave(batch, failed)
        self._steps.drop_unattributed()

    def step(self) -> None:
        """Close the step by hand, for a tracker without optimizer: after the update, before gradients are zeroed."""
        if self._hooks is not None:
            raise RuntimeError(
                "this tracker was given the optimizer, whose step closes the step; do not call step() too"
            )
        self._steps.read()
        self._steps.close()

    def report(self, wait: bool = False) -> StepReport:
        """The newest complete report; on a CPU that of the step just closed. ``wait`` waits for a GPU's newest step.

        Before the first step, and where the newest step was abandoned, the report is not ``valid``.
        """
        self._steps.abandon_if_vanished()
        return self._steps.mail.newest(wait) or self._steps.nothing()

    def task_gradients(self) -> dict[str, Tensor]:
        """Exact mode: every attributed parameter's gradient by task, [T + 1, *shape], of the last closed step; the last
        entry is rest. Raises RuntimeError in sketch mode, where they are never formed, and before the first step."""
        if self.mode != "exact" or not self.accumulate:
            raise RuntimeError(
                'task_gradients() needs mode="exact", with accumulate=True: otherwise they are never formed'
            )
        gradient = self._steps.gradient
        if gradient is None:
            raise RuntimeError("task_gradients() needs a closed step: call optimizer.step() first")
        return {p.name: gradient[:, p.columns].unflatten(1, p.param.shape) for p in self._probes.live()}

    def coverage(self) -> Coverage:
        """Which parameters the numbers are about, and why the others are not."""
        self._steps.drop_unattributed()
        return self._probes.coverage(self._batches.verified)

    def verify(self, *args: Any, **kwargs: Any) -> Coverage:
        """Check inside ``with tracker.batch(ids)`` that the rows of every layer are the rows of the batch.

        Called like the model, with inputs for it. Layers that fail are dropped and named by ``coverage()``, which is
        returned. A few forward passes without gradients (see ``taskgrad.verify``); RNG and buffers are restored.
        """
        if self._batches.active is None:
            raise RuntimeError("verify() needs the ids: call it inside `with tracker.batch(ids):`")
        self._verify_rows(args, kwargs)
        return self.coverage()

    def _verify_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self._batches.verified or self._batches.active is None:
            return
        if self._batches.observer is None and torch.is_grad_enabled() and not in_backward():
            self._verify_rows(args, kwargs)

    def _verify_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._batches.active is not None
        failing = failing_sites(self.model, self._batches, self._batches.active.task_rows, args, kwargs)
        if failing is None:
            return
        self._batches.verified = True
        for site in self._probes.sites:
            if site.name in failing and site.reason is None:
                site.reason = failing[site.name]
        self._steps.drop_unattributed()

    def probe(self, loss: Callable[[], Tensor]) -> StepProbe:
        """Measure ``loss()``, say of a fixed batch by task, just before and just after the next optimizer step."""
        self._steps.probe = StepProbe(self.model, loss)
        return self._steps.probe

    def state_dict(self) -> dict[str, Any]:
        """Memory, windows and what they depend on; tensors and plain values only."""
        return {
            "version": 1,
            "tasks": list(self.tasks),
            "mode": self.mode,
            "accumulate": self.accumulate,
            "sketch_dim": self.sketch_dim,
            "sketch_seed": SKETCH_SEED,
            "columns": [[p.name, p.sketch.dim] for p in self._probes.probes.values()],
            "left_out": dict(self._probes.reasons),
            "verified": self._batches.verified,
            "step": self._steps.count,
            "memory": self._steps.memory.state_dict(),
            "windows": self._steps.overwriting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; raises ValueError if it is of other tasks, another mode or another model."""
        mine = self.state_dict()
        for key in ("version", "tasks", "mode", "accumulate", "sketch_dim", "sketch_seed", "columns"):
            if state[key] != mine[key]:
                raise ValueError(f"state_dict has {key} = {state[key]!r}, this tracker has {mine[key]!r}")
        for name, reason in state["left_out"].items():
            self._probes.drop(name, reason)
        self._probes.refresh(between_steps=True)
        self._batches.verified, self._steps.count = state["verified"], state["step"]
        self._steps.memory.load_state_dict(state["memory"])
        self._steps.overwriting.load_state_dict(state["windows"])
        self._steps.follow_parameters()
        self._steps.mail = Mailbox()

    def remove(self) -> None:
        """Take every hook and patch off the model and the optimizers. The tracker keeps its last report."""
        self._removed = True
        self._probes.remove()
        if self._hooks is not None:
            self._hooks.remove()
        if self._verify_hook is not None:
            self._verify_hook.remove()
        self._batches.pending.clear()
        self._probes.discard()


def track(
    model: nn.Module,
    tasks: Sequence[str],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    mode: Literal["sketch", "exact"] = "sketch",
    sketch_dim: int = 1024,
    memory_decay: float = 0.98,
    loss_scale: GradScaler | Tensor | None = None,
    verify: bool = True,
    process_group: dist.ProcessGroup | None = None,
    include: Callable[[str, nn.Module], bool] | None = None,
    accumulate: bool = True,
) -> TaskGradTracker:
    """Track per-task gradients of ``model``, in place: parameters, ``state_dict`` and ``param.grad`` stay as they are.

    Args:
        model: any module with trainable parameters.
        tasks: names of the T tasks; ids index them.
        optimizer: one or several; the step closes when all have stepped. Without one, ``tracker.step()`` closes it.
        mode: "sketch", cost about flat in T, T · ``sketch_dim`` numbers per parameter; "exact", the T full gradients:
            (T + 1) · P numbers for the taps, T · P for the memory and 2 · T · P float64 for the effects, P parameters;
            see ``accumulate`` for the exact Gram without them.
        sketch_dim: numbers per parameter in sketch mode; smaller parameters are kept exactly.
        memory_decay: decay of the memory per appearance of a task, in [0, 1). A short memory mostly holds noise that
            the parameters have just moved along, which biases ``signal`` downwards: at 0.9 it is negative for tasks
            that are being learned (docs/policy-log.md).
        loss_scale: the GradScaler (or a scalar tensor) the loss is multiplied with.
        verify: check the rows of every layer on the first tracked batch, and on some steps that the tasks' gradients
            add up to ``param.grad``.
        process_group: the ranks whose gradients are averaged (DistributedDataParallel); ``None`` for the default group.
        include: ``include(name, module)`` says whether a module is tracked.
        accumulate: exact mode: keep the T gradients, so that they add up over uses of a weight and over micro-batches.
            With False a step is one batch, parameters used more than once are left out by name, ``gram``, ``cosine``
            and ``others_cosine`` are exact, and what needs the memory is sketched as in sketch mode: the Gram is
            computed inside the product that gives the weight gradient (``taskgrad.ops.wgrad_gram``).

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message says which and what it needs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(tasks, str) or not all(isinstance(t, str) for t in tasks):
        raise TypeError(f"tasks must be a sequence of names, got {tasks!r}")
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks must be distinct names, at least one, got {list(tasks)}")
    if mode not in ("sketch", "exact"):
        raise ValueError(f'mode must be "sketch" or "exact", got {mode!r}')
    if not isinstance(sketch_dim, int):
        raise TypeError(f"sketch_dim must be an int, got {type(sketch_dim).__name__}")
    if loss_scale is not None and not isinstance(loss_scale, GradScaler | Tensor):
        raise TypeError(f"loss_scale must be a GradScaler or a scalar tensor, got {type(loss_scale).__name__}")
    if include is not None and not callable(include):
        raise TypeError(f"include must be a function of (name, module), got {type(include).__name__}")
    if sketch_dim < 16:
        raise ValueError(f"sketch_dim must be at least 16, got {sketch_dim}")
    if not 0 <= memory_decay < 1:
        raise ValueError(f"memory_decay must lie in [0, 1), got {memory_decay}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model has no trainable parameters: every requires_grad is False")
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise TypeError(f"optimizer must be a torch Optimizer or a sequence of them, got {type(o).__name__}")
        held = {id(p) for group in o.param_groups for p in group["params"]}
        if held.isdisjoint(id(p) for p in trainable):
            raise ValueError("optimizer holds none of the model's trainable parameters; pass the one that trains it")
    if mode == "sketch" and not accumulate:
        raise ValueError('accumulate=False is for mode="exact": sketches always accumulate')
    if mode == "exact" and accumulate:
        _check_memory(trainable, len(tasks))
    if world_size(process_group) > 1 and mode == "exact":
        raise ValueError('mode="exact" works on one rank: its gradients are too large to sum; use mode="sketch"')
    # importing it takes 0.6 s, and where nobody has there are none
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    if any(isinstance(p, dtensor) for p in trainable):
        raise ValueError("sharded parameters (DTensor: FSDP2, tensor parallelism) are not supported; use DDP")
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
        accumulate=accumulate,
    )


def _check_memory(params: Sequence[nn.Parameter], tasks: int) -> None:
    size = sum(math.prod(p.shape) * ((2 * tasks + 1) * p.element_size() + 2 * tasks * 8) for p in params)
    if size > EXACT_LIMIT:
        raise ValueError(
            f'mode="exact" would hold {size / 2**30:.1f} GiB for {tasks} tasks, more than {EXACT_LIMIT >> 30}; '
            'use mode="sketch", or accumulate=False for the exact Gram alone'
        )
