"""The sketches of the tracked parameters, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..capture import Gauge


class Columns:
    """P parameters in their order, and K columns, those of their sketches.

    Attributes:
        gauges: the parameters by name.
        width: K.
    """

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self.gauges: dict[str, Gauge] = {}
        self.width = 0
        self._widths: Tensor | None = None

    def append(self, gauge: Gauge) -> None:
        """Lay it out after the others."""
        gauge.columns = slice(self.width, self.width + gauge.sketch.dim)
        self.gauges[gauge.name] = gauge
        self.width += gauge.sketch.dim
        self._widths = None

    def lay_out(self, gauges: Sequence[Gauge]) -> None:
        """Anew, as ``gauges`` are ordered, those of other parameters after them."""
        names = {p.name for p in gauges}
        others = [p for name, p in self.gauges.items() if name not in names]
        self.gauges, self.width = {}, 0
        for gauge in (*gauges, *others):
            self.append(gauge)

    @property
    def device(self) -> torch.device:
        return next(iter(self.gauges.values())).tap.device

    def block(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Statistics G [T + 1, K] from those of the parameters by name; zero where there are none."""
        parts = []
        for name, gauge in self.gauges.items():
            if name in taps:
                parts.append(gauge.layout.sketches(taps[name]))
            else:
                parts.append(gauge.tap.new_zeros(()).expand(self.num_tasks + 1, gauge.sketch.dim))
        return torch.cat(parts, 1)

    def theta(self) -> Tensor:
        """Sketch of the parameters themselves, [K] in float64: differences of it are sketches of updates."""
        values, left, right = [], [], []
        for gauge in self.gauges.values():
            param: Tensor = gauge.param
            if param.shape != gauge.shape:  # left out from now on
                param = param.detach().new_zeros(()).expand(gauge.shape)
            values.append(param)
            left.append(gauge.sketch.left)
            right.append(gauge.sketch.right)
        with torch.no_grad():
            theta: Tensor = torch.ops.taskgrad.sketch_all(values, left, right)
        return theta

    def widths(self) -> Tensor:
        """Columns of every gauge, int64 [P]."""
        if self._widths is None or self._widths.device != self.device:
            self._widths = torch.tensor([p.sketch.dim for p in self.gauges.values()], device="cpu").to(self.device)
        return self._widths

    def mask(self, flags: Iterable[bool]) -> Tensor:
        """Flags on the device, bool; [P] for one of every gauge."""
        return torch.tensor(list(flags), dtype=torch.bool, device="cpu").to(self.device, non_blocking=True)

    def any_column(self, flags: Tensor) -> Tensor:
        """Whether any of a parameter's flags [K] is set: bool [P]."""
        lengths = self.widths()
        return torch.segment_reduce(flags.double(), "max", lengths=lengths, axis=0, unsafe=True, initial=0.0) > 0

    def spread(self, flags: Tensor) -> Tensor:
        """Flags [P] on all columns of their parameters: bool [K]."""
        return torch.repeat_interleave(flags, self.widths(), output_size=self.width)
