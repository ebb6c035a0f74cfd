"""Task ids of a batch, as the kernels want them: rows sorted by task, with the offsets of every task."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


def counts_by_task(ids: Tensor, num_tasks: int) -> npt.NDArray[np.int64] | None:
    """Rows by task, int64 [T]; ``None`` for ids per token, on a GPU, or where a row has none."""
    if ids.dim() != 1 or not ids.is_cpu:
        return None
    counts: npt.NDArray[np.int64] = np.bincount(ids.detach().numpy() + 1, minlength=num_tasks + 1)
    return None if counts[0] else counts[1:]


def sorted_by_task(segment: Tensor, num_tasks: int) -> tuple[Tensor | None, Tensor]:
    """Positions of ``segment`` [E] (0 to T) sorted by task, int64 [E], rows of a task in their order, and the offsets
    of every task and of rest, int64 [T + 2]. On a CPU the positions are ``None`` where all is sorted."""
    tasks = torch.arange(num_tasks + 2, device=segment.device)
    if not segment.is_cpu:
        by_task, order = torch.sort(segment, stable=True)
        return order, torch.searchsorted(by_task, tasks)
    # of up to 16 bits NumPy sorts by radix, in a fifth of the time
    small = segment.numpy().astype(np.min_scalar_type(num_tasks))
    if bool((small[1:] >= small[:-1]).all()):
        return None, torch.searchsorted(segment, tasks)
    sizes = np.bincount(small, minlength=num_tasks + 1)
    offsets = torch.from_numpy(np.concatenate(([0], sizes.cumsum())))
    return torch.from_numpy(np.argsort(small, kind="stable")), offsets


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device. To a GPU nothing waits: the copy is from page-locked memory, as no other can be in the
    background. From a GPU to the CPU it waits: the values are read at once."""
    if device.type == "cpu" or x.device == device:
        return x.to(device)
    return (x.pin_memory() if device.type == "cuda" and x.is_cpu else x).to(device, non_blocking=True)


class Rows:
    """Which rows of a batch belong to which task. Row T (the last segment) is "rest": rows of no task.

    Ids on the CPU are checked and counted there. Ids on a GPU stay there and nothing waits for their values: those out
    of range count as rest and set a flag, which the report of the step raises for.

    Attributes:
        shape: shape of the ids, (B,) or (B, S); an input is attributed where its leading dimensions equal it.
        entries: E, the number of ids.
        order: int64 [E] on the parameters' device: positions sorted by task; ``None`` if they are known to be sorted.
        offsets: int64 [T + 2] on the parameters' device; task t owns ``order[offsets[t]:offsets[t + 1]]``.
        ids_offsets: the same where the ids are, for what must be known on the host: there at once for ids on the CPU.
        examples: int64 [T + 1], how many examples (entries of the first dimension) hold the task.
        weight: float64 [T + 1], summed weights of the rows of the task.
        total: float64 scalar, what the loss divides the weighted sum of its rows by.
        wrong: scalar bool on the GPU: ids or weights that are none; ``None`` where they were checked.
        backward: number of the last backward pass that ran through this batch; 0 before the first.
        receipt: scalar leaf that every captured layer takes as an input; its gradient arriving tells of the pass.
        half: a captured layer ran in bfloat16 or float16.
        fitted: some captured layer had rows of these ids.
        shared: rows [1, ...] that all examples share, while the batch is open.
        hidden: a tracked layer was called without gradients, as under reentrant checkpointing, which runs it again.
    """

    def __init__(
        self,
        ids: Tensor,
        num_tasks: int,
        device: torch.device,
        weight: Tensor | None = None,
        weight_total: float | Tensor | None = None,
    ) -> None:
        ids = ids.detach()
        self.shape = tuple(ids.shape)
        self.entries = ids.numel()
        self.wrong: Tensor | None = None
        if ids.device.type != "cpu":
            self.wrong = ((ids < -1) | (ids >= num_tasks)).any()
            if weight is not None:
                self.wrong = self.wrong | ~sent((torch.isfinite(weight) & (weight >= 0)).all(), ids.device)
        segment = torch.where((ids < 0) | (ids >= num_tasks), num_tasks, ids).reshape(-1)
        order, offsets = sorted_by_task(segment, num_tasks)
        counts = offsets.diff()
        self.order = None if order is None else sent(order, device)
        self.ids_offsets = offsets
        self.offsets = sent(offsets, device)
        if ids.dim() == 1:
            self.examples = counts
        else:
            held = torch.zeros(ids.shape[0], num_tasks + 1, dtype=torch.int64, device=ids.device)
            self.examples = held.scatter_(1, segment.view(ids.shape), 1).sum(0)
        if weight is None:
            self.weight = counts.double()
        else:
            # not bincount: with weights its order of additions is left to chance on a GPU
            held = segment == torch.arange(num_tasks + 1, device=ids.device)[:, None]
            self.weight = held.double() @ sent(weight.detach(), ids.device).double().reshape(-1)
        if weight_total is None:
            self.total = self.weight.sum()
        elif isinstance(weight_total, Tensor):
            self.total = sent(weight_total.detach(), ids.device).double()
        else:
            self.total = torch.full((), weight_total, dtype=torch.float64, device=ids.device)
        self.backward = 0
        self.half = False
        self.fitted = False
        self.shared: list[Tensor] = []
        self.hidden = False
        self._receipt: Tensor | None = torch.zeros((), device=device, requires_grad=True)
        self._weak = TensorWeakRef(self._receipt)
        self._listener: weakref.WeakMethod[Callable[[], None]] | None = None

    def listen(self, ran: Callable[[], None]) -> None:
        """Have the method ``ran`` called when a backward pass has run through the batch. The graph keeps its object
        alive, these rows do not."""
        self._listener = weakref.WeakMethod(ran)
        self.receipt.register_post_accumulate_grad_hook(lambda _: ran())

    @property
    def receipt(self) -> Tensor:
        """The leaf, also for a layer that is run again in the backward pass."""
        receipt = self._weak() if self._receipt is None else self._receipt
        if receipt is None:  # nothing but what is run again holds it
            receipt = self._receipt = torch.zeros((), device=self.offsets.device, requires_grad=True)
            ran = None if self._listener is None else self._listener()
            if ran is not None:
                self.listen(ran)
        return receipt

    def share_receipt(self, other: Rows) -> None:
        """Other rows of the same batch: a backward pass through them is one through the batch."""
        self._receipt = other.receipt

    def release(self) -> None:
        """The forward is over: from now on only the graph holds the receipt."""
        self._receipt = None

    @property
    def waiting(self) -> bool:
        """Whether a graph that has not been run backward still exists."""
        return not self.backward and self._weak() is not None

    def match(self, x: Tensor, feature_dims: int = 1) -> bool:
        """Whether the leading dimensions of ``x`` are those of the ids, with ``feature_dims`` more at least."""
        n = len(self.shape)
        return x.dim() >= n + feature_dims and equal_sizes(x.shape[:n], self.shape)


def equal_sizes(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are the same; under ``torch.compile`` a size that depends on data equals none."""
    if len(a) != len(b):
        return False
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return all(guard_or_false(x == y) for x, y in zip(a, b, strict=True))
    return tuple(a) == tuple(b)
