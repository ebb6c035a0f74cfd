"""A torch that was built without ``torch.distributed``, as some are: the package is there, and nearly nothing in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import importlib.abc, sys

class Built(importlib.abc.MetaPathFinder):
    '''torch.distributed looks for these to know with what torch was built.'''
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            for found in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):
                delattr(sys.modules["torch._C"], found)

sys.meta_path.insert(0, Built())
import torch.distributed as dist
assert not dist.is_available() and not hasattr(dist, "is_initialized") and not hasattr(dist, "all_reduce")
"""

TRAINING = """
import torch
from torch import nn
import taskgrad as tg

torch.manual_seed(1)  # with some seeds the policy moves its shares by less than what enters the ledger
TASK = [0] * 20 + [1] * 12
x = torch.randn(32, 8)

def make():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = tg.track(model, ["a", "b"], optimizer, **options)
    settings = {"tasks": ["a", "b"], "num_batches": 8, "update_every": 1, "delay": 0}
    sampler = tg.AdaptiveBatchSampler(TASK, 8, tg.policies.Exp3(), **settings)
    sampler.follow(tracker)
    return model, optimizer, tracker, sampler

def train(model, optimizer, tracker, sampler, steps):
    for _, rows in zip(range(steps), torch.utils.data.DataLoader(range(32), batch_sampler=sampler)):
        with tracker.batch(torch.tensor(TASK)[rows]) as batch:
            loss = (model(x[rows]) - x[rows, :1]).square().mean(1)
            batch.losses(loss)
            loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

run = make()
train(*run, steps=5)
_, _, tracker, sampler = run
assert tracker.report(wait=True).valid and tracker.coverage().verified and len(sampler.ledger) > 1
tg.save_checkpoint(sys.argv[1], tracker, sampler, step=5)
again = make()
assert tg.load_checkpoint(sys.argv[1], *again[2:]) == 5
train(*again, steps=3)
assert again[2].report().step == 8 and again[2].report().valid
again[2].remove()
print("done")
"""


@pytest.mark.parametrize("options", ["{}", "{'mode': 'exact'}"])
def test_training_and_resuming(tmp_path: Path, options: str) -> None:
    code = WITHOUT + f"options = {options}\n" + TRAINING
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    "statement", ["from taskgrad import *", "import taskgrad.cli, taskgrad.doctor, taskgrad.study"]
)
def test_everything_can_be_imported(statement: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT + statement], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_doctor_says_what_it_says_elsewhere() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + "from taskgrad.cli import main; sys.exit(main(['doctor']))"],
        capture_output=True,
        text=True,
    )
    assert "torch" in done.stdout and not done.stderr, done.stderr
