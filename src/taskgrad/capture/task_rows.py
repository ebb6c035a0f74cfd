"""Task ids of a batch, as the kernels want them: rows sorted by task, with the offsets of every task."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


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
                self.wrong = self.wrong | ~(torch.isfinite(weight) & (weight >= 0)).all().to(ids.device)
        segment = torch.where((ids < 0) | (ids >= num_tasks), num_tasks, ids).reshape(-1)
        by_task, order = torch.sort(segment, stable=True)
        offsets = torch.searchsorted(by_task, torch.arange(num_tasks + 2, device=ids.device))
        counts = offsets.diff()
        is_sorted = ids.device.type == "cpu" and torch.equal(by_task, segment)
        self.order = None if is_sorted else order.to(device, non_blocking=True)
        self.ids_offsets = offsets
        self.offsets = offsets.to(device, non_blocking=True)
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
            self.weight = held.double() @ weight.detach().to(ids.device).double().reshape(-1)
        if weight_total is None:
            self.total = self.weight.sum()
        else:
            self.total = torch.as_tensor(weight_total, dtype=torch.float64, device=ids.device).detach()
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

    @property
    def counts(self) -> npt.NDArray[np.int64] | None:
        """Rows by task, int64 [T]; ``None`` for ids per token, on a GPU, or where a row has none."""
        if len(self.shape) != 1 or self.ids_offsets.device.type != "cpu":
            return None
        by_task: npt.NDArray[np.int64] = self.ids_offsets.diff().numpy()
        return None if by_task[-1] else by_task[:-1]

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
