"""Whether a sampler can go on from a saved state, and the engine that it goes on with."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from ..engine.index import IndexEngine
from ..ledger import Ledger
from ..settings import Settings

_REPLAY = 1 << 16
_FARTHEST_REPLAY = 1 << 30
"""Batches; no run is that long, and with a hundred tasks they take half an hour."""


def check_same_data(
    state: Mapping[str, Any], ledger: Ledger, settings: Settings, tasks: tuple[str, ...], named: bool
) -> None:
    """Raise ValueError where the state is of other data than a sampler over ``tasks``, with names of theirs or
    without (``named``)."""
    sizes = tuple(settings.sizes.tolist())
    renamed = named and state["named"] and tuple(state["tasks"]) != tasks
    if ledger.sizes != sizes or renamed:
        raise ValueError(
            f"the saved ledger is for tasks of sizes {dict(zip(state['tasks'], ledger.sizes, strict=True))}, this "
            f"sampler's data are {dict(zip(tasks, sizes, strict=True))}: call rebase(state) to continue the "
            "run on other data, in a new ledger era"
        )
    if ledger.data != settings.data:
        raise ValueError(
            f"the saved ledger is for other examples of the same number per task: saved {ledger.data}, here "
            f"{settings.data} (ids, ranges and shares count as different): call rebase(state) to continue "
            "the run on other data, in a new ledger era"
        )


def check_built_alike(state: Mapping[str, Any], settings: Settings, policy: str) -> None:
    """Raise ValueError where the state is of a sampler with other options, or with another policy."""
    saved = {**state["settings"], "policy": state["policy"]}
    here = {**settings.to_dict(), "policy": policy}
    size, batch, replicas = saved.get("global_batch_size"), settings.global_batch_size, settings.num_replicas
    if type(size) is int and 0 < size != batch:
        if size % replicas == 0:
            remedy = f"pass batch_size={size // replicas}"
        else:
            remedy = f"no batch_size on {replicas} ranks keeps it, use a number of ranks that divides {size}"
        raise ValueError(
            f"the saved run has batches of {size} examples on all ranks together, this sampler's have {replicas} x "
            f"{batch // replicas}: {remedy}"
        )
    unknown = sorted(set(saved) - set(here))
    if unknown or "policy" in state["settings"]:
        raise ValueError(f"the field 'settings' of the sampler's state has {unknown or ['policy']}, unknown here")
    differ = [name for name in here if name not in saved or saved[name] != here[name]]
    if differ:
        listed = "; ".join(
            f"{name}: saved {reprlib.repr(saved.get(name))}, here {reprlib.repr(here[name])}" for name in differ
        )
        raise ValueError(f"the sampler differs from the saved one ({listed}): build it the same way")
    if state["epoch"][2] - state["epoch"][1] != settings.length:
        raise ValueError(f"the field 'epoch' of the sampler's state is no epoch of {settings.length} batches")


def new_engine(settings: Settings, ledger: Ledger) -> IndexEngine:
    """The engine of the ledger's era, without any weights yet."""
    return IndexEngine(
        settings.seed,
        settings.sizes,
        settings.global_batch_size,
        first_batch=ledger.start,
        era=ledger.era,
        num_replicas=settings.num_replicas,
        probe_every=settings.probe_every,
        max_draws=settings.max_draws,
    )


def engine_at(state: Mapping[str, Any], ledger: Ledger, settings: Settings) -> IndexEngine:
    """The engine for a saved state, at its batch; raises ValueError where its snapshots do not fit, or so much is to be
    replayed without them that it would never end."""
    engine = new_engine(settings, ledger)
    for batches, weights in ledger.blocks():
        for batch, mix in zip(batches.tolist(), weights, strict=True):
            engine.commit(batch, mix)
    known = [ledger.start]
    try:
        known += [snapshot["batch"] for snapshot in state["snapshots"] if engine.restore(snapshot)]
    except ValueError as error:
        raise ValueError(f"the field 'snapshots' of the sampler's state: {error}") from None
    for first in _first_batches(settings, state["consumed"], state["epoch"][1]):
        at = max(batch for batch in known if batch <= first)
        if first - at > _FARTHEST_REPLAY:
            raise ValueError(
                f"the field 'consumed' of the sampler's state is {state['consumed']}, and 'snapshots' holds none "
                f"of the {_FARTHEST_REPLAY} batches before {first}: that is the state of no run"
            )
        while at < first:  # in pieces, so that it can be interrupted
            at = min(at + _REPLAY, first)
            engine.totals(at)
        known.append(first)
    return engine


def snapshots(
    engine: IndexEngine, ledger: Ledger, settings: Settings, consumed: int, epoch_start: int
) -> list[dict[str, Any]]:
    """The engine's nearest below the batches that a run resumed after ``consumed`` may start at. They follow from the
    rest and may be missing; without them the first batch is found by replaying the quotas of all before it."""
    batches = _first_batches(settings, consumed, epoch_start)
    found = {snapshot["batch"]: snapshot for snapshot in map(engine.snapshot, batches)}
    return [snapshot for batch, snapshot in found.items() if batch > ledger.start]


def _first_batches(settings: Settings, consumed: int, epoch_start: int) -> list[int]:
    """Those that a resumed run draws first."""
    return [epoch_start, consumed] if settings.resume == "replay" else [consumed]
