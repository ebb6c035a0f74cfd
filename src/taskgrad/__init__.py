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

from . import ops
from .capture import Capture, Probe, Unattributed, per_example, register_capture
from .capture.task_rows import Rows
from .checkpoint import load_checkpoint, save_checkpoint
from .parameters.coverage import Coverage
from .report import StepReport
from .sampling import AdaptiveBatchSampler, AdaptiveSampler, TaskIndex, policies
from .tracking.batches import Batch
from .tracking.tracker import TaskGradTracker, track

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
