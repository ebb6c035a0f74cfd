"""taskgrad: per-task gradient statistics during training, and batches that follow them.

tracker = taskgrad.track(model, tasks=["text", "code", "legal"], optimizer=optimizer)
sampler = taskgrad.AdaptiveBatchSampler(task_of_example, batch_size=64)
sampler.follow(tracker)

for batch in torch.utils.data.DataLoader(dataset, batch_sampler=sampler):
    with tracker.batch(batch["task"]):
        loss_fn(model(batch["x"]), batch["y"]).backward()
    optimizer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import on_first_use

if TYPE_CHECKING:
    from . import ops
    from .capture import Capture, Probe, Unattributed, per_example, register_capture
    from .capture.task_rows import Rows
    from .checkpoint import load_checkpoint, save_checkpoint
    from .parameters.coverage import Coverage
    from .report import StepReport
    from .sampling import AdaptiveBatchSampler, AdaptiveSampler, TaskIndex, policies
    from .tracking.batches import Batch
    from .tracking.track import track
    from .tracking.tracker import TaskGradTracker
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "AdaptiveBatchSampler": "sampling.sampler",
            "AdaptiveSampler": "sampling.sampler",
            "Batch": "tracking.batches",
            "Capture": "capture",
            "Coverage": "parameters.coverage",
            "Probe": "capture",
            "Rows": "capture.task_rows",
            "StepReport": "report",
            "TaskGradTracker": "tracking.tracker",
            "TaskIndex": "sampling",
            "Unattributed": "capture",
            "load_checkpoint": "checkpoint",
            "per_example": "capture",
            "policies": "sampling.policies",
            "register_capture": "capture",
            "save_checkpoint": "checkpoint",
            "track": "tracking.track",
            # modules that an import of the package alone has always given
            "capture": "capture",
            "checkpoint": "checkpoint",
            "ops": "ops",
            "report": "report",
            "sampling": "sampling",
        },
    )

__version__ = "0.1.0"

__all__ = [
    "AdaptiveBatchSampler",
    "AdaptiveSampler",
    "Batch",
    "Capture",
    "Coverage",
    "Probe",
    "Rows",
    "StepReport",
    "TaskGradTracker",
    "TaskIndex",
    "Unattributed",
    "load_checkpoint",
    "ops",
    "per_example",
    "policies",
    "register_capture",
    "save_checkpoint",
    "track",
]
