"""Batches whose task mix follows the training run: samplers, weight ledger, policies."""

from __future__ import annotations

from . import policies
from .control import Realised
from .ledger import Entry, Ledger
from .sampler import AdaptiveBatchSampler, AdaptiveSampler
from .task_index import TaskIndex

__all__ = ["AdaptiveBatchSampler", "AdaptiveSampler", "Entry", "Ledger", "Realised", "TaskIndex", "policies"]
