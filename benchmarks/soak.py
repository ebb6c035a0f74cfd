"""Does a long run stay where it is? Memory and step time of a tracked training loop over many steps.

A small network of three tasks trained with AdamW, every report taken, accumulation, clipping and an evaluation now and
then. The resident memory after the warm-up must stay within 2 % to the end.

    python -m benchmarks.soak [--steps 10000]
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time

import torch
from torch import nn

import taskgrad as tg

from . import timing

TASKS = ("a", "b", "c")
POINTS = 20  # readings of the memory
LIMIT = 0.02  # of the memory after the warm-up


def resident() -> float:
    """MB of resident memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def run(steps: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tracker = tg.track(model, TASKS, optimizer)
    rows: list[dict[str, float]] = []
    times: list[float] = []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        for _ in range(1 + step % 2):
            ids = torch.randint(-1, len(TASKS), (16,))
            with tracker.batch(ids) as batch:
                losses = model(torch.randn(16, 32)).square().mean(1)
                batch.losses(losses)
                losses.mean().backward()
        if step % 3 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step % 50 == 0:
            with torch.no_grad():
                model(torch.randn(16, 32))
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 5 > 0)
        assert tracker.report().valid
        times.append((time.perf_counter() - start) * 1e3)
        if step % (steps // POINTS) == 0:
            gc.collect()
            rows.append({"step": step, "resident MB": round(resident(), 1), "ms a step": statistics.median(times)})
            times.clear()
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    rows = run(args.steps)
    first, last = rows[1]["resident MB"], rows[-1]["resident MB"]
    print(f"written to {timing.save('soak', torch.device('cpu'), rows)}")
    print(f"resident memory {first:.1f} -> {last:.1f} MB ({last / first - 1:+.2%})")
    if abs(last / first - 1) > LIMIT:
        raise SystemExit(f"the memory moved by more than {LIMIT:.0%}")


if __name__ == "__main__":
    main()
