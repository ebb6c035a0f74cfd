"""What a user holds: ``track``, ``tracker.batch`` and ``tracker.report``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .capture.site import Site
from .closing import StepHooks, in_backward
from .coverage import Coverage
from .guard import gradients_disagree
from .memory import Reading, TaskMemory
from .ops.sum_gram import sum_gram
from .overwrite import Overwriting
from .probe import StepProbe
from .probes import Probes
from .reduce import all_reduce_flat, world_size
from .report import StepReport, cosines
from .rows import Rows
from .verify import failing_sites

SKETCH_SEED = 0
EXACT_LIMIT = 8 << 30  # bytes of state that exact mode may take
GUARD_FIRST, GUARD_EVERY = 3, 100  # steps on which the sum over tasks is compared with param.grad


@dataclass
class _Open:
    """A step between its first half (gradients read) and its second (parameters updated)."""

    reading: Reading
    gradient: Tensor
    gram: Tensor
    weight: Tensor
    examples: Tensor
    loss: Tensor | None
    valid: Tensor


class Batch:
    """Context of one forward pass: ``with tracker.batch(ids) as b``."""

    def __init__(self, tracker: TaskGradTracker, rows: Rows, weight: Tensor | None) -> None:
        self._tracker = tracker
        self._weight = weight
        self.task_rows = rows
        self.task_losses: Tensor | None = None

    def losses(self, per_row: Tensor) -> None:
        """Enter the loss of every row, in the shape of the ids; fills ``StepReport.loss``."""
        if tuple(per_row.shape) != self.task_rows.shape:
            raise ValueError(f"per_row must have the shape of ids, {self.task_rows.shape}, got {tuple(per_row.shape)}")
        values = per_row.detach().double().reshape(-1)
        if self._weight is not None:
            values = values * self._weight.reshape(-1).to(values)
        bins = self.task_rows.offsets.shape[0] - 1
        sums = torch.zeros(bins, dtype=torch.float64, device=values.device)
        self.task_losses = sums.index_add(0, self.task_rows.segment.to(values.device), values)

    def __enter__(self) -> Batch:
        self._tracker._enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker._exit(self, failed=kind is not None)


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
    ) -> None:
        self.model = model
        self.tasks = tuple(tasks)
        self.mode = mode
        self.sketch_dim = sketch_dim
        self.observer: Callable[[Site, tuple[Any, ...], dict[str, Any]], Tensor] | None = None
        self._active: Batch | None = None
        self._regrouped: Rows | None = None
        self._pending: list[Batch] = []
        self._open: _Open | None = None
        self._report: StepReport | None = None
        self._gradient: Tensor | None = None
        self._step = 0
        self._guard = verify
        self._verified = False
        self._loss_scale = loss_scale
        self._group = process_group
        self._step_probe: StepProbe | None = None
        width = None if mode == "exact" else sketch_dim
        self._probes = Probes(model, self, len(self.tasks), width, SKETCH_SEED, include)
        if not self._probes.probes:
            self._probes.remove()
            raise ValueError(
                "no trainable parameter of the model belongs to a layer kind that taskgrad knows: "
                + "; ".join(f"{n}: {r}" for n, r in list(self._probes.reasons.items())[:5])
            )
        device = self._probes.device
        dtype = next(iter(self._probes.probes.values())).tap.dtype
        self._memory = TaskMemory(len(self.tasks), self._probes.width, memory_decay, dtype, device)
        self._overwriting = Overwriting(len(self.tasks), device)
        self._theta = self._probes.theta()
        self._versions = self._probes.versions()
        self._hooks = StepHooks(optimizers, self._read, self._close) if optimizers else None
        self._verify_hook = model.register_forward_pre_hook(self._verify_first, with_kwargs=True) if verify else None

    # -- batches ---------------------------------------------------------------------------------------------------

    def batch(self, ids: Tensor, weight: Tensor | None = None) -> Batch:
        """Attribute the rows of the forward pass inside the context to tasks.

        The ids bind at the forward: the backward may run anywhere before the optimizer step. With ids per example and a
        model that does not mix examples, g_t is what a separate backward of task t's part of the loss gives. BatchNorm
        in training mode, in-batch contrastive losses and mixture-of-experts capacity do mix: there g_t is row
        attribution, the part of the gradient that flows through the weights at the rows of task t. The same holds for
        ids per token where tokens of different tasks see each other (packing without document masks).

        Args:
            ids: int64, (B,) one task index per example or (B, S) one per token; -1 belongs to no task ("rest").
            weight: weight of each row in the loss mean, in the shape of ``ids``, e.g. ``(labels != -100).sum(1)`` for a
                mean over tokens; ``None`` for 1.

        Raises:
            TypeError, ValueError: ids or weight of the wrong dtype, shape or range.
        """
        return Batch(self, Rows(ids, len(self.tasks), self._probes.device, weight), weight)

    @contextmanager
    def rows(self, ids: Tensor) -> Iterator[None]:
        """Inside a model's forward: the rows of the layers called here have these ids, int64 (N,) (gathered rows, as
        in a mixture of experts); -1 is rest. Does nothing outside of ``batch``."""
        current = self.current_rows() if self.observer is None else None
        if current is None and self.observer is None:
            yield
            return
        regrouped = Rows(ids, len(self.tasks), self._probes.device)
        if current is not None:
            regrouped.receipt = current.receipt
        before, self._regrouped = self._regrouped, regrouped
        try:
            yield
        finally:
            self._regrouped = before
            if current is not None:
                current.half |= regrouped.half

    @property
    def regrouped(self) -> bool:
        return self._regrouped is not None

    def current_rows(self) -> Rows | None:
        """The rows a layer called now works on; ``None``: not tracked."""
        if self._active is None and (torch.compiler.is_compiling() or not in_backward()):
            return None
        if not torch.is_grad_enabled():
            return None
        if self._regrouped is not None:
            return self._regrouped
        if not torch.compiler.is_compiling() and in_backward():
            return self._recomputed()
        return None if self._active is None else self._active.task_rows

    def _recomputed(self) -> Rows | None:
        """Rows of a layer that activation checkpointing runs again inside the backward pass."""
        waiting = [b for b in self._pending if not b.task_rows.ran]
        if len(waiting) > 1:
            raise RuntimeError(
                "activation checkpointing recomputes a layer while several batches wait for their backward pass, so its "
                "rows cannot be told apart; call backward() for each tracker.batch() before the next one"
            )
        return waiting[0].task_rows if waiting else None

    def _enter(self, batch: Batch) -> None:
        if self._active is not None:
            raise RuntimeError("tracker.batch() is open already; leave it before the next batch begins")
        self._abandon_if_vanished()
        if self._probes.refresh():
            self._theta = self._probes.theta()
            self._memory.widen(self._theta)
        versions = self._probes.versions()
        if not self._pending and versions != self._versions:
            self._theta, self._versions = self._probes.theta(), versions
        self._active = batch
        self._pending.append(batch)

    def _exit(self, batch: Batch, failed: bool) -> None:
        self._active = None
        self._drop_unattributed()
        if failed and not batch.task_rows.ran:
            self._pending.remove(batch)

    def _drop_unattributed(self) -> None:
        known = set(self._probes.reasons)
        self._probes.collect_reasons()
        for name in set(self._probes.reasons) - known:
            if name in self._probes.probes:
                self._memory.forget_columns(self._probes.probes[name].columns)

    # -- the step --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Close the step by hand, for a tracker without optimizer: after the update, before the gradients are zeroed."""
        if self._hooks is not None:
            raise RuntimeError(
                "this tracker was given the optimizer, whose step closes the step; do not call step() too"
            )
        self._read()
        self._close()

    def _abandon_if_vanished(self) -> None:
        """Pending statistics whose gradients were zeroed before a step: the step will not come."""
        if not self._probes.dirty:
            return
        vanished = self._probes.grads_vanished()
        if vanished is None or bool(vanished):
            self._report = self._invalid_report()
            self._pending.clear()
            self._probes.discard()

    def _read(self) -> None:
        """Before the update: gradients against memory."""
        if self._open is not None:
            return
        if self._step_probe is not None:
            self._step_probe.before = self._step_probe.measure()
        ran = [b for b in self._pending if b.task_rows.ran]
        self._pending.clear()
        self._drop_unattributed()
        if not ran:
            self._probes.discard()
            return
        weight = torch.stack([b.task_rows.weight for b in ran]).sum(0)
        examples = torch.stack([b.task_rows.examples for b in ran]).sum(0)
        losses = [b.task_losses.cpu() for b in ran if b.task_losses is not None]
        loss = torch.stack(losses).sum(0) if len(losses) == len(ran) else None
        vanished = self._probes.grads_vanished()
        gradient = self._probes.take() / self._scale()
        if world_size(self._group) > 1:
            gradient, weight, examples, loss = self._reduce(gradient, weight, examples, loss)
        valid = torch.isfinite(gradient).all()
        if vanished is None:
            valid = torch.zeros_like(valid)
        else:
            valid = valid & ~vanished
        total, gram = sum_gram(gradient)
        due = self._step < GUARD_FIRST or self._step % GUARD_EVERY == 0
        if self._guard and due and bool(valid) and self._sum_guard(gradient, total, any(b.task_rows.half for b in ran)):
            gram = sum_gram(gradient)[1]
        if loss is not None:
            loss = (loss / weight)[:-1]
        weight = weight.to(gradient.device)
        reading = self._memory.read(gradient.double(), weight, self._theta)
        self._open = _Open(reading, gradient, gram, weight, examples[:-1], loss, valid)

    def _reduce(
        self, gradient: Tensor, weight: Tensor, examples: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Sums over ranks, gradients averaged as DistributedDataParallel does; what one rank left out, all leave out."""
        device = gradient.device
        out = torch.tensor([float(n in self._probes.reasons) for n in self._probes.probes], device=device)
        parts = [gradient, weight.to(device), examples.to(device), out]
        if loss is not None:
            parts.append(loss.to(device))
        gradient, weight, examples, out, *losses = all_reduce_flat(parts, self._group)
        for probe, dropped in zip(self._probes.probes.values(), out.tolist(), strict=True):
            if dropped:
                self._probes.drop(probe.name, "left out on another rank")
                gradient[:, probe.columns] = 0
                self._memory.forget_columns(probe.columns)
        self._probes.refresh()
        gradient /= world_size(self._group)
        return gradient, weight.cpu(), examples.cpu(), losses[0].cpu() if losses else None

    def _sum_guard(self, gradient: Tensor, total: Tensor, half: bool) -> bool:
        """Drop parameters whose tasks do not add up to ``param.grad``; True if there were any."""
        bad = gradients_disagree(self._probes.live(), gradient, total, half)
        for probe, reason in bad:
            self._probes.drop(probe.name, reason)
            gradient[:, probe.columns] = 0
            self._memory.forget_columns(probe.columns)
        self._probes.refresh()
        return bool(bad)

    def _close(self) -> None:
        """After the update: the parameters moved, the step enters the memory."""
        step, self._open = self._open, None
        before = self._theta
        self._theta, self._versions = self._probes.theta(), self._probes.versions()
        if self._step_probe is not None:
            self._step_probe.after = self._step_probe.measure()
            self._step_probe = None
        if step is None:
            return
        count = len(self.tasks)
        seen = (step.weight[:count] > 0) & step.valid
        self._step += int(step.valid)
        predicted = step.reading.memory @ (self._theta - before)
        had = self._memory.count > 0
        cosine, others_cosine = cosines(step.gram)
        self._memory.write(step.reading, seen, before, self._theta, self._step)
        reading = step.reading
        self._overwriting.add(reading.memory_dot, reading.own_effect, reading.others_effect, others_cosine, step.valid)
        if not bool(step.valid):
            self._report = self._invalid_report(step.examples, step.weight[:count].cpu())
            return
        if self._step == 1:
            self._probes.warn_of_gaps()
        last = self._memory.last_seen
        self._gradient = step.gradient
        fields = {
            "tokens": step.weight[:count],
            "gram": step.gram[:count, :count],
            "cosine": cosine,
            "others_cosine": others_cosine,
            "norm": reading.norm,
            "signal": reading.signal,
            "memory_dot": reading.memory_dot,
            "own_effect": reading.own_effect,
            "others_effect": reading.others_effect,
            "update_effect": reading.own_effect + reading.others_effect,
            "curvature": reading.curvature,
            "predicted_effect": torch.where(had, predicted, torch.nan),
            "steps_since_seen": torch.where(last >= 0, self._step - last, -1),
            **self._overwriting.read(),
        }
        self._report = StepReport(
            tasks=self.tasks,
            step=self._step,
            valid=True,
            examples=step.examples,
            loss=step.loss,
            _block=step.gradient[:count].double().cpu(),
            _maps=tuple(p.sketch.to(torch.device("cpu")) for p in self._probes.probes.values()),
            **{k: v.cpu() for k, v in fields.items()},
        )

    def _scale(self) -> float | Tensor:
        scale = self._loss_scale
        if isinstance(scale, GradScaler):
            inner: Tensor | None = scale._scale
            return 1.0 if inner is None or not scale.is_enabled() else inner.to(self._probes.device)
        return 1.0 if scale is None else scale

    # -- what it says ----------------------------------------------------------------------------------------------

    def report(self, wait: bool = False) -> StepReport:
        """The newest complete report; on a CPU that of the step just closed. ``wait`` waits for a GPU's newest step."""
        self._abandon_if_vanished()
        return self._invalid_report() if self._report is None else self._report

    def _invalid_report(self, examples: Tensor | None = None, weight: Tensor | None = None) -> StepReport:
        count = len(self.tasks)
        nan = torch.full((count,), torch.nan, dtype=torch.float64)
        square = nan[:, None].expand(count, count)
        last = self._memory.last_seen.cpu()
        vectors = (
            "others_cosine norm signal own_effect others_effect update_effect curvature predicted_effect overwrite "
            "overwrite_se pull own_pull gained undone retention retention_se others_cosine_mean others_cosine_std"
        ).split()
        return StepReport(
            tasks=self.tasks,
            step=self._step,
            valid=False,
            examples=torch.zeros(count, dtype=torch.int64) if examples is None else examples,
            tokens=torch.zeros(count, dtype=torch.float64) if weight is None else weight,
            loss=None,
            gram=square,
            cosine=square,
            memory_dot=nan[:, None].expand(count, count + 1),
            steps_since_seen=torch.where(last >= 0, self._step - last, -1),
            _block=square[:, :0],
            _maps=(),
            **dict.fromkeys(vectors, nan),
        )

    def task_gradients(self) -> dict[str, Tensor]:
        """Exact mode: every attributed parameter's gradient by task, [T + 1, *shape], of the last closed step; the last
        entry is rest. Raises RuntimeError in sketch mode, where they are never formed, and before the first step."""
        if self.mode != "exact":
            raise RuntimeError('task_gradients() needs mode="exact": a sketch never forms them')
        if self._gradient is None:
            raise RuntimeError("task_gradients() needs a closed step: call optimizer.step() first")
        grads = self._gradient
        return {p.name: grads[:, p.columns].unflatten(1, p.param.shape) for p in self._probes.live()}

    def coverage(self) -> Coverage:
        """Which parameters the numbers are about, and why the others are not."""
        self._drop_unattributed()
        return self._probes.coverage(self._verified)

    # -- guards ----------------------------------------------------------------------------------------------------

    def verify(self, *args: Any, **kwargs: Any) -> Coverage:
        """Check inside ``with tracker.batch(ids)`` that the rows of every layer are the rows of the batch.

        Called like the model, with inputs for it. Layers that fail are dropped and named by ``coverage()``, which is
        returned. Three or more forward passes without gradients; RNG, buffers and BatchNorm's mode are restored.
        """
        if self._active is None:
            raise RuntimeError("verify() needs the ids: call it inside `with tracker.batch(ids):`")
        self._verify_rows(args, kwargs)
        return self.coverage()

    def _verify_first(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self._verified or self._active is None or self.observer is not None:
            return
        if torch.is_grad_enabled() and not in_backward():
            self._verify_rows(args, kwargs)

    def _verify_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._active is not None
        failing = failing_sites(self.model, self, self._active.task_rows, args, kwargs)
        if failing is None:
            return
        self._verified = True
        for site in self._probes.sites:
            if site.name in failing and site.reason is None:
                site.reason = failing[site.name]
        self._drop_unattributed()

    def probe(self, loss: Callable[[], Tensor]) -> StepProbe:
        """Measure ``loss()``, say of a fixed batch by task, just before and just after the next optimizer step."""
        self._step_probe = StepProbe(self.model, loss)
        return self._step_probe

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Memory, windows and what they depend on; tensors and plain values only."""
        return {
            "version": 1,
            "tasks": list(self.tasks),
            "mode": self.mode,
            "sketch_dim": self.sketch_dim,
            "sketch_seed": SKETCH_SEED,
            "columns": {p.name: p.sketch.dim for p in self._probes.probes.values()},
            "left_out": dict(self._probes.reasons),
            "verified": self._verified,
            "step": self._step,
            "memory": self._memory.state_dict(),
            "windows": self._overwriting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; raises ValueError if it is of other tasks, another mode or another model."""
        mine = self.state_dict()
        for key in ("version", "tasks", "mode", "sketch_dim", "sketch_seed", "columns"):
            if state[key] != mine[key]:
                raise ValueError(f"state_dict has {key} = {state[key]!r}, this tracker has {mine[key]!r}")
        for name, reason in state["left_out"].items():
            self._probes.drop(name, reason)
        self._probes.refresh()
        self._verified, self._step = state["verified"], state["step"]
        self._memory.load_state_dict(state["memory"])
        self._overwriting.load_state_dict(state["windows"])
        self._theta, self._versions = self._probes.theta(), self._probes.versions()
        self._report = None

    def remove(self) -> None:
        """Take every hook and patch off the model and the optimizers. The tracker keeps its last report."""
        self._probes.remove()
        if self._hooks is not None:
            self._hooks.remove()
        if self._verify_hook is not None:
            self._verify_hook.remove()
        self._pending.clear()
        self._probes.discard()


def track(
    model: nn.Module,
    tasks: Sequence[str],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    mode: Literal["sketch", "exact"] = "sketch",
    sketch_dim: int = 1024,
    memory_decay: float = 0.9,
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
        mode: "sketch", cost about flat in T, T · ``sketch_dim`` numbers per parameter; "exact", the T full gradients:
            (T + 1) · P numbers for the taps, T · P for the memory and 2 · T · P float64 for the effects, P parameters.
        sketch_dim: numbers per parameter in sketch mode; smaller parameters are kept exactly.
        memory_decay: decay of the memory per appearance of a task, in [0, 1).
        loss_scale: the GradScaler (or a scalar tensor) the loss is multiplied with.
        verify: check the rows of every layer on the first tracked batch, and on some steps that the tasks' gradients
            add up to ``param.grad``.
        process_group: the ranks whose gradients are averaged (DistributedDataParallel); ``None`` for the default group.
        include: ``include(name, module)`` says whether a module is tracked.

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
    if mode == "exact":
        _check_memory(trainable, len(tasks))
    if world_size(process_group) > 1 and mode == "exact":
        raise ValueError('mode="exact" works on one rank: its gradients are too large to sum; use mode="sketch"')
    if any(isinstance(p, DTensor) for p in trainable):
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
    )


def _check_memory(params: Sequence[nn.Parameter], tasks: int) -> None:
    size = sum(math.prod(p.shape) * ((2 * tasks + 1) * p.element_size() + 2 * tasks * 8) for p in params)
    if size > EXACT_LIMIT:
        raise ValueError(
            f'mode="exact" would hold {size / 2**30:.1f} GiB for {tasks} tasks, more than {EXACT_LIMIT >> 30}; '
            'use mode="sketch"'
        )
