"""Task ids of a batch, as the kernels want them: rows sorted by task, with the offsets of every task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


class Rows:
    """Which rows of a batch belong to which task. Row T (the last segment) is "rest": rows of no task.

    Attributes:
        shape: shape of the ids, (B,) or (B, S); an input is attributed where its leading dimensions equal it.
        order: int64 [E], E = number of ids: positions sorted by task; ``None`` if the ids are sorted already.
        offsets: int64 [T + 2] on the CPU; task t owns ``order[offsets[t]:offsets[t + 1]]``.
        examples: int64 [T + 1], how many examples (entries of the first dimension) hold the task.
        weight: float64 [T + 1], summed weights of the rows of the task.
        entered: float64 [T + 1], the same times what the task's losses were multiplied with; 1 for rest.
        ran: a backward pass ran through this batch.
        receipt: scalar leaf that every captured layer takes as an input; its gradient arriving is how ``ran`` is known.
        half: a captured layer ran in bfloat16 or float16.
    """

    def __init__(
        self,
        ids: Tensor,
        num_tasks: int,
        device: torch.device,
        weight: Tensor | None = None,
        loss_weight: Tensor | None = None,
    ) -> None:
        check_ids(ids, num_tasks)
        host = ids.detach().cpu()
        self.shape = tuple(ids.shape)
        self.device = device
        segment = torch.where(host < 0, num_tasks, host).reshape(-1)
        counts = torch.bincount(segment, minlength=num_tasks + 1)
        self.offsets = torch.zeros(num_tasks + 2, dtype=torch.int64)
        torch.cumsum(counts, 0, out=self.offsets[1:])
        if bool((segment[1:] >= segment[:-1]).all()):
            self.order: Tensor | None = None
        else:
            self.order = torch.argsort(segment, stable=True).to(device, non_blocking=True)
        if ids.dim() == 1:
            self.examples = counts
        else:
            held = torch.zeros(ids.shape[0], num_tasks + 1, dtype=torch.int64)
            self.examples = held.scatter_(1, segment.view(ids.shape), 1).sum(0)
        self.segment = segment
        if weight is None:
            self.weight = counts.double()
        else:
            check_weight(weight, self.shape)
            flat = weight.detach().cpu().double().reshape(-1)
            self.weight = torch.bincount(segment, weights=flat, minlength=num_tasks + 1)
        if loss_weight is None:
            self.entered = self.weight
        else:
            self.entered = torch.cat([self.weight[:-1] * loss_weight, self.weight[-1:]])
        self.ran = False
        self.half = False
        self._receipt: Tensor | None = torch.zeros((), device=device, requires_grad=True)
        self._weak = TensorWeakRef(self._receipt)
        self._receipt.register_post_accumulate_grad_hook(self._received)

    def _received(self, _: Tensor) -> None:
        self.ran = True

    @property
    def receipt(self) -> Tensor:
        """The leaf, also for a layer that is run again in the backward pass."""
        receipt = self._weak() if self._receipt is None else self._receipt
        assert receipt is not None
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
        return not self.ran and self._weak() is not None

    def match(self, x: Tensor, feature_dims: int = 1) -> bool:
        """Whether the leading dimensions of ``x`` are those of the ids, with ``feature_dims`` more at least."""
        n = len(self.shape)
        return x.dim() >= n + feature_dims and tuple(x.shape[:n]) == self.shape


def check_ids(ids: Tensor, num_tasks: int) -> None:
    """Raise TypeError or ValueError unless ``ids`` is int64, (B,) or (B, S), with values in [-1, num_tasks)."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, got {type(ids).__name__}; torch.as_tensor(ids) makes one")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}; use ids.long()")
    if ids.dim() not in (1, 2):
        raise ValueError(
            f"ids must have shape (B,), one id per example, or (B, S), one per token, got {tuple(ids.shape)}"
        )
    if ids.numel() == 0:
        raise ValueError(f"ids must not be empty, got shape {tuple(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= num_tasks:
        raise ValueError(
            f"ids must lie in [-1, {num_tasks}) for {num_tasks} tasks (-1: belongs to no task), "
            f"got values from {low} to {high}"
        )


def check_weight(weight: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``weight`` is a tensor of the ids' shape with finite values >= 0."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if tuple(weight.shape) != shape:
        raise ValueError(f"weight must have the shape of ids, {shape}, got {tuple(weight.shape)}")
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError("weight must be finite and not negative: it is the weight of each row in the loss mean")


def check_loss_weight(loss_weight: Any, num_tasks: int) -> Tensor:
    """``loss_weight`` as float64 [T] on the CPU; raises ValueError unless it holds a finite factor > 0 per task."""
    factors = torch.as_tensor(loss_weight, dtype=torch.float64).detach().cpu()
    if tuple(factors.shape) != (num_tasks,):
        raise ValueError(
            f"loss_weight must hold one factor per task, shape ({num_tasks},), got {tuple(factors.shape)}; the rows' "
            "losses are multiplied with loss_weight[ids] outside of the tracker"
        )
    if not bool((torch.isfinite(factors) & (factors > 0)).all()):
        raise ValueError(f"loss_weight must be finite and positive, got {factors.tolist()}")
    return factors
