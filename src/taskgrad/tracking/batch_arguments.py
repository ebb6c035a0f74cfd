"""What a user passes to ``tracker.batch``, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_batch(
    ids: Tensor, weight: Tensor | None, weight_total: float | Tensor | None, loss_weight: Any, num_tasks: int
) -> Tensor | None:
    """Raise TypeError or ValueError for what ``batch`` cannot take; ``loss_weight`` as float64 [T] on the CPU, or
    ``None``."""
    check_ids(ids, num_tasks)
    if ids.numel() == 0:
        raise ValueError(f"ids must not be empty, got shape {tuple(ids.shape)}")
    if weight is not None:
        check_weight(weight, ids)
    if weight_total is not None:
        check_weight_total(weight_total)
    return None if loss_weight is None else check_loss_weight(loss_weight, num_tasks)


def check_ids(ids: Tensor, num_tasks: int) -> None:
    """Raise TypeError or ValueError unless ``ids`` is int64, (B,) or (B, S), with values in [-1, num_tasks); the values
    only where they are on the CPU."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, got {type(ids).__name__}; torch.as_tensor(ids) makes one")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}; use ids.long()")
    if ids.dim() not in (1, 2):
        raise ValueError(
            f"ids must have shape (B,), one id per example, or (B, S), one per token, got {tuple(ids.shape)}"
        )
    if ids.numel() == 0 or ids.device.type != "cpu":
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= num_tasks:
        raise ValueError(f"{ids_range(num_tasks)}, got values from {low} to {high}")


def ids_range(num_tasks: int) -> str:
    """What the values of ids must be, for messages."""
    return f"ids must lie in [-1, {num_tasks}) for {num_tasks} tasks (-1: belongs to no task)"


def check_weight(weight: Tensor, ids: Tensor) -> None:
    """Raise unless ``weight`` is a tensor of the ids' shape with finite values >= 0; the values only where the ids are
    on the CPU."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.shape != ids.shape:
        raise ValueError(f"weight must have the shape of ids, {tuple(ids.shape)}, got {tuple(weight.shape)}")
    if ids.device.type == "cpu" and not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError("weight must be finite and not negative: it is the weight of each row in the loss mean")


def check_weight_total(total: Any) -> None:
    """Raise unless ``total`` is a number or a scalar tensor; its value, > 0 and finite, where it is on the CPU."""
    if isinstance(total, bool) or not isinstance(total, int | float | Tensor):
        raise TypeError(f"weight_total must be a number or a scalar tensor, got {type(total).__name__}")
    if isinstance(total, Tensor):
        if total.numel() != 1:
            raise ValueError(f"weight_total must be one number, got a tensor of shape {tuple(total.shape)}")
        if total.device.type != "cpu":
            return
    if not 0 < float(total) < float("inf"):
        raise ValueError(
            f"weight_total must be finite and positive, got {float(total)}: it is what the loss of the whole step is "
            "divided by (transformers' num_items_in_batch)"
        )


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
