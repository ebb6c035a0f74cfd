"""Reports on their way from the device: copied without waiting, built when they are asked for.

``Mailbox`` keeps the newest, for whoever asks; a ``Listener`` is told of every one.
"""

from __future__ import annotations

import math
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
from ..capture.task_rows import ids_range
from ..report import Sketches, StepReport
from .validity import because

VECTORS = (
    "others_cosine",
    "others_cosine_mean",
    "others_cosine_std",
    "norm",
    "signal",
    "overwrite",
    "overwrite_se",
    "pull",
    "own_pull",
    "own_effect",
    "others_effect",
    "update_effect",
    "gained",
    "undone",
    "retention",
    "retention_se",
    "curvature",
    "predicted_effect",
)


class Delivery:
    """One step's tensors, copied to the host in the background.

    Args:
        values: tensors on the device, by name of the report's field, and ``valid``, ``block``, ``loss`` and ``wrong``
            (ids or weights that are none); the last may be missing. ``flags`` says why a step is not valid,
            ``given`` whether its losses were entered. ``block`` [T, K] stays where it is.
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
        values = dict(self.values)
        wrong = values.pop("wrong", None)
        if wrong is not None and bool(wrong):
            raise ValueError(
                f"step {self.step}: {ids_range(len(self.tasks))}, and weights must be finite and not negative; "
                "for values on a GPU this is seen only when the report arrives: pass them on the CPU to find the batch"
            )
        loss: Tensor | None = values.pop("loss")
        if not bool(values.pop("given")):
            loss = None
        if not bool(values["examples"].isnan().any()):
            values["examples"] = values["examples"].long()
        valid, flags = bool(values.pop("valid")), values.pop("flags").tolist()
        if not valid:
            reason = because(flags) or "a parameter was used more than once (accumulate=False)"
            counts = (values["steps_since_seen"], reason, values["examples"], values["tokens"])
            return invalid_report(self.tasks, self.step, *counts, loss)
        return StepReport(
            tasks=self.tasks,
            step=self.step,
            valid=True,
            reason=None,
            loss=loss,
            _sketches=self._sketched,
            **values,
        )


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


def invalid_report(
    tasks: tuple[str, ...],
    step: int,
    steps_since_seen: Tensor,
    reason: str,
    examples: Tensor | None = None,
    tokens: Tensor | None = None,
    loss: Tensor | None = None,
) -> StepReport:
    """The report of a step that told nothing: NaN everywhere but in the counts."""
    count = len(tasks)
    nan = torch.full((count,), torch.nan, dtype=torch.float64)
    square = nan[:, None].expand(count, count)
    if loss is not None and tokens is not None:
        bad = [
            t for t, x, n in zip(tasks, loss.tolist(), tokens.tolist(), strict=True) if n > 0 and not math.isfinite(x)
        ]
        if bad:
            reason += f"; the loss of {', '.join(bad)} is not finite"
    return StepReport(
        tasks=tasks,
        step=step,
        valid=False,
        reason=reason,
        examples=torch.zeros(count, dtype=torch.int64) if examples is None else examples,
        tokens=torch.zeros(count, dtype=torch.float64) if tokens is None else tokens,
        loss=None,
        gram=square,
        cosine=square,
        memory_dot=nan[:, None].expand(count, count + 1),
        steps_since_seen=steps_since_seen,
        _sketches=None,
        **dict.fromkeys(VECTORS, nan),
    )
