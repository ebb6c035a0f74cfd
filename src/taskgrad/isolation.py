"""Extra forward passes that leave no trace in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients; RNG and buffers as before afterwards.

    BatchNorm uses its running statistics meanwhile: in training mode it would mix examples by design.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        for m in norms:
            m.training = False
        try:
            yield
        finally:
            for m in norms:
                m.training = True
            for buffer, saved in buffers:
                buffer.copy_(saved)
