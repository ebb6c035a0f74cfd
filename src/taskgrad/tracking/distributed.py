"""Sums over ranks: sketches are linear, so they may be all-reduced; a Gram may not (the Gram of a sum is not a sum of
Grams)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .._gloo_exit import wait_at_exit


def all_reduce_flat(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensors summed over the ranks, in one float64 buffer, in their own dtypes; bit-identical on all ranks."""
    flat = torch.cat([t.double().reshape(-1) for t in tensors])
    wait_at_exit()
    dist.all_reduce(flat, group=group)
    parts = flat.split([t.numel() for t in tensors])
    return [p.view(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]
