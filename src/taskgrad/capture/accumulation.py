"""What the taps hold is what ``param.grad`` holds, whoever zeroes, replaces or writes it, and whenever.

Hooks see every gradient just before it is added to ``param.grad`` (or to a tap). The first of a backward pass looks at
all gradients as they were left: one that is gone or zero takes its statistics with it, one that is no longer what the
last pass left (another tensor, or another version of it) is marked to be read at the step. At the end of a pass
identity and version of every gradient are noted. Nothing here reads a gradient that nobody touched.

In a pass that is checked, what arrives at a parameter is compared with what arrives at its tap, before anybody can clip
or average it: a difference is a use of the parameter that no tracked module sees.

Passes are numbered from 1 over the life of a tracker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

if TYPE_CHECKING:
    from .base import Gauge


@dataclass
class Held:
    """Of which backward passes a parameter's gradient and its statistics are.

    Attributes:
        param_pass, tap_pass: the last pass that added to the gradient, and to the statistics.
        noted_pass: the last pass after which the gradient was looked at.
        first: the first pass whose statistics are held.
        gone: what was added up to this pass is no longer in the gradient.
        foreign: a pass added to the gradient and nothing to the statistics.
        written: the gradient was written by others than backward passes.
    """

    param_pass: int = 0
    tap_pass: int = 0
    noted_pass: int = 0
    first: int = 0
    gone: int = 0
    foreign: bool = False
    written: bool = False
    left: TensorWeakRef | None = None  # the gradient as the last pass left it
    version: int = -1
    before: Tensor | None = None  # the gradient that the pass now running adds to
    expected: int = -1  # the version that the pass will leave

    @property
    def in_flight(self) -> bool:
        """The pass that adds to it has not ended."""
        return max(self.param_pass, self.tap_pass) > self.noted_pass

    def expect(self, grad: Tensor | None, added: Tensor) -> None:
        """``added`` is about to be added to ``grad``."""
        self.before = grad
        self.expected = added._version if grad is None else grad._version + 1

    def note(self, grad: Tensor | None) -> None:
        """The pass is over and left ``grad``."""
        self.foreign |= self.tap_pass < self.param_pass
        if grad is not None and self.param_pass > self.noted_pass:  # a hook may have written it, or DDP
            replaced = self.before is not None and self.before is not grad
            self.written |= replaced or grad._version > self.expected
        self.before = None
        if self.first <= self.gone < self.tap_pass:
            self.first = self.tap_pass
        self.noted_pass = max(self.param_pass, self.tap_pass)
        self.left = None if grad is None else TensorWeakRef(grad)
        self.version = -1 if grad is None else grad._version

    def untouched(self, grad: Tensor) -> bool:
        """Whether ``grad`` is the tensor that the last pass left, as it left it."""
        return self.left is not None and self.version == grad._version and self.left() is grad

    def release(self, number: int) -> None:
        """What was added up to pass ``number`` counts no more."""
        self.gone, self.foreign, self.written, self.left = number, False, False, None


class Accumulation:
    """The backward passes of a tracker.

    Attributes:
        count: backward passes that reached a tracked parameter.
        interrupted: a pass was left by an exception, and what it added is still in some gradient.
        checking: compare what arrives at parameters and taps in the passes to come.
    """

    def __init__(self, gauges: Callable[[], Iterable[Gauge]]) -> None:
        self.count = 0
        self.interrupted = False
        self.checking = False
        self._gauges = gauges
        self._task = -1
        self._open: set[int] = set()  # graph tasks that have not ended: more than one where passes are nested

    def arrive(self) -> int:
        """A gradient is about to be added; the number of the pass that brings it."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self.settle()
            self._task = task
            self.count += 1
            if task not in self._open:
                self._open.add(task)
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(task))
        return self.count

    def settle(self, compare: bool = True) -> None:
        """Let go of the statistics whose gradients are gone, and mark the gradients that others wrote; ``compare``
        looks whether these were zeroed."""
        nested = in_backward()
        if self._open and not nested:
            self._open.clear()
            self.interrupted = True
        written = []
        for gauge in self._gauges():
            held, grad = gauge.held, gauge.param.grad
            if nested and held.in_flight and not (grad is None and held.param_pass > held.noted_pass):
                continue  # what a pass that was interrupted had added is gone: it is no pass under way
            if grad is None:
                self._let_go(gauge)
            elif not held.untouched(grad) and (
                nested or not compare or gauge.tap.grad is not None or held.param_pass > held.gone
            ):
                written.append(gauge)
        zeros = are_zero(written) if compare else [False] * len(written)
        for gauge, zero in zip(written, zeros, strict=True):
            if zero:
                self._let_go(gauge)
            else:
                gauge.held.written = True
        if self.interrupted:
            self.interrupted = any(p.held.param_pass > p.held.gone for p in self._gauges())

    def _let_go(self, gauge: Gauge) -> None:
        held = gauge.held
        if held.in_flight:
            self._open.clear()  # of a pass that was interrupted
        number = self.count if held.in_flight or held.noted_pass > held.gone else held.gone
        held.noted_pass = max(held.noted_pass, held.param_pass, held.tap_pass)
        gauge.discard()
        held.release(number)

    def _end(self, task: int) -> None:
        """After the last gradient of a pass."""
        self._open.discard(task)
        for gauge in self._gauges():
            if gauge.held.in_flight:
                gauge.held.note(gauge.param.grad)
                gauge.compare()


def are_zero(gauges: list[Gauge]) -> list[bool]:
    """Whether every entry of the gradients is zero; waits for a GPU."""
    grads = [p.param.grad.detach() for p in gauges if p.param.grad is not None]
    if not grads:
        return []
    dense = [g if g.layout is torch.strided else g.to_dense() for g in grads]
    largest = torch._foreach_norm(dense, float("inf"))
    return [size == 0 for size in torch.stack([n.double() for n in largest]).tolist()]


def in_backward() -> bool:
    """Whether the calling thread is inside a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
