"""Measured, not predicted: a fixed batch's loss before and after the next optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checks.undisturbed import undisturbed


class StepProbe:
    """The loss just before (``before``) and just after (``after``) one optimizer step; ``None`` until it was taken."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self._model, self._loss = model, loss
        self.before: Tensor | None = None
        self.after: Tensor | None = None

    def measure(self) -> Tensor:
        """The loss now, without a trace (``undisturbed.Snapshot`` says what is covered).

        BatchNorm uses its running statistics: the probe's batch is often of one task, and its own statistics are not
        those that the model trains or is evaluated with.
        """
        with undisturbed(self._model):
            for module in self._model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = False
            return torch.as_tensor(self._loss()).detach().clone()

    @property
    def change(self) -> Tensor:
        """after − before; negative is progress. Raises RuntimeError before the step is over."""
        if self.before is None or self.after is None:
            raise RuntimeError("the probe has not seen a step yet: read it after optimizer.step()")
        return self.after - self.before
