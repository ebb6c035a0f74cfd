"""Peak memory of a step, as the operating system counts it: native buffers, too, which torch's own counters do not see.

The process's high-water mark (VmHWM, what ``ru_maxrss`` reads) is set back before what is measured, and malloc is made
to give every block of 64 KiB or more back to the system when it is freed, else the mark counts what lies unused.
"""

from __future__ import annotations

import ctypes
import gc
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .models import Setting
from .training import Step

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names in malloc.h, without the M_


def measurable() -> bool:
    return _STATUS.exists() and _REFERENCES.exists()


def peaks(make: Callable[[Setting], Step], setting: Setting) -> dict[str, int]:
    """Bytes of model, optimizer and step above what the process had before: "first" up to the first step at full
    length, "step" in the next one that is measured. For a process that does nothing else."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, 1 << 16)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    _run(make(replace(setting, width=32, layers=1)))  # the code that all of it needs is in memory now
    before = _reset()
    step = make(setting)
    _run(step)
    first = _high_water() - before
    _reset()
    for _ in range(step.every):
        step()
    return {"first": first, "step": _high_water() - before}


def _run(step: Step) -> None:
    step.settle()
    step.train()
    for _ in range(step.every):
        step()


def _reset() -> int:
    """Set the mark back to what is in use, and return that, in bytes."""
    gc.collect()
    _REFERENCES.write_text("5")
    return _high_water()


def _high_water() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise OSError(f"{_STATUS} has no VmHWM")
    return int(found[1]) << 10
