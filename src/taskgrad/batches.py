"""Which rows a layer that is called now works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .capture.site import Site
from .closing import in_backward
from .ops.segment_sum import segment_sum
from .rows import Rows


class Batch:
    """Context of one forward pass: ``with tracker.batch(ids) as b``."""

    def __init__(
        self,
        task_rows: Rows,
        weight: Tensor | None,
        enter: Callable[[Batch], None],
        leave: Callable[[Batch, bool], None],
    ) -> None:
        self.task_rows = task_rows
        self.task_losses: Tensor | None = None
        self.kept: Tensor | None = None  # a flag on the GPU: its gradients were not zeroed before the step
        self._weight, self._enter, self._leave = weight, enter, leave

    def losses(self, per_row: Tensor) -> None:
        """Enter the loss of every row, in the shape of the ids, not multiplied by any ``loss_weight``; fills
        ``StepReport.loss``."""
        if tuple(per_row.shape) != self.task_rows.shape:
            raise ValueError(f"per_row must have the shape of ids, {self.task_rows.shape}, got {tuple(per_row.shape)}")
        values = per_row.detach().double().reshape(-1)
        if self._weight is not None:
            values = values * self._weight.reshape(-1).to(values)
        order = self.task_rows.order
        order = None if order is None else order.to(values.device, non_blocking=True)
        offsets = self.task_rows.offsets.to(values.device, non_blocking=True)
        self.task_losses = segment_sum(values, order, offsets)

    def __enter__(self) -> Batch:
        self._enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(self, kind is not None)


class Batches:
    """The batches of the step so far, and the one whose forward runs now. What the sites ask
    (``capture.site.Owner``)."""

    def __init__(self) -> None:
        self.observer: Callable[[Site, tuple[Any, ...], dict[str, Any]], None] | None = None
        self.active: Batch | None = None
        self.pending: list[Batch] = []
        self._regrouped: Rows | None = None

    def enter(self, batch: Batch) -> None:
        self.active = batch
        self.pending.append(batch)

    def leave(self, batch: Batch, failed: bool) -> None:
        self.active = None
        batch.task_rows.release()
        if failed and not batch.task_rows.ran:
            self.pending.remove(batch)

    @property
    def regrouped(self) -> bool:
        return self._regrouped is not None

    def current_rows(self) -> Rows | None:
        """The rows a layer called now works on; ``None``: not tracked."""
        if not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling() or not in_backward():
            if self.active is None:
                return None
            return self.active.task_rows if self._regrouped is None else self._regrouped
        return self._recomputed() if self._regrouped is None else self._regrouped

    def _recomputed(self) -> Rows | None:
        """Rows of a layer that activation checkpointing runs again inside the backward pass."""
        waiting = [b for b in self.pending if b.task_rows.waiting]
        if len(waiting) > 1:
            raise RuntimeError(
                "activation checkpointing recomputes a layer while several batches wait for their backward pass, so "
                "its rows cannot be told apart; call backward() for each tracker.batch() before the next one"
            )
        return waiting[0].task_rows if waiting else None

    @contextmanager
    def regroup(self, make: Callable[[], Rows]) -> Iterator[None]:
        """Layers called inside work on other rows of the current batch (gathered, as in a mixture of experts)."""
        tracing = self.observer is not None
        current = None if tracing else self.current_rows()
        if current is None and not tracing:
            yield
            return
        regrouped = make()
        if current is not None:
            regrouped.share_receipt(current)
        before, self._regrouped = self._regrouped, regrouped
        try:
            yield
        finally:
            self._regrouped = before
            if current is not None:
                current.half |= regrouped.half
