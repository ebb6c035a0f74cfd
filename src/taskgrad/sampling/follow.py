"""What a tracker tells the sampler that follows it: batches trained on, and the reports of closed steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .arrays import IntArray
from .decisions import Decisions
from .loading.stream import Stream


class Delivery(Protocol):
    """A report on its way from the device."""

    @property
    def arrived(self) -> bool: ...

    @property
    def report(self) -> Any:
        """The report; waits for it."""


@dataclass(frozen=True)
class _Closed:
    """A closed step: ``batch`` is the last one counted before, ``drawn`` how many were drawn by then."""

    delivery: Delivery
    batch: int
    drawn: int
    lr: Callable[[], float | None]


class Following:
    """Hands every report to the policy, in order and each once, as soon as it has arrived.

    What the policy decides depends on the order alone, so nothing waits for a device but a draw whose batch a report is
    to decide about.
    """

    def __init__(self, stream: Stream, decisions: Decisions, task_ids: Callable[[int], IntArray]) -> None:
        self.tracker: Any = None
        self._stream, self._decisions, self._task_ids = stream, decisions, task_ids
        self._queue: deque[_Closed | dict[str, float]] = deque()

    def counted(self, examples: IntArray | None) -> None:
        """The training loop is through with a batch that has so many rows of each task, [T], where that is known."""
        stream = self._stream
        with stream.lock:
            if not stream.may_count():
                return
            if examples is not None and stream.looks_closer():
                drawn = np.bincount(self._task_ids(stream.consumed), minlength=len(examples))
                if drawn.sum() == examples.sum():  # else the loop makes batches of its own
                    stream.compare(np.array_equal(drawn, examples))
            stream.count(stream.consumed)

    def closed(self, delivery: Delivery, lr: Callable[[], float | None], inside: bool) -> None:
        """A step has closed: on the batch counted last, or ``inside`` the one that will be counted next."""
        stream = self._stream
        with stream.lock:
            inside = inside and stream.consumed < stream.drawn
            batch = stream.consumed - 1 + inside
            fresh = batch >= stream.most if inside else stream.fresh
            if self._decisions.policy.adaptive and fresh:
                self._queue.append(_Closed(delivery, batch, stream.drawn, lr))
                self.hand_over()
            self._decisions.settle(stream, self.hand_over)

    def observe(self, losses: dict[str, float]) -> None:
        """Evaluation losses, for the reports that come after them."""
        with self._stream.lock:
            self._queue.append(losses)
            self.hand_over()

    def hand_over(self, batch: int = -1) -> None:
        """Hand over what has arrived, and wait for the reports on batches up to ``batch``. Where ranks have to agree,
        only those, since what has arrived is not the same on all."""
        alone = self._decisions.agreement is None
        while self._queue:
            head = self._queue[0]
            if isinstance(head, _Closed):
                if head.batch > batch and not (alone and head.delivery.arrived):
                    return
                self._queue.popleft()
                self._decisions.decide(head.delivery.report, head.batch, head.lr(), self._stream, head.drawn)
            else:
                self._queue.popleft()
                self._decisions.observe(head)

    def flush(self) -> None:
        """Wait for all reports of closed steps."""
        self.hand_over(self._stream.consumed)

    def restart(self) -> None:
        """A state was loaded: reports of before are not of its run."""
        self._queue.clear()

    def lost(self, replaced: bool) -> None:
        """The tracker was removed, or another sampler follows it instead (``replaced``)."""
        self.tracker = None
        self._stream.stop_counting()
        if replaced:
            self._stream.told.say("replaced")
