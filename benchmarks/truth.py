"""What every variant of a step is compared with: the tasks' gradients in float64, from one backward pass an example."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from .models import Decoder, Setting, losses
from .training import Step, data

_COLUMNS = 1 << 18  # of the tasks' gradients that are multiplied at a time


class Truth:
    """Of a decoder at its start: ``gram`` [T, T], ``norms`` [B] of the examples' gradients, ``grads`` of the mean loss.

    The examples do not mix, so each one's gradient is that of a pass of its own. The tasks' gradients are added up and
    multiplied in float64 and kept in float32.
    """

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        model = Decoder(setting)
        sizes = [p.numel() for p in model.parameters()]
        shapes = [p.shape for p in model.parameters()]
        model.double()
        tokens, ids = data(setting)
        rows, norms = torch.zeros(setting.tasks, sum(sizes)), []
        for t in range(setting.tasks):
            total = torch.zeros(sum(sizes), dtype=torch.float64)
            for example in (ids == t).nonzero().flatten().tolist():
                loss = losses(model, tokens[example : example + 1]).sum() / setting.batch
                grads = torch.autograd.grad(loss, list(model.parameters()))
                flat = torch.cat([g.flatten() for g in grads])
                norms.append(flat.norm())
                total += flat
            rows[t] = total
        self.gram = torch.zeros(setting.tasks, setting.tasks, dtype=torch.float64)
        for part in rows.split(_COLUMNS, dim=1):
            wide = part.double()
            self.gram += wide @ wide.mT
        self.norms = torch.stack(norms)
        self.grads = [g.view(s) for g, s in zip(rows.sum(0).split(sizes), shapes, strict=True)]

    def errors(self, step: Step) -> tuple[dict[str, float], float]:
        """Relative errors, in the Frobenius norm, of what ``step`` says of itself ("gram" or "norms") and of the
        parameters' gradients ("grad"), at the model's start; and the milliseconds that the first of its steps took.

        ``step.every`` steps are taken.
        """
        start = time.perf_counter()
        step.backward()
        taken = (time.perf_counter() - start) * 1e3  # what is read below must be read before the step closes
        squares = [
            (float((p.grad.double() - g).square().sum()), float(g.double().square().sum()))
            for p, g in zip(step.params, self.grads, strict=True)
            if p.grad is not None
        ]
        without = sum(p.grad is None for p in step.params)
        start = time.perf_counter()
        step.close()
        taken += (time.perf_counter() - start) * 1e3
        for _ in range(step.every - 1):
            step()
        found = {
            "grad": float("inf")
            if without
            else (math.fsum(a for a, _ in squares) / math.fsum(b for _, b in squares)) ** 0.5
        }
        for name, value in step.statistics().items():
            truth: Tensor = getattr(self, name)
            found[name] = float((value.double() - truth).norm() / truth.norm())
        return found, taken
