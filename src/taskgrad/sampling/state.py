"""A sampler's saved state: everything is checked before anything is replaced.

Every field has a digest, so that what was changed since it was saved is found and named, whatever it is; what a state
made up with right digests could still do harm with is checked by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from .index_numpy import MAX_BATCHES
from .ledger import Ledger
from .task_index import numbered

FORMAT = 2


class Saved(NamedTuple):
    """A checked ``state`` and its ledger."""

    state: Mapping[str, Any]
    ledger: Ledger


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with its format and the digests of its fields."""
    return {"format": FORMAT, **state, "digests": {name: _digest(value) for name, value in state.items()}}


def check(state: Any) -> Saved:
    """Raises TypeError, KeyError or ValueError, whose message names the field, unless a sampler saved this state."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict() returned, got {type(state).__name__}")
    if state.get("format") != FORMAT or type(state["format"]) is not int:
        raise ValueError(f"not a sampler state of format {FORMAT}; its keys are {sorted(map(str, state))[:6]}")
    missing = [name for name in (*_FIELDS, "digests") if name not in state]
    if missing:
        raise KeyError(f"the sampler's state has no field {missing[0]!r}: it was cut or saved by another version")
    unknown = sorted(set(map(str, state)) - {*_FIELDS, "digests", "format"})
    if unknown:
        raise ValueError(f"the sampler's state has the field {unknown[0]!r}, which this version does not know")
    digests = state["digests"]
    if not isinstance(digests, Mapping) or set(digests) != set(_FIELDS):
        raise ValueError("the field 'digests' of the sampler's state does not have one for each of its fields")
    for name, fits in _FIELDS.items():
        if not fits(state[name]):
            raise _wrong(name, state[name])
    for name in _FIELDS:
        if name == "snapshots" and state[name] == []:
            continue  # they only spare a replay
        try:
            digest = _digest(state[name])
        except (TypeError, ValueError, RecursionError):
            raise _wrong(name, state[name]) from None
        if digest != digests[name]:
            raise ValueError(f"the field {name!r} of the sampler's state was changed since it was saved")
    return Saved(state, _check_together(state))


def _check_together(state: Mapping[str, Any]) -> Ledger:
    ledger = Ledger.from_dict(state["ledger"])
    tasks, consumed = len(ledger.sizes), state["consumed"]
    names = tuple(state["tasks"])
    if len(names) != tasks or len(set(names)) != tasks or not (state["named"] or names == numbered(tasks)):
        raise _wrong("tasks", state["tasks"])
    if consumed < ledger.start or not len(ledger):
        raise _wrong("consumed", consumed)
    if state["most"] < consumed:
        raise _wrong("most", state["most"])
    _, start, stop = state["epoch"]
    if not ledger.start <= start <= consumed <= stop or start == stop:
        raise _wrong("epoch", state["epoch"])
    runs = state["epochs"]
    if runs[0][1] < ledger.start or any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(runs)):
        raise _wrong("epochs", runs)
    last = ledger[-1].effective_at
    for at, shares, *_ in state["waiting"]:
        if at <= last or len(shares) != tasks or not 0 <= sum(shares) <= 1 + 1e-6:
            raise _wrong("waiting", state["waiting"])
        last = at
    losses = state["eval_losses"]
    if losses is not None and not set(losses) <= set(names):
        raise _wrong("eval_losses", losses)
    return ledger


def _wrong(name: str, value: Any) -> ValueError:
    shown = repr(value)
    return ValueError(
        f"the field {name!r} of the sampler's state holds what no sampler saves: "
        f"{shown if len(shown) < 200 else shown[:200] + '...'}"
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_BATCHES


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list(value: Any, fits: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


def _mapping(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(map(_text, value)) and all(map(fits, value.values()))


def _decision(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and _count(value[0])
        and _list(value[1], lambda share: _number(share) and share >= 0)
        and _text(value[2])
        and _text(value[3])
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "settings": lambda value: _mapping(value, lambda _: True),
    "policy": _text,
    "tasks": lambda value: _list(value, _text),
    "named": lambda value: isinstance(value, bool),
    "consumed": _count,
    "most": _count,
    "counting": lambda value: isinstance(value, bool),
    "epoch": lambda value: _list(value, _count, 3),
    "epochs": lambda value: _list(value, lambda run: _list(run, _count, 3)) and len(value) > 0,
    "ledger": lambda value: isinstance(value, Mapping),
    "waiting": lambda value: _list(value, _decision),
    "memory": lambda value: _mapping(value, lambda _: True),
    "eval_losses": lambda value: value is None or _mapping(value, _number),
    "evaluations": _count,
    "last_step": lambda value: value is None or (type(value) is int and value >= 0),
    "snapshots": lambda value: _list(value, lambda snapshot: isinstance(snapshot, Mapping)),
}
