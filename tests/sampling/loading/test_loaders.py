"""Loaders that skip, that hand batches out in another order, and that have drawn what nobody trained on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

import taskgrad as tg
from taskgrad.sampling import AdaptiveBatchSampler
from tests.sampling.helpers import TASK_OF_EXAMPLE
from tests.sampling.test_follow import Loop, Restless


def test_a_loop_that_skips_by_itself_needs_replay() -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    state = resumed_at(13).sampler.state_dict()
    seeking = Loop(policy=Restless(), delay=4)
    seeking.sampler.load_state_dict(state)
    loader = DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=seeking.sampler)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r'about to skip 13 batches.*resume="replay".*ignore_data_skip'):
        next(iter(data_loader.skip_first_batches(loader, 13)))
    replaying = Loop(policy=Restless(), delay=4, resume="replay")
    replaying.sampler.load_state_dict(state)
    loader = DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=replaying.sampler)  # type: ignore[arg-type]
    assert len(list(data_loader.skip_first_batches(loader, 13))) == 7
    forgotten = Loop(policy=Restless(), delay=4, resume="replay")
    forgotten.sampler.load_state_dict(state)
    with pytest.warns(UserWarning, match=r'trained on batch 0 where batch 13 was due.*resume="seek"'):
        forgotten.step(next(forgotten.batches()))


def resumed_at(batches: int) -> Loop:
    loop = Loop(policy=Restless(), delay=4)
    for batch in itertools.islice(loop.batches(), batches):
        loop.step(batch)
    return loop


def test_loaders_that_cannot_be_counted_are_refused() -> None:
    loop = Loop()
    data: Any = range(len(TASK_OF_EXAMPLE))
    unordered = DataLoader(data, batch_sampler=loop.sampler, num_workers=2, in_order=False)
    with pytest.raises(RuntimeError, match=r"in_order=False hands batches out in another order.*in_order=True"):
        next(iter(unordered))
    single = tg.AdaptiveSampler(TASK_OF_EXAMPLE, 16, Restless())
    for size in (8, 32):
        with pytest.raises(ValueError, match=f"makes batches of {size} examples, the sampler of 16"):
            next(iter(DataLoader(data, sampler=single, batch_size=size)))
    assert len(next(iter(DataLoader(data, sampler=single, batch_size=16)))) == 16
    inside = DataLoader(FromASampler(AdaptiveBatchSampler(TASK_OF_EXAMPLE, 16)), batch_size=None, num_workers=2)
    with pytest.raises(RuntimeError, match="drawn from in a worker process"):
        next(iter(inside))


class FromASampler(IterableDataset[list[int]]):
    """Draws in the workers, each from a copy."""

    def __init__(self, sampler: AdaptiveBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)


def test_a_state_of_what_was_only_drawn_is_told() -> None:
    loop = Loop(follow=False)
    batches = iter(DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=loop.sampler, num_workers=2))  # type: ignore[arg-type]
    next(batches)
    with pytest.warns(UserWarning, match=r"what a loader that draws 4 ahead has drawn, 5 batches.*follow\(tracker\)"):
        loop.sampler.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.sampler.state_dict(consumed=1)
        loop.sampler.follow(loop.tracker)
        loop.sampler.state_dict()
