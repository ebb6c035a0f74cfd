"""Reports on their way from the device: copied without waiting, built when they are asked for.

``Mailbox`` keeps the newest, for whoever asks; a ``Listener`` is told of every one.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..capture.sketch import SketchMap
from ..report import Sketches, StepReport, arrived_report
from .batch_arguments import ids_range
from .validity import because


class Delivery:
    """One step's tensors, copied to the host in the background.

    Args:
        values: tensors on the device: of the report's rows, by name, and ``valid``, ``flags`` (why a step is not),
            ``losses`` (whether they were entered), ``block`` [T, K], which stays where it is, and, which may be
            missing, ``wrong`` (ids or weights that are none) and ``uses`` (how often parameters were used).
        maps: of the parameters, in the order of the block's columns.
        built: is told of the report.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        step: int,
        values: Mapping[str, Tensor],
        maps: tuple[SketchMap, ...],
        built: Callable[[StepReport], None],
    ) -> None:
        self.tasks, self.step, self._built = tasks, step, built
        device = values["valid"].device
        values = dict(values)
        block = values.pop("block")
        # without sketching there is no error to compute
        self.sketches = None if all(m.exact for m in maps) else Sketches(block, maps)
        self._sketched = None if self.sketches is None else weakref.ref(self.sketches)
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.values = {k: v.to("cpu", non_blocking=True) for k, v in values.items()}
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.values = values

    @property
    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    @cached_property
    def report(self) -> StepReport:
        """The report; waits for it. Raises ValueError where ids or weights on the GPU were wrong: they are seen only
        now."""
        self.wait()
        report = self._build()
        self._built(report)
        return report

    def _build(self) -> StepReport:
        values = self.values
        if "wrong" in values and bool(values["wrong"]):
            raise ValueError(
                f"step {self.step}: {ids_range(len(self.tasks))}, and weights must be finite and not negative; "
                "for values on a GPU this is seen only when the report arrives: pass them on the CPU to find the batch"
            )
        reason = None
        if not bool(values["valid"]):
            reason = because(values["flags"].tolist())
        return arrived_report(self.tasks, self.step, values, reason, self._sketched)


class Listener(Protocol):
    """Who follows a tracker."""

    def counted(self, examples: npt.NDArray[np.int64] | None) -> None:
        """The training loop is through with a batch; int64 [T], its rows by task, where every row is an example of one
        and they are on the CPU."""

    def closed(self, delivery: Delivery, lr: Callable[[], float | None], inside: bool) -> None:
        """A step has closed, in order; ``lr`` is what its optimizer stepped with; ``inside`` a batch that is still to
        be counted."""

    def lost(self, replaced: bool) -> None:
        """Nothing more will come: the tracker was removed, or another listener took the place."""


class Mailbox:
    """The newest report that has arrived, and until the next step what its ``cosine_se`` is computed from."""

    def __init__(self) -> None:
        self.report: StepReport | None = None
        self._sketches: Sketches | None = None
        self._on_the_way: deque[Delivery] = deque()

    def send(self, delivery: Delivery) -> None:
        self._sketches = None
        self._take()
        self._on_the_way.append(delivery)

    def put(self, report: StepReport) -> None:
        """A report that needs no delivery; it supersedes what is on the way."""
        self._on_the_way.clear()
        self.report, self._sketches = report, None

    def newest(self, wait: bool) -> StepReport | None:
        if wait and self._on_the_way:
            self._on_the_way[-1].wait()
        self._take(build=True)
        return self.report

    def _take(self, build: bool = False) -> None:
        """Drop what a newer arrival supersedes; build the newest arrival when asked."""
        while len(self._on_the_way) > 1 and self._on_the_way[1].arrived:
            self._on_the_way.popleft().sketches = None  # whoever else waits for it must not keep them
        if build and self._on_the_way and self._on_the_way[0].arrived:
            delivery = self._on_the_way.popleft()
            self.report, self._sketches = delivery.report, delivery.sketches
            delivery.sketches = None
