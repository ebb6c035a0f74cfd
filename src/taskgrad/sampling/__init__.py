"""Batches whose task mix follows the training run: samplers, weight ledger, policies.

Importing it imports no torch: policies, ledgers and task indices are read where there is none. The samplers need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import on_first_use
from . import policies
from .data.task_index import TaskIndex
from .ledger import Entry, Ledger
from .realised import Realised

if TYPE_CHECKING:
    from .sampler import AdaptiveBatchSampler, AdaptiveSampler
else:
    __getattr__, __dir__ = on_first_use(__name__, {"AdaptiveBatchSampler": "sampler", "AdaptiveSampler": "sampler"})

__all__ = ["AdaptiveBatchSampler", "AdaptiveSampler", "Entry", "Ledger", "Realised", "TaskIndex", "policies"]
