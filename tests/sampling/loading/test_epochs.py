"""Where an iteration begins, what an epoch is, and epochs that are run again."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from taskgrad.sampling.policies import Proportional
from tests.sampling.helpers import TASK_OF_EXAMPLE, trained
from tests.sampling.test_sampler import build


def test_a_plain_loop_over_epochs_moves_on() -> None:
    sampler, other = build(Proportional()), build(Proportional())
    epochs = [list(sampler) for _ in range(3)]
    assert sampler.epoch == 2
    for e in (0, 1, 2):
        other.set_epoch(0)  # as a framework does that counts by itself
        assert list(other) == epochs[e]
    other.rewind(1)
    assert list(other) == epochs[1] and other.epoch == 1
    assert list(other) == epochs[2] and other.epoch == 2
    assert epochs[0] != epochs[1] != epochs[2]


def test_passes_go_on_over_the_epoch_boundary() -> None:
    sampler = build(Proportional(), batch_size=16, num_batches=20)
    drawn = np.concatenate([np.concatenate(list(sampler)) for _ in range(6)])
    rare = drawn[TASK_OF_EXAMPLE[drawn] == 3]
    assert len(set(rare[:11].tolist())) == 11 and len(set(rare[11:22].tolist())) == 11


def test_every_iteration_begins_at_the_first_batch_not_consumed() -> None:
    straight = [batch for sampler in [build(Proportional())] for _ in range(3) for batch in sampler]
    sampler = build(Proportional())
    for i, _ in enumerate(sampler):
        sampler.update()
        if i == 9:
            break
    peeks = [next(iter(sampler)), next(iter(sampler))]
    assert peeks == [straight[10]] * 2 and sampler.epoch == 1
    assert list(sampler) == straight[10 : 10 + len(sampler)]
    sampler.advance(len(sampler))
    assert list(sampler) == straight[10 + len(sampler) : 10 + 2 * len(sampler)]
    assert sampler.epoch == 2


def test_without_counting_what_was_drawn_is_consumed() -> None:
    straight = list(build(Proportional()))
    sampler = build(Proportional())
    first = list(islice(sampler, 10))
    assert first + list(sampler)[:20] == straight[:30]
    assert sampler.consumed == 10 + len(sampler)


def test_an_epoch_may_be_run_again() -> None:
    sampler = build(Proportional())
    epochs = [
        list(islice(sampler, 7)),
        list(sampler),
        list(islice(sampler, 3)),
        list(islice(sampler, 3)),
        list(sampler),
    ]
    for e in (4, 3, 2, 1, 0):
        sampler.rewind(e)
        assert sampler.epoch == e and sampler.consumed == sum(map(len, epochs[:e]))
        again = list(sampler)
        assert again[: len(epochs[e])] == epochs[e] and len(again) == len(sampler)
    with pytest.raises(ValueError, match="epoch 3 has not begun yet: the run is in epoch 0"):
        sampler.rewind(3)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        sampler.rewind(-1)


def test_iter_alone_changes_nothing() -> None:
    sampler = build(Proportional())
    list(sampler)
    iter(sampler)
    iter(sampler)
    assert sampler.epoch == 0
    begun = iter(sampler)
    next(begun)
    assert sampler.epoch == 1


def test_an_epoch_run_through_again_has_the_same_batches_and_reports_count_only() -> None:
    sampler = build()
    first = list(trained(sampler, sampler, 15))
    entries = len(sampler.ledger)
    sampler.rewind(0)
    again = list(trained(sampler, sampler, 15))
    assert again == first
    assert len(sampler.ledger) == entries
    list(trained(sampler, sampler, 10))
    assert len(sampler.ledger) > entries
    assert sampler.ledger[entries].cause in {f"report on batch {j}" for j in range(15, 25)}


def test_set_epoch_checks() -> None:
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        build().set_epoch(-1)
