"""The state that a loader takes early and saves late, through everything that saves, copies or reads it."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.data import DataLoader

from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.saved.live_state import LiveState
from tests.sampling.helpers import TASK_OF_EXAMPLE, Identity, Report
from tests.sampling.saved.test_state import LENGTH, build

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which torchdata calls
DELAY = 12


def sampler_of(**options: Any) -> AdaptiveBatchSampler:
    return build(delay=DELAY, **options)


def loader_of(sampler: AdaptiveBatchSampler, workers: int, **options: Any) -> Any:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    data = Identity(len(TASK_OF_EXAMPLE))
    return stateful.StatefulDataLoader(data, batch_sampler=sampler, num_workers=workers, **options)


def trained(batches: Iterator[Any], sampler: AdaptiveBatchSampler, count: int) -> list[list[int]]:
    rows = []
    for batch in islice(batches, count):
        rows.append(batch.tolist())
        sampler.update(Report(step=sampler._stream.uncounted + 1, value=float(sum(rows[-1]))))
    return rows


@pytest.fixture(scope="module")
def straight() -> list[list[int]]:
    sampler = sampler_of()
    loader = DataLoader(Identity(len(TASK_OF_EXAMPLE)), batch_sampler=sampler)
    return [*trained(iter(loader), sampler, LENGTH), *trained(iter(loader), sampler, LENGTH)]


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def live() -> tuple[LiveState, AdaptiveBatchSampler]:
    """One that was taken after 3 batches, of a sampler that has gone on since."""
    sampler = sampler_of()
    trained(map(torch.tensor, iter(sampler)), sampler, 3)
    state = LiveState(sampler._state)
    trained(map(torch.tensor, iter(sampler)), sampler, 8)
    return state, sampler


READERS: dict[str, Callable[[LiveState], Any]] = {
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "an old pickle": lambda state: pickle.loads(pickle.dumps(state, protocol=0)),
    "torch.save": saved,
    "in a list in torch.save": lambda state: saved({"a": [state]})["a"][0],
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "its own copy": lambda state: state.copy(),
    "json": lambda state: json.loads(json.dumps(state)),
    "json, indented": lambda state: json.loads(json.dumps({"x": state}, indent=1, sort_keys=True))["x"],
    "dict": dict,
    "unpacked": lambda state: {**state},
    "a comprehension": lambda state: {name: state[name] for name in state},
    "items": lambda state: dict(state.items()),
    "update": lambda state: [made := {}, made.update(state)][0],
    "or": lambda state: state | {},
    "or, the other way": lambda state: {} | state,
    "get": lambda state: {name: state.get(name) for name in reversed(list(reversed(state)))},
    "keys and values": lambda state: dict(zip(state.keys(), state.values(), strict=True)),
}


@pytest.mark.parametrize("how", READERS)
def test_what_reads_it_gets_the_state_of_now(how: str, live: tuple[LiveState, AdaptiveBatchSampler]) -> None:
    state, sampler = live
    found = READERS[how](state)
    assert not isinstance(found, LiveState)
    assert found == sampler.state_dict() and found["consumed"] == 11
    trained(map(torch.tensor, iter(sampler)), sampler, 1)
    assert found["consumed"] == 11 and state["consumed"] == 12
    resumed = sampler_of()
    resumed.load_state_dict(found)
    assert resumed.consumed == 11


def test_what_it_says_of_itself(live: tuple[LiveState, AdaptiveBatchSampler]) -> None:
    state, sampler = live
    now = sampler.state_dict()
    assert len(state) == len(now) and "consumed" in state and "live" not in state and state
    assert state == now and now == state and state != {} and state == LiveState(sampler._state)
    assert repr(state) == repr(now) and state.get("live") is None and state.get("x", 3) == 3
    with pytest.raises(KeyError):
        state["live"]
    with pytest.raises(ValueError, match="this state is not saved yet"):
        sampler.load_state_dict(state)
    with pytest.raises(ValueError, match="this state is not saved yet"):
        sampler.rebase(state)


WRITERS: dict[str, Callable[[LiveState], Any]] = {
    "set": lambda state: state.__setitem__("consumed", 11),
    "update": lambda state: state.update(consumed=11),
    "or": lambda state: state.__ior__({"consumed": 11}),
    "default": lambda state: state.setdefault("consumed", 5),
}


@pytest.mark.parametrize("how", WRITERS)
def test_written_to_it_stays_what_it_was_then(how: str, live: tuple[LiveState, AdaptiveBatchSampler]) -> None:
    state, sampler = live
    WRITERS[how](state)
    trained(map(torch.tensor, iter(sampler)), sampler, 4)
    assert state["consumed"] == 11 and pickle.loads(pickle.dumps(state))["consumed"] == 11
    resumed = sampler_of()
    resumed.load_state_dict(state)
    assert resumed.consumed == 11


def test_taken_out_of_it(live: tuple[LiveState, AdaptiveBatchSampler]) -> None:
    state, sampler = live
    assert state.pop("consumed") == 11 and "consumed" not in state and state.pop("consumed", 0) == 0
    with pytest.raises(KeyError, match="'consumed'"):
        sampler.load_state_dict(state)
    del state["most"]
    assert "most" not in state and state.popitem()[0] == "digests"
    state.clear()
    assert state == {} and not state


@pytest.mark.parametrize("order", ["loader only", "sampler first", "loader first"])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_torchdata_end_to_end(straight: list[list[int]], workers: int, every: int, order: str) -> None:
    sampler = sampler_of()
    loader = loader_of(sampler, workers, snapshot_every_n_steps=every)
    assert trained(iter(loader), sampler, 12) == straight[:12]
    states = saved({"loader": loader.state_dict(), "sampler": sampler.state_dict()})
    resumed = sampler_of()
    loader = loader_of(resumed, workers, snapshot_every_n_steps=every)
    if order == "sampler first":
        resumed.load_state_dict(states["sampler"])
    loader.load_state_dict(states["loader"])
    if order == "loader first":
        resumed.load_state_dict(states["sampler"])
    assert trained(iter(loader), resumed, 100) == straight[12:LENGTH]
    assert trained(iter(loader), resumed, 100) == straight[LENGTH:]


@pytest.mark.parametrize("before, after", [(0, 2), (2, 1)])
def test_torchdata_itself_refuses_another_number_of_workers(before: int, after: int) -> None:
    sampler = sampler_of()
    loader = loader_of(sampler, before)
    batches = iter(loader)
    trained(batches, sampler, 6)
    state = saved(loader.state_dict())
    resumed = sampler_of()
    other = loader_of(resumed, after)
    other.load_state_dict(state)
    with pytest.raises(AssertionError):
        iter(other)
    resumed = sampler_of()  # the sampler's own state is for any
    resumed.load_state_dict(saved(sampler.state_dict()))
    assert trained(iter(loader_of(resumed, after)), resumed, 5) == trained(batches, sampler, 5)


@pytest.mark.parametrize("order", ["loader only", "sampler first", "loader first"])
@pytest.mark.parametrize("workers", [0, 2])
def test_accelerate_with_a_stateful_loader(straight: list[list[int]], workers: int, order: str) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    accelerate = pytest.importorskip("accelerate")
    options = accelerate.utils.DataLoaderConfiguration(use_stateful_dataloader=True)

    def prepared(sampler: AdaptiveBatchSampler) -> Any:
        data = Identity(len(TASK_OF_EXAMPLE))
        loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
        return accelerate.Accelerator(dataloader_config=options, cpu=True).prepare(loader)

    sampler = sampler_of()
    loader = prepared(sampler)
    assert trained(iter(loader), sampler, 12) == straight[:12]
    states = saved({"loader": loader.state_dict(), "sampler": sampler.state_dict()})
    resumed = sampler_of()
    loader = prepared(resumed)
    if order == "sampler first":
        resumed.load_state_dict(states["sampler"])
    loader.load_state_dict(states["loader"])
    if order == "loader first":
        resumed.load_state_dict(states["sampler"])
    assert trained(iter(loader), resumed, 100) == straight[12:LENGTH]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_checkpoint_of_a_loader(straight: list[list[int]], tmp_path: Path) -> None:
    """It fills the keys of a state that is there already; where these are others, the state is refused by name."""
    sampler = sampler_of()
    loader = loader_of(sampler, 2)
    batches = iter(loader)
    trained(batches, sampler, 6)
    dcp.save({"loader": loader.state_dict()}, checkpoint_id=tmp_path / "a", no_dist=True)
    trained(batches, sampler, 1)

    def loaded(batches_before: int) -> AdaptiveBatchSampler:
        other = sampler_of()
        filled = loader_of(other, 2)
        rows = iter(filled)
        trained(rows, other, batches_before)
        state = {"loader": filled.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / "a", no_dist=True)
        resumed = sampler_of()
        again = loader_of(resumed, 2)
        again.load_state_dict(state["loader"])
        assert trained(iter(again), resumed, 5) == straight[6:11]
        return resumed

    assert loaded(6).consumed == 11
    with pytest.raises(ValueError, match=r"the field '(memory|waiting)' of the sampler's state was changed"):
        loaded(0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_checkpoint_of_a_sampler_as_text(tmp_path: Path) -> None:
    sampler = sampler_of()
    trained(map(torch.tensor, iter(sampler)), sampler, 9)
    dcp.save({"sampler": json.dumps(sampler.state_dict())}, checkpoint_id=tmp_path / "a", no_dist=True)
    state = {"sampler": ""}
    dcp.load(state, checkpoint_id=tmp_path / "a", no_dist=True)
    resumed = sampler_of()
    resumed.load_state_dict(json.loads(state["sampler"]))
    assert resumed.state_dict() == sampler.state_dict()
