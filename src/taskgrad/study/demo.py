"""`taskgrad demo`: a small language model forgets rare tasks under the natural mix, and learns them with a boost."""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import platform
import queue
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__
from .._files import replacing
from .._text import printable
from . import page, summary
from .data import LEARNABLE, RARE, TASKS
from .figures import RUN_NAMES
from .train import BATCH_SIZE, POLICIES, RARE_BUDGET, train

STEPS = 3000
QUICK_STEPS = 40
_REPORT_EVERY = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`."""
    parser.add_argument(
        "--out", type=Path, default=Path("taskgrad-demo"), help="folder for report.html and result.json"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches (default 0)")
    parser.add_argument("--steps", type=int, default=None, help=f"training steps of each run (default {STEPS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} steps: shows that it runs, teaches nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Train the three runs, print the table, write `report.html` and `result.json`; returns the exit code, 2 where the
    options are wrong or nothing can be written to the folder."""
    console = Console()
    steps = args.steps if args.steps is not None else QUICK_STEPS if args.quick else STEPS
    if steps < 1 or args.seed < 0:
        console.print(f"[red]--steps must be at least 1 and --seed at least 0, got {steps} and {args.seed}")
        return 2
    try:
        _make_ready(args.out)
    except OSError as error:
        console.print(f"[red]--out: nothing can be written to {_shown(args.out)}: {_shown(error.strerror)}")
        return 2
    console.print(
        f"Three runs of {steps} steps: Python's documentation, and four rare tasks of 0.2% each. "
        "Under the natural mix the text overwrites what the model learns of them."
    )
    started = time.perf_counter()
    runs = _train_all(args.seed, steps, console)
    result = {
        "format": 2,
        "config": {
            "seed": args.seed,
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "rare_budget": RARE_BUDGET,
            "parameters": next(iter(runs.values()))["parameters"],
        },
        "versions": {
            "taskgrad": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "tasks": list(TASKS),
        "rare": list(RARE),
        "learnable": list(LEARNABLE),
        "chance": next(iter(runs.values()))["chance"],
        "seconds": time.perf_counter() - started,
        "runs": runs,
    }
    files = {"report.html": page.render(result), "result.json": json.dumps(result, allow_nan=False)}
    for name, text in files.items():
        with replacing(args.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    console.print(_table(result))
    console.print(summary.headline(result))
    figures, data = (_shown(args.out / name) for name in files)
    console.print(f"{result['seconds']:.0f} s. Figures: {figures}, data: {data}", soft_wrap=True)
    return 0


def _make_ready(out: Path) -> None:
    """Make the folder, and make sure that the files can be written to it; raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "result.json"):
        if (out / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
    with tempfile.TemporaryFile(dir=out):
        pass


def _shown(text: object) -> str:
    """On one line, and without a meaning to rich's markup."""
    return escape(printable(str(text)))


def _train_all(seed: int, steps: int, console: Console) -> dict[str, dict[str, Any]]:
    """Results of all runs by name, one process each; raises RuntimeError with the trace if one fails."""
    context = multiprocessing.get_context("spawn")
    messages: multiprocessing.Queue[tuple[str, str, Any]] = context.Queue()
    workers = {
        name: context.Process(target=_worker, args=(name, seed, steps, messages), daemon=True) for name in POLICIES
    }
    found: dict[str, dict[str, Any]] = {}
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.fields[note]:<34}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}
        for name, worker in workers.items():
            bars[name] = progress.add_task(RUN_NAMES[name], total=steps, note="starting")
            worker.start()
        try:
            while len(found) < len(workers):
                try:
                    kind, name, content = messages.get(timeout=1.0)
                except queue.Empty:
                    dead = [n for n, w in workers.items() if n not in found and w.exitcode not in (None, 0)]
                    if dead:
                        raise RuntimeError(f"the process of the run {dead[0]!r} ended without a result") from None
                    continue
                if kind == "failed":
                    raise RuntimeError(f"the run {name!r} failed:\n{content}")
                if kind == "done":
                    found[name] = content
                else:
                    step, note = content
                    progress.update(bars[name], completed=step, note=note)
        finally:
            for worker in workers.values():
                if worker.is_alive() and len(found) < len(workers):
                    worker.terminate()
                worker.join()
    return {name: found[name] for name in POLICIES}


def _worker(name: str, seed: int, steps: int, messages: multiprocessing.Queue[tuple[str, str, Any]]) -> None:
    """One run in a process of its own; one thread, since the model is too small to gain from more."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    accuracy = 0.0

    def on_step(step: int, loss: float, mean_accuracy: float | None) -> None:
        nonlocal accuracy
        accuracy = accuracy if mean_accuracy is None else mean_accuracy
        if step % _REPORT_EVERY == 0 or step == steps:
            messages.put(("step", name, (step, f"loss {loss:.2f}, rare tasks {accuracy:.0%} right")))

    try:
        messages.put(("done", name, train(name, seed, steps, on_step).to_dict()))
    except Exception:
        messages.put(("failed", name, traceback.format_exc()))


def _die_with_parent() -> None:
    """A killed parent cannot end its processes: without it nobody would read what this one computes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _table(result: dict[str, Any]) -> Table:
    table = Table(title="Accuracy on the rare tasks: held-out instances never occurred in training")
    for number, title in enumerate(summary.HEADER):
        table.add_column(title, justify="left" if number < 2 else "right", no_wrap=True)
    for row in summary.rows(result):
        table.add_row(*row, end_section=row[1].startswith("learnable"))
    return table
