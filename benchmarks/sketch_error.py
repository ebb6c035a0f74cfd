"""How far sketched numbers are from exact ones, over ``sketch_dim``: Gram, cosine, signal and effects.

Two copies of a small GPT train in step on the same data, one tracked exactly, one by sketch. Errors are root mean
squares over tasks and steps, relative to the root mean square of the exact number (cosines: absolute), and the ratio
of the cosine's error to the reported ``cosine_se``.

    python -m benchmarks.sketch_error
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import taskgrad as tg

from . import timing
from .models import Decoder, Setting, losses

SETTING = Setting(vocab=256, width=128, layers=2, batch=32, length=32, tasks=6)
STEPS, WARM = 60, 20
DIMS = (64, 256, 1024, 4096, 16384)
FIELDS = ("gram", "cosine", "signal", "own_effect", "others_effect")


def data(step: int) -> tuple[Tensor, Tensor]:
    """Every task has its own successor table; a task appears in two steps of three."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(0, SETTING.tasks, (SETTING.batch,), generator=g)
    ids = torch.where(ids == step % 3, (ids + 1) % SETTING.tasks, ids).sort().values
    tables = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(99 + t)) for t in range(6)])
    tokens = [torch.randint(0, 256, (SETTING.batch,), generator=g)]
    for _ in range(SETTING.length):
        noise = torch.rand(SETTING.batch, generator=g) < 0.2
        follow = tables[ids, tokens[-1]]
        tokens.append(torch.where(noise, torch.randint(0, 256, (SETTING.batch,), generator=g), follow))
    return torch.stack(tokens, 1), ids


def reports(mode: str, dim: int) -> list[tg.StepReport]:
    torch.manual_seed(0)
    model = Decoder(SETTING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tasks = [str(t) for t in range(SETTING.tasks)]
    tracker = tg.track(model, tasks, optimizer, mode=mode, sketch_dim=dim, verify=False)  # type: ignore[arg-type]
    found = []
    for step in range(STEPS):
        tokens, ids = data(step)
        with tracker.batch(ids):
            losses(model, tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= WARM:
            found.append(tracker.report())
            _ = found[-1].cosine_se  # to be had until the next step
    return found


def main() -> None:
    exact = reports("exact", 16)
    rows = []
    table = Table(title="root mean square error of sketched numbers, relative (cosine: absolute)")
    for column in ("sketch_dim", *FIELDS, "cosine error / reported"):
        table.add_column(column, justify="right")
    off = ~torch.eye(SETTING.tasks, dtype=torch.bool)
    for dim in DIMS:
        sketched = reports("sketch", dim)
        errors = {}
        for name in FIELDS:
            got, want = (torch.stack([getattr(r, name) for r in rs]) for rs in (sketched, exact))
            known = want.isfinite() & got.isfinite()
            scale = 1.0 if name == "cosine" else want[known].square().mean().sqrt()
            errors[name] = float((got - want)[known].square().mean().sqrt() / scale)
        error = torch.stack([(a.cosine - b.cosine)[off] for a, b in zip(sketched, exact, strict=True)])
        reported = torch.stack([r.cosine_se[off] for r in sketched])
        ratio = float((error.nan_to_num().square().mean() / reported.nan_to_num().square().mean()).sqrt())
        rows.append({"sketch_dim": dim, **errors, "cosine_error_over_reported": ratio})
        table.add_row(str(dim), *(f"{errors[n]:.3f}" for n in FIELDS), f"{ratio:.2f}")
    Console(width=120).print(table)
    print(f"written to {timing.save('sketch_error', torch.device('cpu'), rows)}")


if __name__ == "__main__":
    main()
