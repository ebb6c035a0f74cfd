"""Who is asking: what a sampler can see of the loader that draws from it, by the frames that called it.

No loader tells its sampler how many workers it has, that it gives every second batch to another process, or that it
takes a state to keep rather than to save; each of these has made runs go wrong in silence.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

_FRAMES = 8  # from a sampler's iterator up to the DataLoader's, through what may be wrapped around the sampler


def _callers(depth: int) -> list[FrameType]:
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(depth + 1)
    while frame is not None and len(frames) < _FRAMES:
        frames.append(frame)
        frame = frame.f_back
    return frames


def workers() -> int:
    """Workers of the DataLoader that is asking for a batch, 0 where none is."""
    for frame in _callers(1):
        # not getattr: whose ``self`` that is, nobody knows
        count = getattr(frame.f_locals.get("self"), "__dict__", {}).get("_num_workers")
        if isinstance(count, int):
            return count
    return 0


def shards() -> int:
    """Processes that Accelerate's ``BatchSamplerShard`` is about to spread the batches over, 1 without one."""
    for frame in _callers(1):
        asking: Any = frame.f_locals.get("self")
        if type(asking).__name__ == "BatchSamplerShard":
            return int(asking.num_processes)
    return 1


def keeps_state() -> bool:
    """Whether the state asked for is kept until much later: a torchdata ``StatefulDataLoader`` with workers takes one
    whenever it draws a batch, Accelerate around one whenever it hands one out."""
    return any(frame.f_code.co_name in ("_get_main_state", "_update_state_dict") for frame in _callers(1))


def skipped() -> int:
    """How many batches a torchdata ``StatefulDataLoader`` that is being resumed is about to draw and throw away."""
    for frame in _callers(1):
        state = frame.f_locals.get("next_iter_state")
        if _of_torchdata(frame) and isinstance(state, dict):
            return int(state.get("_steps_since_snapshot", 0))
    return 0


def _of_torchdata(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("torchdata.")
