"""Which steps are measured: one in ``every``, and those that hold a task which the others have missed for too long."""

from __future__ import annotations

import torch
from torch import Tensor


class Schedule:
    """Decides at the first batch of a step that trains, for all batches of it.

    Args:
        every: a step is measured whose number, from 0, is a multiple of it.
        max_unmeasured: so is one whose first batch holds a task that was in this many steps since it was last measured;
            ``None``: no such step.

    Attributes:
        unmeasured: int64 [T], in how many steps each task was since one with it was measured; counted only with
            ``max_unmeasured``.
        last: the number, from 1, of the last step that was not measured; 0 before one was.
    """

    def __init__(self, every: int, max_unmeasured: int | None, num_tasks: int) -> None:
        self.every, self.max_unmeasured = every, max_unmeasured
        self.unmeasured = torch.zeros(num_tasks, dtype=torch.int64, device="cpu")
        self.last = 0
        self._measured: bool | None = None  # the step under way, once that is decided
        self._before: tuple[bool | None, Tensor] | None = None  # the last batch: that, and who was present
        self._present = torch.zeros(num_tasks, dtype=torch.bool, device="cpu")

    def resume(self, unmeasured: Tensor, last: int) -> None:
        """Go on from what was saved."""
        self.unmeasured, self.last = unmeasured, last
        self.begin_anew()

    def measures(self, count: int) -> bool:
        """Whether the step after ``count`` others is measured, as far as is known by now."""
        return count % self.every == 0 if self._measured is None else self._measured

    def enter(self, ids: Tensor, count: int) -> bool:
        """A batch that trains, in the step after ``count`` others; whether that is measured.

        Raises ValueError for ids on another device than the CPU where their tasks are to be counted.
        """
        if self.max_unmeasured is None or self.every == 1:
            return self.measures(count)
        if not ids.is_cpu:
            raise ValueError(
                f"ids must be on the CPU with max_unmeasured, got {ids.device}: they say which steps are measured"
            )
        self._before = self._measured, self._present
        present = torch.bincount(ids.reshape(-1) + 1, minlength=len(self.unmeasured) + 1)[1:] > 0
        if self._measured is None:
            missed = bool((present & (self.unmeasured >= self.max_unmeasured)).any())
            self._measured = count % self.every == 0 or missed
        self._present = self._present | present
        return self._measured

    def take_back(self) -> None:
        """The last batch was none that trains."""
        if self._before is not None:
            (self._measured, self._present), self._before = self._before, None

    def begin_anew(self) -> None:
        """The step under way did not come, or is over: the next batch decides again."""
        self._measured = self._before = None
        self._present = torch.zeros_like(self._present)

    def close(self, number: int, measured: bool) -> None:
        """The step with this number, from 1, is over."""
        if not measured:
            self.last = number
        self.unmeasured = torch.where(self._present, 0 if measured else self.unmeasured + 1, self.unmeasured)
        self.begin_anew()
