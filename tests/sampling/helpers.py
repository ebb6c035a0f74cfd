"""A report, a policy that keeps moving, and a training loop without training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from taskgrad.sampling.arrays import FloatArray
from taskgrad.sampling.engine import index_numpy, native
from taskgrad.sampling.policies import Policy, PolicyState
from taskgrad.sampling.saved.state import seal

NAMES = ("text", "code", "legal", "poetry")
SIZES = (700, 120, 30, 11)
TASK_OF_EXAMPLE = np.random.default_rng(7).permutation(np.repeat(np.arange(4), SIZES))


ENGINES = ("C++", "NumPy")


def with_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """For a fixture over ``ENGINES``: every test of a module holds for both."""
    if request.param == "C++" and native.load()[0] is None:
        pytest.skip("the C++ index engine is not built or not wanted")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "NumPy":
            patch.setattr(native, "engine_class", lambda: index_numpy.Engine)
        yield request.param


needs_extension = pytest.mark.skipif(native.load()[0] is None, reason="the C++ index engine is not built or not wanted")


@dataclass(frozen=True)
class Report:
    """What the sampler reads of a StepReport, and a number for the policy."""

    step: int
    tasks: tuple[str, ...] = NAMES
    valid: bool = True
    value: float = 0.0


class Restless(Policy):
    """Other weights after every report, depending on all reports so far by way of its memory."""

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        text = f"{state.memory.get('past', '')}/{report.step}/{report.value}/{state.step}/{state.weights.tolist()}"
        state.memory["past"] = hashlib.sha256(text.encode()).hexdigest()
        rng = np.random.default_rng(int(state.memory["past"][:12], 16))
        return rng.dirichlet(np.ones(len(state.tasks)))


class Identity(Dataset[int]):
    """Its examples are their own indices."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return index


def sealed_again(state: dict[str, Any]) -> dict[str, Any]:
    """A state made up by somebody who knows how digests are computed."""
    return seal({name: value for name, value in state.items() if name not in ("format", "digests")})


def loader(sampler: Any, workers: int) -> DataLoader[int]:
    """A real DataLoader over the indices."""
    return DataLoader(Identity(len(TASK_OF_EXAMPLE)), batch_sampler=sampler, num_workers=workers)


def trained(batches: Any, sampler: Any, count: int | None = None) -> Iterator[list[int]]:
    """Go through ``batches`` with an update after each, ``count`` of them at most; every fourth report is invalid."""
    for batch in islice(iter(batches), count):
        indices = [int(i) for i in batch]
        done = sampler.consumed if sampler._stream.counting else 0
        value = sum(indices)
        sampler.update(Report(step=done + 1, valid=value % 4 > 0, value=float(value)))
        yield indices
