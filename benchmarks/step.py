"""The price of tracking: a whole training step, plain, tracked, and with the per-task gradients taken one by one.

A GPT-like decoder trained with AdamW on random tokens, T tasks in equal parts, rows sorted by task (as
``AdaptiveBatchSampler`` emits them). ``T backwards`` is what one would write without taskgrad: one backward pass per
task, the gradients flattened and their Gram. ``torchjd`` (where it is installed) computes the Jacobian of the T losses
by its ``autojac`` and the Gram of it. All variants run in turn, round by round, each on its own copy of the model.
``clipped`` is ``sketch`` with the gradients clipped by norm after the backward pass, beside a plain step that clips
too: gradients that were written are read. The last columns say what following the gradients costs, in plain steps:
reading θ once (a step reads it twice), and looking whether every gradient is the one that was left.

    python -m benchmarks.step [--device cpu|cuda] [--rounds 9]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import taskgrad as tg

from . import timing
from .models import Decoder, Setting, losses

CPU = [
    Setting(256, 32, 2, 64, 32, 5),
    Setting(256, 128, 4, 32, 64, 8),
    Setting(256, 256, 4, 32, 64, 32, exact=False),
]


def variants(s: Setting, device: torch.device) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    base = Decoder(s).to(device)
    tokens = torch.randint(0, s.vocab, (s.batch, s.length + 1), device=device)
    ids = torch.arange(s.batch) * s.tasks // s.batch
    half = device.type == "cuda"

    def make(step: Callable[[nn.Module], None], clip: bool = False) -> Callable[[], None]:
        model = copy.deepcopy(base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                step(model)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    def plain(model: nn.Module) -> None:
        losses(model, tokens).mean().backward()

    def tracked(mode: str, clip: bool = False) -> Callable[[], None]:
        model = copy.deepcopy(base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tracker = tg.track(model, [str(t) for t in range(s.tasks)], optimizer, mode=mode)  # type: ignore[arg-type]

        def run() -> None:
            with tracker.batch(ids), torch.autocast(device.type, torch.bfloat16, enabled=half):
                losses(model, tokens).mean().backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tracker.report()

        return run

    def follow() -> dict[str, Callable[[], Any]]:
        """What a step does to follow the parameters and their gradients, alone."""
        model = copy.deepcopy(base)
        tracker = tg.track(model, [str(t) for t in range(s.tasks)])
        with tracker.batch(ids):
            losses(model, tokens).mean().backward()
        return {"θ": tracker._probes.theta, "gradients": tracker._probes.accumulation.settle}

    def one_by_one(model: nn.Module) -> None:
        params = list(model.parameters())
        per_row = losses(model, tokens)
        rows = []
        for t in range(s.tasks):
            part = per_row[ids.to(device) == t].sum() / s.batch
            grads = torch.autograd.grad(part, params, retain_graph=t + 1 < s.tasks)
            rows.append(torch.cat([g.flatten() for g in grads]))
        block = torch.stack(rows)
        _ = block @ block.T
        for p, g in zip(params, block.sum(0).split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p)

    def torchjd(model: nn.Module) -> None:
        from torchjd.autojac import backward  # type: ignore[import-not-found]

        per_row = losses(model, tokens)
        backward([per_row[ids.to(device) == t].sum() / s.batch for t in range(s.tasks)], parallel_chunk_size=1)
        block = torch.cat([p.jac.flatten(1) for p in model.parameters()], 1)  # type: ignore[attr-defined]
        _ = block @ block.T
        for p in model.parameters():
            p.grad = p.jac.sum(0)  # type: ignore[attr-defined]
            del p.jac  # type: ignore[attr-defined]

    found: dict[str, Callable[[], Any]] = {"plain": make(plain), "sketch": tracked("sketch")}
    found |= {"plain, clipped": make(plain, clip=True), "clipped": tracked("sketch", clip=True)}
    if s.exact:
        found |= {"exact gram": tracked("exact_gram"), "exact": tracked("exact"), "T backwards": make(one_by_one)}
        if importlib.util.find_spec("torchjd"):
            found["torchjd"] = make(torchjd)
    return found | follow()


def run(device: torch.device, rounds: int = 9) -> None:
    rows = []
    table = Table(title=f"training step on {device}, ms (median) and times the plain step")
    others = ("sketch", "clipped", "exact gram", "exact", "T backwards", "torchjd")
    parts = ("θ", "gradients")
    for column in ("parameters", "width", "rows", "T", "plain", *others, *parts):
        table.add_column(column, justify="right")
    for setting in CPU:
        size = sum(p.numel() for p in Decoder(setting).parameters())
        times = timing.interleaved(variants(setting, device), device, rounds)
        ms = {name: timing.quartiles(values) for name, values in times.items()}
        beside = {"clipped": "plain, clipped"}
        ratio = {
            n: timing.quartiles([a / b for a, b in zip(v, times[beside.get(n, "plain")], strict=True)])
            for n, v in times.items()
        }
        rows.append({**asdict(setting), "parameters": size, "ms": ms, "ratio": ratio})
        cells = [f"{ms[n][1]:.1f} ({ratio[n][1]:.2f})" if n in ms else "" for n in others]
        count = setting.batch * setting.length
        table.add_row(
            f"{size:,}",
            str(setting.width),
            str(count),
            str(setting.tasks),
            f"{ms['plain'][1]:.1f}",
            *cells,
            *(f"{ratio[n][1]:.3f}" for n in parts),
        )
    Console(width=120).print(table)
    print(f"written to {timing.save('step', device, rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    run(torch.device(args.device), args.rounds)


if __name__ == "__main__":
    main()
