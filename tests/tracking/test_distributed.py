"""Two gloo processes under DistributedDataParallel give the report of one process on the whole batch."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import taskgrad as tg
from tests.utils.ranks import on_two_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

STEPS, BATCH = 4, 8


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3)).double()


def _data(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randint(0, 9, (BATCH,), generator=g)
    return x, torch.randint(0, 3, (BATCH,), generator=g), torch.randint(-1, 3, (BATCH,), generator=g)


def _train(rank: int, world: int) -> dict[str, object]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    tracker = tg.track(model, ["a", "b", "c"], optimizer, sketch_dim=64)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    for step in range(STEPS):
        x, y, ids = (t[rank::world] for t in _data(step))
        factor = torch.tensor([0.5, 2.0, 1.5, 1.0]).double()  # the last one is for rows of no task
        with tracker.batch(ids, loss_weight=factor[:3]) as batch:
            loss = nn.functional.cross_entropy(wrapped(x), y, reduction="none")
            batch.losses(loss)
            (factor[ids] * loss).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return tracker.report().to_dict()


def _train_on_two(rank: int) -> dict[str, object]:
    return _train(rank, 2)


@pytest.mark.slow
def test_two_ranks_report_what_one_process_reports() -> None:
    reports = on_two_ranks(_train_on_two)
    assert reports[0] == reports[1]
    alone = copy.deepcopy(_train(0, 1))
    assert reports[0].keys() == alone.keys()
    for name, value in alone.items():
        if name == "cosine_se":
            continue  # a root of differences that cancel
        got, want = (torch.tensor(_numbers(v), dtype=torch.float64) for v in (reports[0][name], value))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def _numbers(value: object) -> list[float]:
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v)]
    return [float("nan") if value is None else float(value)] if not isinstance(value, str) else []


def test_who_starts_a_collective_waits_at_exit_once(tmp_path: Path) -> None:
    """In a process of its own: the handlers of this one are not to be changed."""
    code = f"""
import atexit, torch
import torch.distributed as dist
from taskgrad.sampling.agreement import Agreement
from taskgrad.tracking.distributed import all_reduce_flat
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
handlers, atexit.register = [], lambda *given: handlers.append(given)
all_reduce_flat([torch.ones(2)], None)
first = len(handlers)
all_reduce_flat([torch.ones(2)], None)
Agreement(None, 0)
dist.destroy_process_group()
print(first, len(handlers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
