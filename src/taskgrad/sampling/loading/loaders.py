"""Who is asking: what a sampler can see of the loader that draws from it, by the frames that called it.

No loader tells its sampler how many workers it has, that it gives every second batch to another process, or that it
takes a state to keep rather than to save; each of these has made runs go wrong in silence. Only frames of the loaders'
own modules are looked into: looking at a frame's variables keeps them alive (before Python 3.13).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

_FRAMES = 10  # from a sampler's iterator up to the DataLoader's, through what may be wrapped around the sampler
_MODULES = ("torch.utils.data.", "torchdata.", "accelerate.")


class Asking(NamedTuple):
    """Of the loader that asks for a batch: how many its workers draw ``ahead``; whether batches come ``in_order``; how
    many it is about to skip (``skips``); the ``batch_size`` that it makes batches of, where it draws examples."""

    ahead: int
    in_order: bool
    skips: int
    batch_size: int | None


def asking() -> Asking:
    """The loader that is asking for a batch."""
    ahead, in_order, skips, batch_size = 0, True, 0, None
    for frame in _loaders():
        kept: dict[str, Any] = getattr(frame.f_locals.get("self"), "__dict__", {})
        if isinstance(kept.get("_num_workers"), int):
            workers = kept["_num_workers"]
            ahead = workers * int(kept.get("_prefetch_factor") or 0)
            in_order = bool(kept.get("_in_order", True)) or workers < 2
        if isinstance(kept.get("skip_batches"), int):
            skips = kept["skip_batches"]
        if "sampler" in kept and isinstance(kept.get("batch_size"), int):
            batch_size = kept["batch_size"]
    return Asking(ahead, in_order, skips, batch_size)


def shards() -> int:
    """Processes that Accelerate's ``BatchSamplerShard`` is about to spread the batches over, 1 without one."""
    for frame in _loaders():
        shard: Any = frame.f_locals.get("self")
        if type(shard).__name__ == "BatchSamplerShard":
            return int(shard.num_processes)
    return 1


def in_worker() -> bool:
    """Whether this is a worker process of a DataLoader: it has a copy of the sampler."""
    from torch.utils.data import get_worker_info  # here: this module is imported where there is no torch

    return get_worker_info() is not None


def keeps_state() -> bool:
    """Whether the state asked for is kept until much later: a torchdata ``StatefulDataLoader`` with workers takes one
    whenever it draws a batch, Accelerate around one whenever it hands one out."""
    return any(frame.f_code.co_name in ("_get_main_state", "_update_state_dict") for frame in _loaders())


def skipped() -> int:
    """How many batches a torchdata ``StatefulDataLoader`` that is being resumed is about to draw and throw away."""
    for frame in _loaders():
        state = frame.f_locals.get("next_iter_state")
        if isinstance(state, dict):
            return int(state.get("_steps_since_snapshot", 0))
    return 0


def _loaders() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            return
        if str(frame.f_globals.get("__name__", "")).startswith(_MODULES):
            yield frame
        frame = frame.f_back
