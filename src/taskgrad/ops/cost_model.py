"""Which way to the exact Gram of a layer's per-task gradients is the cheaper, by arithmetic.

For a weight gradient dW = Σ_t dY_tᵀ X_t with N rows, d = d_in · d_out entries and S segments (the tasks and rest):

    strategy     what it does                                        beyond the dense product dYᵀ X
    fused        ``wgrad_gram``: Gram per tile, tiles kept in L2     the kernel's efficiency, 2 S² d operations
    ghost        ``ghost_gram``: Gram from products of rows          N² (d_in + d_out) operations

``wgrad_stats`` asks here, and forms the S gradients only where they are wanted themselves.

Operations and bytes are exact, rates are the table's. A strategy counts as long as its operations or its bytes take,
whichever is more: enough to rank strategies that differ by factors, not to predict a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .tensor_cores import from_shared_memory
from .wgrad_sketch import PANEL_BYTES

Strategy = Literal["fused", "ghost"]


@dataclass(frozen=True)
class Rates:
    """Sustained rates of a device: operations per second on 16-bit and on 32-bit operands, and bytes per second.

    ``fused``: the share of the dense rate that ``wgrad_gram`` reaches.
    """

    half: float
    single: float
    bytes: float
    fused: float


# H100: what cuBLAS sustains in public bfloat16 benchmarks, a tenth below what its memory can do at best; A100 alike.
# CPU: one thread of a server core with AVX-512 and MKL, measured with these kernels at d = 512 and
# 1024 (16-bit operands are widened first); torch's own threads multiply it. No rate is more than a guess elsewhere.
RATES = {
    "sm_90": Rates(half=600e12, single=50e12, bytes=3.0e12, fused=0.8),
    "sm_80": Rates(half=230e12, single=17e12, bytes=1.5e12, fused=0.8),
    "cpu": Rates(half=100e9, single=100e9, bytes=5e9, fused=0.9),
}


@dataclass(frozen=True)
class Cost:
    """Estimated seconds of the whole weight gradient with its statistics, and the bytes needed meanwhile."""

    strategy: Strategy
    seconds: float
    extra_bytes: int


def costs(
    rows: int, d_in: int, d_out: int, segments: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, dict[Strategy, Cost]]:
    """Seconds of the dense product alone, and the cost of every strategy.

    Args:
        rows: N.
        d_in, d_out: of the layer.
        segments: S, tasks and rest.
        dtype: of X and dY.
        device: where they are.
    """
    rates = RATES[_kind(device)]
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    wide = dtype in (torch.float32, torch.float64)
    speed = (rates.single if wide else rates.half) * threads / (2 if dtype == torch.float64 else 1)
    item = dtype.itemsize
    stat = 8 if dtype == torch.float64 else 4
    entries = d_in * d_out

    def time(operations: float, moved: float) -> float:
        return max(operations / speed, moved / rates.bytes)

    doubles = 8 // stat if device.type == "cpu" else 1  # there ghost_gram multiplies in float64
    activations = rows * (d_in + d_out) * item
    product = 2.0 * rows * entries
    gram = 2.0 * segments**2 * entries
    dense = time(product, activations + entries * item)
    tiles = segments * entries * stat
    found = (
        Cost(
            "fused",
            # on a CPU a panel of the parts is read once more by sum_gram
            time((product + gram) / rates.fused, activations + entries * item)
            + (tiles / rates.bytes if device.type == "cpu" else 0.0),
            _scratch(device, segments, entries, stat, item),
        ),
        Cost("ghost", dense + time(doubles * rows**2 * (d_in + d_out), 2 * activations), 0),
    )
    return dense, {cost.strategy: cost for cost in found}


def cheapest(found: dict[Strategy, Cost]) -> Strategy:
    """The strategy that takes the least time; of equals the one that needs the least memory."""
    return min(found.values(), key=lambda cost: (cost.seconds, cost.extra_bytes)).strategy


def explain(dense: float, found: dict[Strategy, Cost]) -> str:
    """A table for people, one line per strategy."""
    lines = [f"dense product     {_duration(dense)}", "strategy          time  over dense  extra memory"]
    for name, cost in sorted(found.items(), key=lambda item: item[1].seconds):
        over = f"{100 * (cost.seconds / dense - 1):+.0f} %"
        lines.append(f"{name:<12}{_duration(cost.seconds):>10}  {over:>10}  {cost.extra_bytes / 2**20:>8.1f} MiB")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _kind(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return "sm_90" if from_shared_memory(torch.cuda.get_device_capability(device)[0]) else "sm_80"


def _scratch(device: torch.device, segments: int, entries: int, stat: int, item: int) -> int:
    """Bytes of the parts that ``wgrad_gram`` keeps: a panel on a CPU, 128 x 128 per multiprocessor on a GPU."""
    if device.type == "cpu":
        return min(segments * entries * stat, PANEL_BYTES)
    tile = min(entries, 128 * 128)
    return torch.cuda.get_device_properties(device).multi_processor_count * segments * tile * item
