"""Batches whose task mix follows the training run: samplers, weight ledger, policies.

Importing it imports no torch: policies, ledgers and task indices are read where there is none. The samplers need it.

Words, one for one thing: a task's *weight* is its probability in a mix, wanted by a policy or in force; its *share* is
its part of examples, of the data (natural) or of those drawn. *Guards* stand between what a policy wants and what
enters the ledger. A *probe* is a slot that a task unseen for long takes. A *row* is one place of a batch.
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
