"""When a step closes: just before and just after the optimizers step."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

from torch.optim import Optimizer

from ..capture.accumulation import in_backward


class Closes(Protocol):
    """What a step is made of."""

    @property
    def moved_on(self) -> bool:
        """Whether a backward pass came after the first collection of the round."""

    def collect(self, params: Container[int] | None) -> None:
        """Take the statistics of the parameters with these ids (``None``: of all), whose gradients are complete."""

    def read(self) -> None:
        """All are taken: the step's gradients against the memory."""

    def close(self) -> None:
        """The parameters moved."""

    def cut_short(self) -> None:
        """What was taken is of no step."""


class StepHooks:
    """Takes what belongs to an optimizer's parameters just before it steps: only then are their gradients complete. The
    step closes when all have stepped; a round in which one stepped and another did not is no step."""

    def __init__(self, optimizers: Sequence[Optimizer], steps: Closes) -> None:
        self.optimizers = list(optimizers)
        self._steps = steps
        self._began: set[int] = set()
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
            self._begin(optimizer)
            return None
        # Lightning's way: the closure runs forward and backward once, and the update follows
        wrapped = self._once(optimizer, closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _once(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
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
            self._begin(optimizer)
            return out

        return run

    def _begin(self, optimizer: Optimizer) -> None:
        if self._began and self._steps.moved_on:
            self._cut_short()
        if id(optimizer) in self._began:  # a step() that calls the one of its base class, or one tried again
            return
        last = len(self._began) == len(self.optimizers) - 1
        params = None if last else {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._steps.collect(params)  # with the last go those that no optimizer moves
        self._began.add(id(optimizer))
        if len(self._began) == len(self.optimizers):
            self._steps.read()

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._began:  # the outer one of two
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.optimizers):
            self._began.clear()
            self._stepped.clear()
            self._steps.close()

    def _cut_short(self) -> None:
        """Gradients went on while an optimizer of the round had not stepped: that was no step."""
        self._began.clear()
        self._stepped.clear()
        self._steps.cut_short()

    def stay_last(self) -> None:
        """What other hooks do to gradients before a step is to be seen: ours come after those registered since."""
        for optimizer, handle in zip(self.optimizers, self._handles, strict=False):
            hooks = optimizer._optimizer_step_pre_hooks
            if handle.id in hooks:
                hooks[handle.id] = hooks.pop(handle.id)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
