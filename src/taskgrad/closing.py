"""When a step closes: just before and just after the optimizers step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class StepHooks:
    """Calls ``before`` when the first of the optimizers is about to step and ``after`` when all have stepped."""

    def __init__(self, optimizers: Sequence[Optimizer], before: Callable[[], None], after: Callable[[], None]) -> None:
        self.optimizers = list(optimizers)
        self.before, self.after = before, after
        self._stepped: set[int] = set()
        self._handles = [o.register_step_pre_hook(self._pre) for o in self.optimizers]
        self._handles += [o.register_step_post_hook(self._post) for o in self.optimizers]

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_backward():
            raise RuntimeError(
                "taskgrad does not support an optimizer that steps inside the backward pass: the step's gradients are "
                "not complete there; step after loss.backward()"
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin()
            return None
        # Lightning's way: the closure runs forward and backward once, and the update follows
        wrapped = self._once(closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _once(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        calls = 0

        def run() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    "taskgrad does not support optimizers that evaluate the closure more than once per step (LBFGS, "
                    "some SAM): the step would have several gradients"
                )
            out = closure()
            self._begin()
            return out

        return run

    def _begin(self) -> None:
        if not self._stepped:
            self.before()

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.optimizers):
            self._stepped.clear()
            self.after()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def in_backward() -> bool:
    """Whether the calling thread is inside a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
