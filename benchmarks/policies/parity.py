"""Multi-task sparse parity (Michaud et al., arXiv 2303.13506), with frequent, rare and unlearnable tasks.

An input is a one-hot task code and random bits (as -1 and 1); the label is the parity of the task's own k bits, drawn
anew for each noise task. Every example is fresh: what the sampler draws from is only so many slots for each task, in
the proportions of the natural mix. The model is an MLP with one hidden layer, trained by Adam.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """``count`` tasks of the same kind: parities of ``k`` bits (0: noise), ``slots`` examples in a natural mix each."""

    name: str
    count: int
    k: int
    slots: int


@dataclass(frozen=True)
class Setting:
    """The first group holds the frequent tasks. ``budget``: share of a batch that a policy may divert."""

    groups: tuple[Group, ...]
    bits: int
    width: int
    batch: int
    steps: int
    budget: float
    learning_rate: float

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, group by group."""
        return tuple(f"{group.name}{i}" for group in self.groups for i in range(group.count))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Name of each task's group [T]."""
        return tuple(group.name for group in self.groups for _ in range(group.count))

    @property
    def sizes(self) -> Ints:
        """Slots of each task, int64 [T]."""
        return np.array([group.slots for group in self.groups for _ in range(group.count)])


SETTINGS = {
    "parity": Setting(
        groups=(Group("frequent", 4, 2, 230), Group("rare", 6, 2, 10), Group("noise", 2, 0, 10)),
        bits=24,
        width=48,
        batch=128,
        steps=5000,
        budget=0.3,
        learning_rate=1e-3,
    ),
    "many": Setting(
        groups=(
            Group("frequent", 4, 2, 215),
            Group("easy", 16, 1, 5),
            Group("pair", 4, 2, 5),
            Group("triple", 4, 3, 5),
            Group("noise", 4, 0, 5),
        ),
        bits=24,
        width=64,
        batch=256,
        steps=15000,
        budget=0.2,
        learning_rate=1e-3,
    ),
}


class Parity:
    """The data of one seed: which bits each task looks at."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self._seed = seed
        self._bits = setting.bits
        rng = np.random.default_rng((seed, 0))
        ks = [group.k for group in setting.groups for _ in range(group.count)]
        self._noise = np.array([k == 0 for k in ks])
        self._mask = np.zeros((len(ks), setting.bits), dtype=np.int64)
        for mask, k in zip(self._mask, ks, strict=True):
            mask[rng.choice(setting.bits, size=k, replace=False)] = 1

    def batch(self, task_ids: Ints, step: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs float32 [B, T + bits] and labels int64 [B] for ``task_ids`` [B], as drawn at training step ``step``;
        ``held_out``: drawn from another stream, for evaluations."""
        rng = np.random.default_rng((self._seed, 2 if held_out else 1, step))
        bits = rng.integers(2, size=(len(task_ids), self._bits))
        labels = (bits * self._mask[task_ids]).sum(1) % 2
        coins = rng.integers(2, size=len(task_ids))
        labels = np.where(self._noise[task_ids], coins, labels)
        inputs = np.zeros((len(task_ids), len(self._mask) + self._bits), dtype=np.float32)
        inputs[np.arange(len(task_ids)), task_ids] = 1.0
        inputs[:, len(self._mask) :] = 2 * bits - 1
        return torch.from_numpy(inputs), torch.from_numpy(labels)


def build_model(setting: Setting) -> nn.Module:
    """An MLP with one hidden layer and two outputs."""
    tasks = len(setting.tasks)
    return nn.Sequential(nn.Linear(tasks + setting.bits, setting.width), nn.ReLU(), nn.Linear(setting.width, 2))
