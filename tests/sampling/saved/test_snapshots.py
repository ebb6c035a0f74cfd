"""The engine's snapshots in a sampler's saved state: they spare a replay and change nothing."""

from __future__ import annotations

import json
import time
from itertools import islice
from typing import Any

import pytest

from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.policies import Uniform
from tests.sampling.helpers import sealed_again

LENGTH = 1500


def build(**options: Any) -> AdaptiveBatchSampler:
    return AdaptiveBatchSampler({"a": 900, "b": 70, "c": 7}, 4, Uniform(), num_batches=LENGTH, **options)


def state_after(batches: int, **options: Any) -> dict[str, Any]:
    sampler = build(**options)
    for _ in range(batches // LENGTH):
        list(sampler)
    list(islice(sampler, batches % LENGTH))
    state: dict[str, Any] = json.loads(json.dumps(sampler.state_dict()))
    return state


def test_the_nearest_snapshot_is_saved_and_the_stream_goes_on_with_or_without_it() -> None:
    state = state_after(1200)
    assert [snapshot["batch"] for snapshot in state["snapshots"]] == [1024]
    expected = list(islice(build(), 1210))[1200:]
    for changed in (state, {**state, "snapshots": []}):
        resumed = build()
        resumed.load_state_dict(changed)
        assert list(islice(resumed, 10)) == expected


def test_there_is_none_before_the_first_one_that_is_not_the_start() -> None:
    assert state_after(1000)["snapshots"] == []


def test_replay_saves_the_one_below_its_epoch_too() -> None:
    state = state_after(2 * LENGTH + 700, resume="replay")
    assert [snapshot["batch"] for snapshot in state["snapshots"]] == [2048, 3072]
    resumed = build(resume="replay")
    resumed.load_state_dict(state)
    assert list(islice(resumed, 3)) == [batch for s in [build()] for _ in range(3) for batch in s][2 * LENGTH :][:3]


def test_a_state_from_far_on_is_resumed_without_replaying_everything() -> None:
    far = build()
    for _ in range(20):
        list(far)
    state = far.state_dict()
    start = time.perf_counter()
    build().load_state_dict({**state, "snapshots": []})
    replay = time.perf_counter() - start
    resumed = build()
    start = time.perf_counter()
    resumed.load_state_dict(state)
    next(iter(resumed))
    assert time.perf_counter() - start < max(replay / 3, 0.02)


def test_a_changed_snapshot_is_refused() -> None:
    state = state_after(1200)
    state["snapshots"][0]["drawn"][0] += 1
    with pytest.raises(ValueError, match="field 'snapshots' of the sampler's state was changed"):
        build().load_state_dict(state)
    with pytest.raises(ValueError, match="snapshot in the saved state was changed"):
        build().load_state_dict(sealed_again(state))
