"""How many processes train together; asked by whoever must do the same on all of them."""

from __future__ import annotations

import torch.distributed as dist


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in ``group`` (``None``: the default group), 1 where torch.distributed is not in use."""
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(group)
