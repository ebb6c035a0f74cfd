"""Two gloo processes, and what each of them found."""

from __future__ import annotations

import json
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


def on_two_ranks(work: Callable[[int], Any]) -> list[Any]:
    """``work(rank)``, a function of a module, in two processes that form the default group: what it returns, by rank,
    through JSON. Raises AssertionError with both tracebacks where a rank failed."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        processes = [context.Process(target=_run, args=(work, rank, folder)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        assert codes == [0] * RANKS, "\n".join([f"exit codes {codes}", *failures])
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)]


def _run(work: Callable[[int], Any], rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(work(rank)))
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
