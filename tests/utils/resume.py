"""A training run over an architecture of the zoo that can be interrupted after any step and continued elsewhere."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import taskgrad as tg

from .architectures import ARCHITECTURES
from .steps import TASKS, make_case, run_batch

MODES: dict[str, dict[str, Any]] = {
    "sketch": {"mode": "sketch", "sketch_dim": 24},
    "exact": {"mode": "exact"},
    "exact_gram": {"mode": "exact_gram", "sketch_dim": 24},
}


class Run:
    """Model, optimizer and tracker; every step's batch, random numbers and absent tasks follow from its number."""

    def __init__(self, architecture: str, mode: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        dtype = torch.float32
        self.case = make_case(ARCHITECTURES[architecture], ARCHITECTURES[architecture].kinds[0], dtype=dtype)
        self.model = self.case.model
        self._ids = self.case.ids
        torch.manual_seed(99)
        self.case.args, self.case.kwargs = ARCHITECTURES[architecture].inputs(len(self._ids), dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.tracker = tg.track(self.model, TASKS, self.optimizer, **MODES[mode])

    def step(self, number: int) -> tg.StepReport:
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(number)
        ids = self._ids.roll(number, 0)
        self.case.ids = torch.where(ids == 1, -1, ids) if number % 3 else ids  # task 1 is in one step of three
        if hasattr(self.model, "row_ids"):
            self.model.row_ids = self.case.ids
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what the architecture's tracker leaves out
            run_batch(self.tracker, self.case)
            self.optimizer.step()
        return self.tracker.report()

    def save(self, path: Path) -> None:
        torch.save([self.model.state_dict(), self.optimizer.state_dict(), self.tracker.state_dict()], path)

    def load(self, path: Path) -> None:
        model, optimizer, tracker = torch.load(path, weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.tracker.load_state_dict(tracker)


def resumed(architecture: str, mode: str, path: Path, start: int, stop: int) -> list[dict[str, Any]]:
    """The reports of steps ``start`` to ``stop`` of the run that was saved at ``path``."""
    run = Run(architecture, mode, seed=5)  # other weights than the saved ones
    run.load(path)
    return [run.step(number).to_dict() for number in range(start, stop)]
