"""Which rows a layer that is called now works on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..capture.accumulation import in_backward
from ..capture.shared_row import make_plain
from ..capture.site import Site
from ..capture.task_rows import Rows, sent
from ..ops.segment_sum import segment_sum

PASSED = 4096  # batches of a step that is not measured whose losses are remembered until it closes


class Batch:
    """Context of one forward pass: ``with tracker.batch(ids) as b``.

    Attributes:
        ids: the task of every row.
        task_rows: whose row is whose; sorted when it is first asked for, in a step that is measured.
        examples: float64 [T + 1], how many hold the task; NaN for ids (1, S), the tokens of several examples.
        mass: float64 [T + 1], the share of each task's rows in the loss, 1 in all for a mean over the batch.
        entered: the same times what the task's losses were multiplied with; 1 for rest.
        task_losses: [T + 1], the rows' losses times their shares, summed by task; ``None`` without ``losses``.
        advance: whether it is one more batch of the loader, rather than a further one on the same.
        trained: it turned out to be no evaluation.
        awaited: its losses are part of a graph that no backward pass has run through yet.
    """

    def __init__(
        self,
        ids: Tensor,
        weight: Tensor | None,
        loss_weight: Tensor | None,
        advance: bool,
        sort: Callable[[], Rows],
        enter: Callable[[Batch], None],
        leave: Callable[[Batch, bool], None],
        ran: Callable[[Batch], None],
    ) -> None:
        self.ids = ids
        self.task_losses: Tensor | None = None
        self.measured = True  # and its step
        self.graded = True  # entered with gradients on
        self.advance = advance  # and not counted yet
        self.trained = self.awaited = False
        self._weight, self._loss_weight = weight, loss_weight
        self._sort, self._enter, self._leave, self._ran = sort, enter, leave, ran

    @cached_property
    def task_rows(self) -> Rows:
        return self._sort()

    @property
    def examples(self) -> Tensor:
        counts = self.task_rows.examples.double()
        shape = self.task_rows.shape
        return torch.full_like(counts, torch.nan) if len(shape) == 2 and shape[0] == 1 else counts

    @cached_property
    def mass(self) -> Tensor:
        rows = self.task_rows
        return torch.where(rows.weight > 0, rows.weight / rows.total, 0.0)

    @property
    def entered(self) -> Tensor:
        if self._loss_weight is None:
            return self.mass
        return torch.cat([self.mass[:-1] * sent(self._loss_weight, self.mass.device), self.mass[-1:]])

    def backward(self) -> None:
        """A backward pass has run through the batch."""
        self._ran(self)

    def losses(self, per_row: Tensor) -> None:
        """Enter the loss of every row, in the shape of the ids, not multiplied by any ``loss_weight``; fills
        ``StepReport.loss``.

        Raises:
            TypeError: not a floating tensor.
            ValueError: of another shape than the ids.
        """
        if not isinstance(per_row, Tensor) or not per_row.is_floating_point():
            got = per_row.dtype if isinstance(per_row, Tensor) else type(per_row).__name__
            raise TypeError(f"per_row must be a floating tensor, one loss per row, got {got}")
        if per_row.shape != self.ids.shape:
            shape, given = tuple(self.ids.shape), tuple(per_row.shape)
            if given[: len(shape)] == shape:
                hint = "several losses per row cannot be split by task: a row has one id; sum them, or repeat the row"
            else:
                hint = 'most losses give one value per row with reduction="none"'
            raise ValueError(f"per_row must have the shape of ids, {shape}, got {given}; {hint}")
        values = per_row.detach().double().reshape(-1)
        if self._weight is not None:
            values = values * sent(self._weight.reshape(-1), values.device).to(values.dtype)
        order = self.task_rows.order
        order = None if order is None else sent(order, values.device)
        offsets = sent(self.task_rows.offsets, values.device)
        sums = segment_sum(values, order, offsets)
        self.task_losses = sums / sent(self.task_rows.total, sums.device)
        if not self.measured and per_row.requires_grad:
            self.awaited = True
            per_row.register_hook(self._arrived)

    def _arrived(self, gradient: Tensor) -> None:
        self.awaited = False

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
        self.open: Batch | None = None
        self.active: Batch | None = None  # the same in a step that is measured
        self.pending: list[Batch] = []
        self.passed: deque[Batch] = deque(maxlen=PASSED)  # of a step that is not measured
        self.entered = 0  # with gradients on, since the last step
        self._regrouped: Rows | None = None
        self._recomputing: Batch | None = None

    def enter(self, batch: Batch, measured: bool) -> None:
        self.open = batch
        batch.graded = torch.is_grad_enabled()
        self.entered += batch.graded
        batch.measured = measured
        if not measured:
            if batch.graded:
                self.passed.append(batch)
            return
        self.active = batch
        batch.task_rows.listen(batch.backward)
        self.pending.append(batch)

    def leave(self, batch: Batch, failed: bool) -> None:
        self.open = None
        if self.active is None:
            if failed:  # a step may have closed inside of it
                self.passed = deque((b for b in self.passed if b is not batch), PASSED)
            return
        self.active = None
        make_plain(batch.task_rows.shared)
        batch.task_rows.release()
        if not batch.task_rows.backward and (failed or not batch.graded):
            self.pending.remove(batch)
        # what no backward pass can reach any more; of those that only a recomputation could, the last
        dead = [b for b in self.pending if not (b.task_rows.backward or b.task_rows.waiting)]
        kept = next((b for b in reversed(dead) if b.task_rows.hidden), None)
        if dead:
            gone = {id(b) for b in dead if b is not kept}
            self.pending = [b for b in self.pending if id(b) not in gone]

    @property
    def regrouped(self) -> bool:
        return self._regrouped is not None

    @property
    def examples(self) -> int:
        """Entries of the first dimension of the batch whose forward runs now; 0 without one."""
        return 0 if self.active is None else self.active.task_rows.shape[0]

    def current_rows(self) -> Rows | None:
        """The rows a layer called now works on; ``None``: not tracked."""
        if not torch.is_grad_enabled():
            if self.active is not None and not torch.compiler.is_compiling():
                self.active.task_rows.hidden = True
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
        if not waiting:
            waiting = [b for b in self.pending if b.task_rows.hidden and not b.task_rows.backward]
            if len(waiting) > 1:
                return None  # the gradients then have no statistics, and the step says so
        if waiting and waiting[0] is not self._recomputing:
            # reentrant checkpointing runs passes inside the pass: after the first the batch no longer waits
            self._recomputing = waiting[0]
            torch.autograd.Variable._execution_engine.queue_callback(self._recomputed_all)
        return None if self._recomputing is None else self._recomputing.task_rows

    def _recomputed_all(self) -> None:
        self._recomputing = None

    @contextmanager
    def regroup(self, make: Callable[[], Rows]) -> Iterator[None]:
        """Layers called inside work on other rows of the current batch (gathered, as in a mixture of experts)."""
        current = self.current_rows()
        if current is None and self.observer is None:
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
                current.fitted |= regrouped.fitted
                current.shared += regrouped.shared
