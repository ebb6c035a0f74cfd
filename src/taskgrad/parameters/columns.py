"""The sketches of the tracked parameters, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..capture import Probe


class Columns:
    """P parameters in their order, and K columns, those of their sketches.

    Attributes:
        probes: the parameters by name.
        width: K.
    """

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self.probes: dict[str, Probe] = {}
        self.width = 0
        self._widths: Tensor | None = None

    def append(self, probe: Probe) -> None:
        """Lay it out after the others."""
        probe.columns = slice(self.width, self.width + probe.sketch.dim)
        self.probes[probe.name] = probe
        self.width += probe.sketch.dim
        self._widths = None

    def lay_out(self, probes: Sequence[Probe]) -> None:
        """Anew, as ``probes`` are ordered, those of other parameters after them."""
        names = {p.name for p in probes}
        others = [p for name, p in self.probes.items() if name not in names]
        self.probes, self.width = {}, 0
        for probe in (*probes, *others):
            self.append(probe)

    @property
    def device(self) -> torch.device:
        return next(iter(self.probes.values())).tap.device

    def block(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Statistics G [T + 1, K] from those of the parameters by name; zero where there are none."""
        dtype = torch.float64 if any(p.tap.dtype == torch.float64 for p in self.probes.values()) else torch.float32
        out = torch.zeros(self.num_tasks + 1, self.width, dtype=dtype, device=self.device)
        for name, tap in taps.items():
            probe = self.probes[name]
            out[:, probe.columns] = probe.layout.sketches(tap)
        return out

    def theta(self) -> Tensor:
        """Sketch of the parameters themselves, [K] in float64: differences of it are sketches of updates."""
        out = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for probe in self.probes.values():
            if probe.param.shape == probe.shape:
                out[probe.columns] = probe.sketch_of(probe.param)
        return out

    def widths(self) -> Tensor:
        """Columns of every probe, int64 [P]."""
        if self._widths is None or self._widths.device != self.device:
            self._widths = torch.tensor([p.sketch.dim for p in self.probes.values()], device="cpu").to(self.device)
        return self._widths

    def mask(self, flags: Iterable[bool]) -> Tensor:
        """Flags on the device, bool; [P] for one of every probe."""
        return torch.tensor(list(flags), dtype=torch.bool, device="cpu").to(self.device, non_blocking=True)

    def any_column(self, flags: Tensor) -> Tensor:
        """Whether any of a parameter's flags [K] is set: bool [P]."""
        lengths = self.widths()
        return torch.segment_reduce(flags.double(), "max", lengths=lengths, axis=0, unsafe=True, initial=0.0) > 0

    def spread(self, flags: Tensor) -> Tensor:
        """Flags [P] on all columns of their parameters: bool [K]."""
        return torch.repeat_interleave(flags, self.widths(), output_size=self.width)
