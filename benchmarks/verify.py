"""The price of the first tracked step: rows verified by two more forward passes, sums over tasks compared.

A GPT-like decoder trained with AdamW on random tokens. ``first`` is ``tg.track`` and one step with the checks on,
``unchecked`` the same with ``verify=False``, ``later`` a step of a tracker whose checks are behind it; the difference
of the first two, in plain steps, is what the checks cost a run, once.

    python -m benchmarks.verify [--device cpu|cuda] [--rounds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import taskgrad as tg

from . import timing
from .models import Decoder, Setting, losses

SETTINGS = {
    "cpu": [Setting(256, 128, 4, 32, 64, 8), Setting(1024, 768, 2, 4, 128, 4), Setting(50304, 768, 2, 4, 128, 4)],
    "cuda": [Setting(50304, 768, 12, 8, 1024, 8)],
}
CHECKED = 4  # steps after which only one in a hundred is checked


def variants(s: Setting, device: torch.device) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, s.vocab, (s.batch, s.length + 1), device=device)
    ids = torch.arange(s.batch) * s.tasks // s.batch
    names = [str(t) for t in range(s.tasks)]

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Decoder(s).to(device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, context: AbstractContextManager[object]) -> None:
        with context, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses(model, tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def first(verify: bool) -> None:
        tracker = tg.track(model, names, optimizer, verify=verify)
        step(model, optimizer, tracker.batch(ids))
        tracker.remove()

    model, optimizer = make()
    tracked, its_optimizer = make()
    settled = tg.track(tracked, names, its_optimizer)
    for _ in range(CHECKED):
        step(tracked, its_optimizer, settled.batch(ids))
    return {
        "plain": lambda: step(model, optimizer, nullcontext()),
        "later": lambda: step(tracked, its_optimizer, settled.batch(ids)),
        "unchecked": lambda: first(False),
        "first": lambda: first(True),
    }


def run(settings: list[Setting], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Print the table; the rows of it."""
    rows = []
    table = Table(title=f"first tracked step on {device}, ms (median)")
    for column in ("parameters", "width", "rows", "T", "plain", "later", "unchecked", "first", "checks / plain"):
        table.add_column(column, justify="right")
    for s in settings:
        times = timing.interleaved(variants(s, device), device, rounds, warmup=1)
        ms = {name: timing.quartiles(values) for name, values in times.items()}
        together = zip(times["first"], times["unchecked"], times["plain"], strict=True)
        cost = timing.quartiles([(checked - unchecked) / plain for checked, unchecked, plain in together])
        size = sum(p.numel() for p in Decoder(s).parameters())
        rows.append({**asdict(s), "parameters": size, "ms": ms, "checks": cost})
        cells = [f"{ms[name][1]:.1f}" for name in ("plain", "later", "unchecked", "first")]
        table.add_row(f"{size:,}", str(s.width), str(s.batch * s.length), str(s.tasks), *cells, f"{cost[1]:.2f}")
    Console(width=120).print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = run(SETTINGS[args.device], device, args.rounds)
    print(f"written to {timing.save('verify', device, rows)}")


if __name__ == "__main__":
    main()
