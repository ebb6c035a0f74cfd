"""How many processes train together; asked by whoever must do the same on all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in ``group`` (``None``: the default group), 1 where torch.distributed is not in use."""
    import torch.distributed as dist  # who samples only imports no torch

    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(group)
