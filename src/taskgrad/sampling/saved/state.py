"""A sampler's saved state: everything is checked before anything is replaced.

Every field has a digest, so that what was changed since it was saved is found and named, whatever it is; what a state
made up with right digests could still do harm with is checked by itself.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..change import WIDTH
from ..data.task_index import numbered
from ..engine.index_numpy import MAX_BATCHES
from ..ledger import Ledger
from ..ledger_page import LATEST
from ..loading.epochs import Epochs
from .live_state import LiveState

FORMAT = 2


class Saved(NamedTuple):
    """A checked ``state``, a copy as JSON would give it back, and its ledger."""

    state: dict[str, Any]
    ledger: Ledger


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with its format and the digests of its fields."""
    return {"format": FORMAT, **state, "digests": {name: _digest(_json(value)) for name, value in state.items()}}


def check(state: Any) -> Saved:
    """Raises TypeError, KeyError or ValueError, whose message names the field, unless a sampler saved this state."""
    if isinstance(state, LiveState) and state.live:
        raise ValueError(
            "this state is not saved yet, it is that of whenever it is saved: pickle it, or keep "
            "copy.deepcopy(loader.state_dict())"
        )
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict() returned, got {type(state).__name__}")
    if type(state.get("format")) is not int or state["format"] != FORMAT:
        raise ValueError(f"not a sampler state of format {FORMAT}; its keys are {sorted(map(str, state))[:6]}")
    missing = [name for name in (*_FIELDS, "digests") if name not in state]
    if missing:
        raise KeyError(f"the sampler's state has no field {missing[0]!r}: it was cut or saved by another version")
    unknown = sorted(set(map(str, state)) - {*_FIELDS, "digests", "format"})
    if unknown:
        raise ValueError(
            f"the sampler's state has the field {reprlib.repr(unknown[0])}, which this version does not know"
        )
    digests = state["digests"]
    if not isinstance(digests, Mapping) or set(digests) != set(_FIELDS):
        raise ValueError("the field 'digests' of the sampler's state does not have one for each of its fields")
    plain = {}
    for name, fits in _FIELDS.items():
        try:
            plain[name] = json.loads(json.dumps(state[name], allow_nan=False))  # keys in the order they have
            text = _json(plain[name])
        except (TypeError, ValueError, RecursionError):
            raise _wrong(name, state[name]) from None
        if not fits(plain[name]):
            raise _wrong(name, state[name])
        # without snapshots a replay is needed, nothing else
        if not (name == "snapshots" and text == "[]") and not _same_text(digests[name], _digest(text)):
            raise ValueError(f"the field {name!r} of the sampler's state was changed since it was saved")
    return Saved(plain, _check_together(plain))


def _check_together(state: Mapping[str, Any]) -> Ledger:
    try:
        ledger = Ledger.from_dict(state["ledger"])
    except (TypeError, ValueError, KeyError) as error:
        raise type(error)(f"the field 'ledger' of the sampler's state: {error.args[0]}") from None
    tasks, consumed = len(ledger.sizes), state["consumed"]
    names = tuple(state["tasks"])
    if len(names) != tasks or len(set(names)) != tasks or not (state["named"] or names == numbered(tasks)):
        raise _wrong("tasks", state["tasks"])
    if not len(ledger) or ledger[-1].effective_at > 4 * MAX_BATCHES:  # a delay is up to that limit, too
        raise ValueError("the field 'ledger' of the sampler's state is empty, or goes on beyond 2**42 batches")
    if consumed < ledger.start:
        raise _wrong("consumed", consumed)
    if state["most"] < consumed:
        raise _wrong("most", state["most"])
    epoch, start, stop = state["epoch"]
    if not ledger.start <= start <= consumed <= stop or start == stop:
        raise _wrong("epoch", state["epoch"])
    runs = state["epochs"]
    if runs[0][1] != ledger.start or runs[0][0] > epoch or not Epochs.fit(runs):
        raise _wrong("epochs", runs)
    if Epochs.resumed(runs).start(epoch) != start:
        raise _wrong("epoch", state["epoch"])
    last = ledger[-1].effective_at
    for at, wanted, *_ in state["waiting"]:
        if at <= last or len(wanted) != tasks or not sum(wanted) <= 1 + 1e-6:
            raise _wrong("waiting", state["waiting"])
        last = at
    batches = [snapshot["batch"] for snapshot in state["snapshots"]]
    if not all(ledger.start < batch <= consumed for batch in batches):
        raise _wrong("snapshots", batches)
    losses = state["eval_losses"]
    if losses is not None and not set(losses) <= set(names):
        raise _wrong("eval_losses", losses)
    return ledger


def _wrong(name: str, value: Any) -> ValueError:
    try:
        shown = reprlib.repr(value)
    except ValueError:  # an integer with too many digits to be printed
        shown = f"a {type(value).__name__}"
    return ValueError(f"the field {name!r} of the sampler's state holds what no sampler saves: {shown}")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _same_text(value: Any, text: str) -> bool:
    return isinstance(value, str) and value == text


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_BATCHES


def _later(value: Any) -> bool:
    """A batch that may never come: the end of an epoch, or where a decision takes effect."""
    return type(value) is int and 0 <= value < LATEST


def _number(value: Any) -> bool:
    return type(value) is float  # JSON that is read strictly holds finite ones only


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _line(value: Any) -> bool:
    return _text(value) and value.isprintable() and len(value) <= WIDTH


def _list(value: Any, fits: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


def _mapping(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(map(_text, value)) and all(map(fits, value.values()))


def _decision(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and _later(value[0])
        and _list(value[1], lambda weight: _number(weight) and weight >= 0)
        and _line(value[2])
        and _line(value[3])
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "settings": lambda value: _mapping(value, lambda _: True),
    "policy": _text,
    "tasks": lambda value: _list(value, _text),
    "named": lambda value: isinstance(value, bool),
    "consumed": _count,
    "most": _count,
    "counting": lambda value: isinstance(value, bool),
    "epoch": lambda value: _list(value, _later, 3),
    "epochs": lambda value: _list(value, lambda run: _list(run, _later, 3)) and len(value) > 0,
    "ledger": lambda value: isinstance(value, Mapping),
    "waiting": lambda value: _list(value, _decision),
    "memory": lambda value: _mapping(value, lambda _: True),
    "eval_losses": lambda value: value is None or _mapping(value, _number),
    "evaluations": _count,
    "last_step": lambda value: value is None or (type(value) is int and value >= 0),
    "snapshots": lambda value: _list(value, lambda snap: isinstance(snap, Mapping) and _count(snap.get("batch"))),
}
