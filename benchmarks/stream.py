"""One true stream: what reaches the model, whatever draws the batches, leaves them, and resumes.

Every cell trains a small model under a policy that moves after every report, and compares the rows of every batch that
reached the model with those of a plain loop that was never stopped: the same ones, none lost, none repeated,
``consumed`` right, the same ledger.

    python -m benchmarks.stream [--ranks 1 2 3] [--spawn] [--table benchmarks/results/stream.md] [--check]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import taskgrad as tg

TASKS = ("text", "code", "legal")
SIZES = (230, 40, 11)
BATCH = 12  # on all ranks together
LENGTH = 10
TOTAL = 34
LOADERS = ("plain", "stateful", "accelerate", "accelerate, stateful", "lightning")
# Workers of a fork server: forked from a process without threads. A process with threads that forks (loaders that were
# left, gloo) hangs now and then under CPython 3.11, with or without taskgrad.
WORKERS = {
    "0": (0, None, False),
    "2 forkserver": (2, "forkserver", False),
    "2 forkserver, persistent": (2, "forkserver", True),
}
SPAWN = {"2 spawn": (2, "spawn", False), "2 spawn, persistent": (2, "spawn", True)}
SPAWN_CELLS = (("through", "break"), ("none", "new process"))
PATTERNS = ("through", "break", "peek before", "peek within", "limit")
RESUMES = {"none": None, "mid-epoch": 14, "epoch's end": 20, "new process": 14}


class Rows(Dataset[tuple[torch.Tensor, int, int]]):
    """Random rows with their task and their number."""

    def __init__(self) -> None:
        self.tasks = np.random.default_rng(3).permutation(np.repeat(np.arange(3), SIZES))
        self.x = torch.randn(len(self.tasks), 5, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self.x[index], int(self.tasks[index]), index


class Moving(tg.policies.Policy):
    """Other weights after every report, from all that was in the reports so far."""

    def weights(self, report: Any, state: Any) -> Any:
        text = f"{state.memory.get('past', '')}/{report.norm.tolist()}/{report.examples.tolist()}/{state.step}"
        state.memory["past"] = hashlib.sha256(text.encode()).hexdigest()
        return np.random.default_rng(int(state.memory["past"][:12], 16)).dirichlet(np.ones(len(state.tasks)))


class Run:
    """What one process trains with."""

    def __init__(self, rank: int, ranks: int) -> None:
        torch.manual_seed(0)
        self.data = Rows()
        self.model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.tracker = tg.track(self.model, TASKS, self.optimizer, verify=False)
        self.trained = nn.parallel.DistributedDataParallel(self.model) if ranks > 1 else self.model
        self.sampler = tg.AdaptiveBatchSampler(
            self.data.tasks, BATCH // ranks, Moving(), tasks=TASKS, num_batches=LENGTH, update_every=2, delay=9,
            num_replicas=ranks, rank=rank,
        )  # fmt: skip
        self.sampler.follow(self.tracker)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[int]:
        """Train on a batch; its rows."""
        x, tasks, index = batch
        with self.tracker.batch(tasks):
            (self.trained(x).squeeze(1) - x[:, 0]).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return index.tolist()

    def save(self, folder: Path, loader: Any | None) -> None:
        """Everything, as a user would; ``loader``: one that has a state of its own."""
        tg.save_checkpoint(folder / "taskgrad.safetensors", self.tracker, self.sampler, step=self.sampler.consumed)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if loader is not None:
            state["loader"] = loader.state_dict()
        torch.save(state, folder / "rest.pt")

    def load(self, folder: Path, loader: Any | None) -> None:
        """Into a run made anew."""
        tg.load_checkpoint(folder / "taskgrad.safetensors", self.tracker, self.sampler)
        state = torch.load(folder / "rest.pt")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if loader is not None:
            loader.load_state_dict(state["loader"])


def make_loader(kind: str, workers: tuple[int, str | None, bool], run: Run) -> Any:
    """A loader of that kind over the run's sampler."""
    count, context, persistent = workers
    options: dict[str, Any] = {"num_workers": count, "persistent_workers": persistent}
    options["multiprocessing_context"] = context
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(run.data, batch_sampler=run.sampler, **options)
    loader = DataLoader(run.data, batch_sampler=run.sampler, **options)
    if kind.startswith("accelerate"):
        from accelerate import Accelerator, DataLoaderConfiguration

        configuration = DataLoaderConfiguration(use_stateful_dataloader=kind.endswith("stateful"))
        return Accelerator(cpu=True, dataloader_config=configuration).prepare(loader)
    return loader


def batches(kind: str, pattern: str, run: Run, loader: Any) -> Iterator[Any]:
    """Batches of many epochs, taken from the loader in that manner."""
    if pattern == "peek before":
        next(iter(loader))
    for epoch in itertools.count():
        if kind == "lightning":
            run.sampler.set_epoch(epoch)
        source = islice(loader, 3) if pattern == "limit" else loader
        for at, batch in enumerate(source):
            yield batch
            if pattern == "break" and at == 4:
                break
            if pattern == "peek within" and at == 3:
                next(iter(loader))


def train(kind: str, pattern: str, run: Run, loader: Any, stop: int) -> list[list[int]]:
    """Train until ``stop`` batches of the run are consumed; the rows of each."""
    source = batches(kind, pattern, run, loader)
    out = []
    while run.sampler.consumed < stop:
        out.append(run.step(next(source)))
    return out


def true_stream(rank: int, ranks: int) -> tuple[list[list[int]], str]:
    """Of a loop without a loader, and the digest of its ledger."""
    run = Run(rank, ranks)
    out: list[list[int]] = []
    while len(out) < TOTAL:
        for rows in islice(run.sampler, TOTAL - len(out)):
            x, tasks, index = zip(*(run.data[i] for i in rows), strict=True)
            out.append(run.step((torch.stack(x), torch.tensor(tasks), torch.tensor(index))))
    return out, run.sampler.ledger.digest()


_INTRODUCTION = """# One stream, whatever the loader does

Batches that reached the model against those of a plain loop that was never stopped: every row of every batch,
`consumed`, and the ledger. A cell is `ok` for all resumes (none, mid-epoch, at an epoch's end, mid-epoch in a new
process), or says which one was not, and how. *told*: a DataLoader with persistent workers has one iterator only, so
looking into it within an epoch takes a batch out of the loop's own; taskgrad warns of it. –: not run (spawned workers
take seconds to start; of resumes they run none and in a new process).
"""

Cell = tuple[str, str, str, str]


def cells(spawn: bool, ranks: int) -> list[Cell]:
    """Loader, workers, pattern, resume."""
    kinds = [kind for kind in LOADERS if ranks == 1 or not kind.startswith("accelerate")]
    found = list(itertools.product(kinds, WORKERS, PATTERNS, RESUMES))
    # spawned workers take seconds to start
    return found + list(itertools.product(kinds, SPAWN, *SPAWN_CELLS)) if spawn else found


def run_cell(cell: Cell, rank: int, ranks: int, folder: Path, second: bool = False) -> list[list[int]]:
    """The batches of a cell; ``second``: only those after the resume in a new process, without: only those before."""
    kind, workers, pattern, resume = cell
    stop = RESUMES[resume]
    run = Run(rank, ranks)
    loader = make_loader(kind, {**WORKERS, **SPAWN}[workers], run)
    out: list[list[int]] = []
    if stop is not None and not second:
        out = train(kind, pattern, run, loader, stop)
        if rank == 0:
            run.save(folder, loader if kind.endswith("stateful") else None)
        if ranks > 1:
            dist.barrier()
        if resume == "new process":
            return out
        run = Run(rank, ranks)
        loader = make_loader(kind, {**WORKERS, **SPAWN}[workers], run)
    if stop is not None:
        run.load(folder, loader if kind.endswith("stateful") else None)
        assert run.sampler.consumed == stop
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out += train(kind, pattern, run, loader, TOTAL)
    told = any("not those of the batches counted" in str(warning.message) for warning in said)
    out.append([run.sampler.consumed, int(run.sampler.ledger.digest()[:12], 16), int(told)])
    return out


def judge(found: list[list[int]], truth: list[list[int]], digest: str) -> str:
    """ "ok", "told" where it is not but a warning said so, or what is wrong first."""
    consumed, short, told = found[-1]
    if told:
        return "told"
    if found[:-1] != truth:
        first = next((i for i, (a, b) in enumerate(zip(found, truth, strict=False)) if a != b), len(truth))
        return f"batch {first} differs" if first < len(truth) else f"{len(found) - 1} batches"
    if consumed != TOTAL:
        return f"consumed {consumed}"
    return "ok" if short == int(digest[:12], 16) else "another ledger"


def all_cells(
    rank: int, ranks: int, spawn: bool, folder: Path, second: bool, chosen: list[Cell] | None
) -> dict[str, Any]:
    """Every cell's batches, and the true stream, of one rank."""
    out: dict[str, Any] = {"cells": {}}
    if not second:
        out["truth"] = true_stream(rank, ranks)
    for cell in cells(spawn, ranks) if chosen is None else chosen:
        if second and cell[3] != "new process":
            continue
        place = folder / hashlib.sha256(repr(cell).encode()).hexdigest()[:12]
        if rank == 0:
            place.mkdir(exist_ok=True)
        if ranks > 1:
            dist.barrier()
        out["cells"]["/".join(cell)] = run_cell(cell, rank, ranks, place, second)
    return out


def _worker() -> None:
    """One rank of one launch: writes what it found as JSON."""
    request = json.loads(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    multiprocessing.set_forkserver_preload(["torch", "taskgrad", "benchmarks.stream"])
    rank, ranks = request["rank"], request["ranks"]
    folder = Path(request["folder"])
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"store{request['second']}"), ranks),
                                rank=rank, world_size=ranks)  # fmt: skip
    chosen = None if request["cells"] is None else [tuple(cell) for cell in request["cells"]]
    found = all_cells(rank, ranks, request["spawn"], folder, request["second"], chosen)
    (folder / f"found-{request['second']}-{rank}.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


def launch(ranks: int, spawn: bool, chosen: list[Cell] | None = None) -> dict[str, str]:
    """All cells of ``ranks`` ranks, in processes of their own, those that resume in a new process in two: verdicts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for second in (False, True):
            requests = [
                {"rank": r, "ranks": ranks, "spawn": spawn, "folder": name, "second": second, "cells": chosen}
                for r in range(ranks)
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "benchmarks.stream", "--worker"]
            root = Path(__file__).parents[1]
            processes = [
                subprocess.Popen([*command, json.dumps(request)], env=environment, cwd=root) for request in requests
            ]
            if sum(process.wait() != 0 for process in processes):
                raise RuntimeError(f"a launch of {ranks} ranks failed")
        first, after = (
            [json.loads((folder / f"found-{second}-{r}.json").read_text()) for r in range(ranks)]
            for second in (False, True)
        )
    verdicts = {}
    for cell in first[0]["cells"]:
        said = []
        for r in range(ranks):
            truth, digest = first[r]["truth"]
            said.append(judge(first[r]["cells"][cell] + after[r]["cells"].get(cell, []), truth, digest))
        verdicts[cell] = next((verdict for verdict in said if verdict != "ok"), "ok")
    whole = [sorted(itertools.chain(*parts)) for parts in zip(*(f["truth"][0] for f in first), strict=True)]
    if not all(len(rows) == BATCH for rows in whole):
        verdicts["true stream"] = "the ranks' parts are not the global batch"
    return verdicts


def table(results: dict[int, dict[str, str]], seconds: float) -> str:
    """The verdicts as Markdown."""
    command = f"python -m benchmarks.stream {' '.join(sys.argv[1:])}".strip()
    lines = [_INTRODUCTION, f"`{command}`, torch {torch.__version__}, {seconds:.0f} s.", ""]
    for ranks, verdicts in results.items():
        lines += [f"## {ranks} rank{'s' if ranks > 1 else ''}", ""]
        lines += [f"| loader | workers | {' | '.join(PATTERNS)} |", "|---" * (2 + len(PATTERNS)) + "|"]
        rows: dict[tuple[str, str], dict[str, list[str]]] = {}
        for name, verdict in verdicts.items():
            kind, workers, pattern, resume = name.split("/")
            said = rows.setdefault((kind, workers), {}).setdefault(pattern, [])
            if verdict != "ok":
                said.append(f"{resume}: {verdict}")
        for (kind, workers), row in rows.items():
            shown = [_shown(row.get(pattern)) for pattern in PATTERNS]
            lines.append(f"| {kind} | {workers} | {' | '.join(shown)} |")
        good = sum(verdict == "ok" for verdict in verdicts.values())
        lines += ["", f"{good} of {len(verdicts)} cells ok.", ""]
    return "\n".join(lines)


def _shown(said: list[str] | None) -> str:
    if said is None:
        return "–"
    if said and all(verdict.endswith(": told") for verdict in said):
        return "*told*"
    return ", ".join(said) or "ok"


def main() -> None:
    """Run the matrix and print, or write, its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--spawn", action="store_true", help="also workers that are spawned, seconds a cell")
    parser.add_argument("--table", type=Path, help="write it there too")
    parser.add_argument("--check", action="store_true", help="fail unless every cell is ok or told")
    arguments = parser.parse_args()
    started = time.perf_counter()
    results = {ranks: launch(ranks, arguments.spawn) for ranks in arguments.ranks}
    text = table(results, time.perf_counter() - started)
    print(text)
    if arguments.table is not None:
        arguments.table.write_text(text)
    if arguments.check and not {verdict for found in results.values() for verdict in found.values()} <= {"ok", "told"}:
        raise SystemExit("some cells are wrong")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker()
    else:
        main()
