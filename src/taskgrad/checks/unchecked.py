"""Layers whose rows no check has seen: a call of one is noted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Capture, Gauge
from ..capture.accumulation import in_backward
from ..capture.task_rows import Rows


class Unchecked(Capture):
    """Stands in for the capture of a site until the site's rows are checked; ``note`` hears of calls whose rows were
    taken for the batch's. It costs nothing at any other site."""

    def __init__(self, capture: Capture, note: Callable[[], None]) -> None:
        self.capture, self.note = capture, note
        self.params = capture.params  # type: ignore[misc]

    def refuse(self, module: nn.Module) -> str | None:
        return self.capture.refuse(module)

    def forward(self, module: nn.Module, rows: Rows, gauges: Mapping[str, Gauge], *args: Any, **kwargs: Any) -> Tensor:
        out = self.capture.forward(module, rows, gauges, *args, **kwargs)
        if torch.compiler.is_compiling() or not in_backward():
            self.note()
        return out

    def watch(self, out: Any, examples: int, see: Callable[[Tensor], None]) -> Any:
        return self.capture.watch(out, examples, see)
