"""Paired timing and the record of the machine it was done on.

Variants are called in turn, round after round, so that a machine that slows down slows all of them; medians and
quartiles are over rounds. On a GPU the L2 cache is flushed before every call and CUDA events are read, so the numbers
are for cold caches and leave out the launch.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of every call after the warm-up, by variant."""
    call = _cuda_ms if device.type == "cuda" else _cpu_ms
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(warmup + rounds):
        for name, function in variants.items():
            milliseconds = call(function)
            if index >= warmup:
                times[name].append(milliseconds)
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def _cpu_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()  # larger than any L2
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def machine(device: torch.device) -> dict[str, Any]:
    """What a number must not be quoted without."""
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load average": round(os.getloadavg()[0], 1),  # above the number of threads: others were running
    }
    if device.type == "cuda":
        import triton

        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return facts


def _cpu_name() -> str:
    """Model name with the family and model numbers: virtual machines often hide the name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"(?m)^([^\t]+)\t+: (.*)$", info.read_text()))
    vector = "AVX-512" if "avx512f" in fields.get("flags", "") else "AVX2" if "avx2" in fields.get("flags", "") else ""
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')}, {os.cpu_count()} cores, {vector})"


def save(stem: str, device: torch.device, rows: list[dict[str, Any]]) -> Path:
    """Write ``results/<stem>-<device>.json`` and return its path."""
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = RESULTS / f"{stem}-{re.sub(r'[^A-Za-z0-9]+', '-', label).lower()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n")
    return path
