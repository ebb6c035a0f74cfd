"""The state of a tracker: everything that changes numbers, with digests; checked whole, then loaded whole, by name.

A state is a flat dict of plain values and CPU tensors. Each field's digest covers the field and all before it, so the
first one that does not match names what was changed. Nothing of the tracker is touched before everything was checked.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..capture import Gauge
from ..capture.tap import Keeps
from ..parameters.gauges import Gauges
from ..statistics.windows import WINDOW_APPEARANCES, WINDOW_STEPS

if TYPE_CHECKING:
    from .tracker import TaskGradTracker

VERSION = 3
SKETCH_SEED = 0
DIVERGED = "the run had diverged when it was saved: resume from an earlier state"


def _settings(tracker: TaskGradTracker) -> dict[str, Any]:
    """What a saved tracker and the one that loads must have in common."""
    return {
        "version": VERSION,
        "tasks": list(tracker.tasks),
        "mode": tracker.mode,
        "sketch_dim": tracker.sketch_dim,
        "sketch_seed": SKETCH_SEED,
        "memory_decay": float(tracker._steps.memory.decay),
        "window_steps": WINDOW_STEPS,
        "window_appearances": WINDOW_APPEARANCES,
    }


@dataclass(frozen=True)
class _Table:
    """A tensor of the state; its name is where ``Steps`` has it. ``shape`` in terms of T tasks, S = T + 1, K columns
    and P parameters; ``wrong`` marks values that cannot be, given the other fields, and ``need`` says what they must
    be."""

    shape: tuple[str | int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    wrong: Callable[[Tensor, Mapping[str, Any]], Tensor] | None = None
    need: str = ""


def _wrong_count(count: Tensor, state: Mapping[str, Any]) -> Tensor:
    wrong: Tensor = (count < 0) | (count > state["step"])
    return wrong


def _wrong_missed(missed: Tensor, state: Mapping[str, Any]) -> Tensor:
    wrong: Tensor = (missed < 0) | (missed > state["memory.count"][:, None])
    return wrong


def _wrong_last_seen(last: Tensor, state: Mapping[str, Any]) -> Tensor:
    count = state["memory.count"]
    never = count == 0
    wrong: Tensor = (last > state["step"]) | ((last == -1) != never) | ((last < count) & ~never)
    return wrong


def _wrong_sums(sums: Tensor, state: Mapping[str, Any]) -> Tensor:
    weight, squares, _, _, xx, yy, _ = sums
    rounding = 1 + 1e-9
    sizes = (weight < 0) | (weight > state["step"] * rounding) | (squares < 0) | (squares > weight * rounding)
    wrong: Tensor = sizes | (xx < 0) | (yy < 0)
    return wrong


# a field that is added here is saved, checked and loaded
TENSORS = {
    # the dtype it was begun with stays, also where the model was moved to another one
    "memory.ema": _Table(("T", "K"), (torch.float32, torch.float64)),
    "memory.before": _Table(("T", "K")),
    "memory.after": _Table(("T", "K")),
    "memory.count": _Table(("T",), (torch.int64,), _wrong_count, "from 0 to the step count"),
    "memory.missed": _Table(("T", "P"), (torch.int64,), _wrong_missed, "from 0 to memory.count"),
    "memory.last_seen": _Table(
        ("T",), (torch.int64,), _wrong_last_seen, "-1 for tasks never seen, else from memory.count to the step count"
    ),
    "carried.loss": _Table(("S",)),
    "carried.mass": _Table(("S",), wrong=lambda mass, state: mass < 0, need="at least 0"),
    "overwriting.moments.sums": _Table(
        (7, 3, "T"), wrong=_wrong_sums, need="weights from 0 to the step count and squares of at least 0"
    ),
}


def state_of(tracker: TaskGradTracker) -> dict[str, Any]:
    """See ``TaskGradTracker.state_dict``."""
    gauges = tracker._gauges
    tracker._steps.mail.land()
    state = {
        **_settings(tracker),
        "step": tracker._steps.count,
        "last_unmeasured": tracker._steps.schedule.last,
        "unmeasured": tracker._steps.schedule.unmeasured.tolist(),
        "verified": tracker._row_check.reason is None,
        # in the order of the columns: name, shape, number of columns, whether a step has used it, what its tap keeps
        "parameters": [
            [p.name, list(p.param.shape), p.sketch.dim, p.seen, p.layout.keeps] for p in gauges.gauges.values()
        ],
        "left_out": dict(gauges.left_out.reasons),
        "suspects": dict(gauges.left_out.suspects),
        **{name: _saved(attrgetter(name)(tracker._steps)) for name in TENSORS},
    }
    return {**state, "digest": _digests(state)}


def _saved(value: Tensor | npt.NDArray[np.float64]) -> Tensor:
    found = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
    return found.to("cpu", copy=True)


@dataclass
class Load:
    """A state that was checked against a tracker; ``commit`` puts it in force."""

    tracker: TaskGradTracker
    step: int
    last_unmeasured: int
    unmeasured: list[int]
    verified: bool
    gauges: list[Gauge]
    seen: list[bool]
    keeps: list[Keeps]
    left_out: dict[str, str]
    suspects: dict[str, str]
    tensors: dict[str, Tensor]

    def commit(self) -> None:
        """Replace everything. What the tracker had of the step under way is given up."""
        tracker, steps = self.tracker, self.tracker._steps
        tracker._gauges.adopt(self.gauges, self.seen, self.keeps, self.left_out, self.suspects)
        for name, value in self.tensors.items():
            owner, attr = name.rsplit(".", 1)
            on_host = isinstance(attrgetter(name)(steps), np.ndarray)
            setattr(attrgetter(owner)(steps), attr, value.cpu().numpy() if on_host else value)
        tracker._row_check.resume(self.verified)
        tracker._batches.pending.clear()
        steps.restart(self.step, torch.tensor(self.unmeasured, dtype=torch.int64, device="cpu"), self.last_unmeasured)


def check_state(tracker: TaskGradTracker, state: Mapping[str, Any]) -> Load:
    """Check ``state`` whole against the tracker, which stays as it is.

    Raises TypeError, KeyError or ValueError that names the field: missing, unknown, of the wrong type, shape or dtype,
    not finite, out of range, of another tracker or model, or changed since it was saved.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what state_dict() gave, got {type(state).__name__}")
    settings = _settings(tracker)
    for name, mine in settings.items():  # the version first: the fields of another one are others
        if _encoded(name, _field(state, name)) != _encoded(name, mine):
            raise ValueError(f"state_dict[{name!r}] is {_shown(state[name])}, this tracker has {mine!r}")
    plain = [*settings, "step", "last_unmeasured", "unmeasured", "verified", "parameters", "left_out", "suspects"]
    fields = [*plain, *TENSORS]
    strange = [name for name in state if name not in (*fields, "digest")]
    if strange:
        raise ValueError(f"state_dict has the unknown field {_shown(strange[0])}: it is no tracker's state")
    step, verified = _field(state, "step"), _field(state, "verified")
    if type(step) is not int or not 0 <= step < 1 << 62:
        raise ValueError(f"state_dict['step'] must be a number of steps, got {_shown(step)}")
    last, unmeasured = _field(state, "last_unmeasured"), _field(state, "unmeasured")
    if type(last) is not int or not 0 <= last <= step:
        raise ValueError(f"state_dict['last_unmeasured'] must be the number of a step up to {step}, got {_shown(last)}")
    if not isinstance(unmeasured, (list, tuple)) or len(unmeasured) != len(tracker.tasks):
        raise ValueError(f"state_dict['unmeasured'] must hold a number for each task, got {_shown(unmeasured)}")
    if any(type(n) is not int or not 0 <= n <= step for n in unmeasured):
        raise ValueError(f"state_dict['unmeasured'] must hold numbers from 0 to {step}, got {_shown(unmeasured)}")
    if type(verified) is not bool:
        raise TypeError(f"state_dict['verified'] must be True or False, got {_shown(verified)}")
    left_out, suspects = (_check_reasons(tracker._gauges, state, name) for name in ("left_out", "suspects"))
    gauges, seen, keeps = _check_parameters(tracker._gauges, _field(state, "parameters"), left_out)
    _check_digests(state, fields, plain)  # before what one that was changed would make look wrong
    sizes = {
        "T": len(tracker.tasks),
        "S": len(tracker.tasks) + 1,
        "K": sum(p.sketch.dim for p in gauges),
        "P": len(gauges),
    }
    for name, table in TENSORS.items():
        _check_form(name, _field(state, name), table, sizes)
    _check_digests(state, fields, fields)
    for name, table in TENSORS.items():
        _check_values(name, state[name].detach(), table, state)
    new = {name: reason for name, reason in left_out.items() if name not in tracker._gauges.left_out.reasons}
    tracker._gauges.left_out.warn(new)
    device = next(iter(tracker._gauges.params.values())).device  # the model may have been moved since track()
    with torch.inference_mode(False):  # or they could not be written to in the next step
        tensors = {name: state[name].detach().to(device, copy=True).contiguous() for name in TENSORS}
    return Load(tracker, step, last, list(unmeasured), verified, gauges, seen, keeps, left_out, suspects, tensors)


def _shown(value: Any) -> str:
    """A value for a message, cut to what one can read."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an int of thousands of digits somewhere inside
        return f"a {type(value).__name__} too large to show"


def _field(state: Mapping[str, Any], name: str) -> Any:
    if name not in state:
        raise KeyError(f"state_dict has no field {name!r}: it was cut, or is no tracker's state")
    return state[name]


def _check_reasons(gauges: Gauges, state: Mapping[str, Any], field: str) -> dict[str, str]:
    """A field that maps names of parameters to reasons."""
    reasons, where = _field(state, field), f"state_dict[{field!r}]"
    if not isinstance(reasons, Mapping):
        raise TypeError(f"{where} must map names to reasons, got {_shown(reasons)}")
    for name, reason in reasons.items():
        if type(name) is not str or type(reason) is not str:
            raise TypeError(f"{where} must map names to reasons, got {_shown(name)}: {_shown(reason)}")
        if name not in gauges.params:
            raise ValueError(f"{where} names the parameter {name!r}, which this model has not")
    return dict(reasons)


def _check_parameters(
    gauges: Gauges, parameters: Any, left_out: Mapping[str, str]
) -> tuple[list[Gauge], list[bool], list[Keeps]]:
    """The gauges that the state's columns belong to, in its order, new ones where this tracker has none yet; whether
    they were used, and what their taps keep."""
    if not isinstance(parameters, (list, tuple)):
        raise TypeError(f"state_dict['parameters'] must be a list, got {_shown(parameters)}")
    found: dict[str, Gauge] = {}
    seen, kept = [], []
    form = "[name, shape, columns, seen, keeps]"
    for entry in parameters:
        if not isinstance(entry, (list, tuple)) or len(entry) != 5:
            raise ValueError(f"state_dict['parameters'] must hold {form}, got {_shown(entry)}")
        name, shape, columns, used, keeps = entry
        whole = isinstance(shape, (list, tuple)) and all(type(n) is int for n in shape)
        if type(name) is not str or not whole or type(columns) is not int or type(used) is not bool:
            raise TypeError(f"state_dict['parameters'] must hold {form}, got {_shown(list(entry))}")
        if name in found:
            raise ValueError(f"state_dict['parameters'] names {name!r} twice")
        if name not in gauges.params:
            raise ValueError(f"state_dict['parameters'] names {name!r}, which this model has not")
        have = gauges.params[name].shape
        if tuple(shape) != tuple(have):
            raise ValueError(f"state_dict['parameters']: {name!r} has shape {_shown(tuple(shape))}, here {tuple(have)}")
        if name in gauges.left_out.unfit and name not in left_out:
            raise ValueError(
                f"state_dict['parameters'] has numbers of {name!r}, which this tracker leaves out "
                f"({gauges.left_out.unfit[name]}): track the model as it was tracked when the state was saved"
            )
        gauge = gauges.gauges.get(name) or gauges.make(name)
        if columns != gauge.sketch.dim:
            raise ValueError(
                f"state_dict['parameters']: {name!r} has {_shown(columns)} columns, here {gauge.sketch.dim}"
            )
        may = gauges.may_keep(gauge.sketch)
        if keeps not in may:
            raise ValueError(f"state_dict['parameters']: {name!r} keeps {_shown(keeps)}, here one of {', '.join(may)}")
        found[name] = gauge
        seen.append(used)
        kept.append(keeps)
    return list(found.values()), seen, kept


def _check_form(name: str, value: Any, table: _Table, sizes: Mapping[str, int]) -> None:
    where = f"state_dict[{name!r}]"
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.is_meta:
        got = f"a tensor on {value.device}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{where} must be a dense tensor with values, got {got}")
    shape = tuple(sizes[n] if isinstance(n, str) else n for n in table.shape)
    if value.dtype not in table.dtypes:
        raise TypeError(f"{where} must be {' or '.join(map(str, table.dtypes))}, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{where} must have shape {shape}, got {tuple(value.shape)}")


def _check_values(name: str, value: Tensor, table: _Table, state: Mapping[str, Any]) -> None:
    if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
        raise ValueError(f"state_dict[{name!r}] is not finite: {DIVERGED}")
    if table.wrong is not None and bool(table.wrong(value, state).any()):
        raise ValueError(f"state_dict[{name!r}] must be {table.need}")


def _encoded(name: str, value: Any) -> bytes:
    """A plain value of a field as bytes: equal for equal numbers, lists like tuples, and for nothing else."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"state_dict[{name!r}] must hold plain values, got {_shown(value)}: {error}") from None


def _enter(digest: Any, value: Tensor) -> None:
    dense = value.detach().to("cpu").resolve_neg().contiguous()
    digest.update(f"{dense.dtype} {tuple(dense.shape)} ".encode())
    digest.update(dense.reshape(-1).view(torch.uint8).numpy())


def _digests(state: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by field, in hexadecimal, each over its field and all before it."""
    digests, last = {}, ""
    for name, value in state.items():
        digest = hashlib.sha256(f"{last} {name} ".encode())
        if isinstance(value, Tensor):
            _enter(digest, value)
        else:
            digest.update(_encoded(name, value))
        digests[name] = last = digest.hexdigest()
    return digests


def _check_digests(state: Mapping[str, Any], fields: list[str], now: list[str]) -> None:
    """Of ``fields``, check those of ``now``, the first ones."""
    saved = _field(state, "digest")
    if not isinstance(saved, Mapping) or set(saved) != set(fields):
        raise ValueError("state_dict['digest'] must hold a digest of every other field: it was changed")
    for name, digest in _digests({name: state[name] for name in now}).items():
        if type(saved[name]) is not str or saved[name] != digest:
            raise ValueError(f"state_dict[{name!r}] does not match its digest: it was changed since it was saved")
