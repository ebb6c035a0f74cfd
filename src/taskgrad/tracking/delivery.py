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

from ..report import Sketches, StepReport, arrived_report
from ..statistics.figures import Values
from .batch_arguments import ids_range
from .validity import because


class Delivery:
    """What one step brings to the host: copied in the background, in one piece; worked out when it lands, in the order
    of the steps.

    Args:
        values: tensors on the device, by name: what ``tell`` needs; ``valid``, ``flags`` (why a step is not),
            ``losses`` (whether they were entered) and, which may be missing, ``wrong`` (ids or weights that are none)
            and ``uses`` (how often parameters were used).
        sketches: of the step's gradients, from which an error can be computed; ``None`` where nothing is sketched.
        tell: the rows of the report from the values.
        built: is told of the report.

    Attributes:
        values: on the host, once it has arrived.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        step: int,
        values: Mapping[str, Tensor],
        sketches: Sketches | None,
        tell: Callable[[Values], Values],
        built: Callable[[StepReport], None],
    ) -> None:
        self.tasks, self.step, self._tell, self._built = tasks, step, tell, built
        self.sketches = sketches
        self._sketched = None if sketches is None else weakref.ref(sketches)
        self.before: Delivery | None = None  # the step before, until it has landed
        self.event: torch.cuda.Event | None = None
        device = values["valid"].device
        if device.type == "cuda":
            self._shapes = {name: value.shape for name, value in values.items()}
            packed = torch.cat([value.double().reshape(-1) for value in values.values()])
            self._packed = packed.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.values = {name: value.numpy() for name, value in values.items()}

    @cached_property
    def values(self) -> Values:
        self.wait()
        parts = self._packed.split([shape.numel() for shape in self._shapes.values()])
        return {n: p.view(s).numpy() for (n, s), p in zip(self._shapes.items(), parts, strict=True)}

    @property
    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def land(self) -> None:
        """Work out what was brought, after all that came before; waits for it."""
        _ = self._rows

    @cached_property
    def _rows(self) -> Values:
        chain = []
        earlier, self.before = self.before, None
        while earlier is not None:
            chain.append(earlier)
            earlier, chain[-1].before = earlier.before, None
        for delivery in reversed(chain):
            delivery.land()
        return self._tell(self.values)

    @cached_property
    def report(self) -> StepReport:
        """The report; waits for it. Raises ValueError where ids or weights on the GPU were wrong: they are seen only
        now."""
        report = self._build()
        self._built(report)
        return report

    def _build(self) -> StepReport:
        rows, values = self._rows, self.values
        if values.get("wrong"):
            raise ValueError(
                f"step {self.step}: {ids_range(len(self.tasks))}, and weights must be finite and not negative; "
                "for values on a GPU this is seen only when the report arrives: pass them on the CPU to find the batch"
            )
        reason = None if values["valid"] else because(values["flags"].tolist())
        return arrived_report(self.tasks, self.step, rows, {"losses": bool(values["losses"])}, reason, self._sketched)


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
        self._last: Delivery | None = None
        self._on_the_way: deque[Delivery] = deque()

    def send(self, delivery: Delivery) -> None:
        delivery.before, self._last = self._last, delivery
        self._sketches = None
        self._take()
        self._on_the_way.append(delivery)
        if delivery.event is None:
            delivery.land()

    def land(self) -> None:
        """Wait for all that was sent, and have it worked out."""
        if self._last is not None:
            self._last.land()

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
            superseded = self._on_the_way.popleft()
            superseded.land()
            superseded.sketches = None  # whoever else waits for it must not keep them
        if build and self._on_the_way and self._on_the_way[0].arrived:
            delivery = self._on_the_way.popleft()
            self.report, self._sketches = delivery.report, delivery.sketches
            delivery.sketches = None
