"""Rows of a batch by task, as the ops take them."""

from __future__ import annotations

import torch
from torch import Tensor

COUNTS = ([2, 0, 1, 3], [0, 0, 6, 0], [6, 0, 0, 0], [1, 1, 1, 1])


def make_rows(counts: list[int], shuffled: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Task of every entry, the order that sorts them (None if sorted), and the offsets."""
    task = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    if not shuffled:
        return task, None, offsets
    task = task[torch.randperm(len(task))]
    return task, torch.argsort(task, stable=True), offsets
