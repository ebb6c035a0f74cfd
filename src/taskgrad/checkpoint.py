"""Tracker and sampler in one file, of one step: written whole, read whole.

A safetensors file. The tracker's tensors are in it by name; what is plain of the states is JSON, in the uint8 tensors
``tracker`` and ``sampler`` (a ledger outgrows the file's header); the header has ``format``, ``version``, ``step`` and
a ``digest`` of these and the JSON. The tensors have digests in the tracker's state.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ._files import replacing
from .sampling import AdaptiveBatchSampler, AdaptiveSampler
from .tracking.tracker import TaskGradTracker

FORMAT = "taskgrad.checkpoint"
VERSION = "1"
_PREFIX = "tracker."

Sampler = AdaptiveBatchSampler | AdaptiveSampler


def save_checkpoint(
    path: str | os.PathLike[str], tracker: TaskGradTracker, sampler: Sampler | None = None, *, step: int
) -> None:
    """Write the state of ``tracker``, and of ``sampler`` if there is one, to the file ``path``.

    Call it between steps, after ``optimizer.step()``; it warns where a step is under way. The file is replaced
    atomically: if the process is killed at any moment it is the old one or the new one, whole. Model and optimizer are
    saved as ever; give both the same ``step``, and compare it with what ``load_checkpoint`` returns.

    With several ranks (``torch.distributed``), call it on rank 0 or on all: rank 0 writes, on the others nothing
    happens. Nobody waits for anybody, so put a barrier before another rank reads the file.

    Args:
        path: by custom ``*.safetensors``; the folder must exist.
        tracker: its state is that of the last closed step.
        sampler: what it has consumed is saved, not what a loader has drawn ahead.
        step: the training loop's count of steps, at least 0.

    Raises:
        TypeError: an argument of the wrong kind, or a policy that keeps what JSON cannot hold.
        ValueError: a negative step, or tracker and sampler of different tasks.
        OSError: the file cannot be written; IsADirectoryError, FileNotFoundError for a missing folder.
    """
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step must be an int, the number of steps taken, got {step!r}")
    stamp = operator.index(step)
    if not 0 <= stamp < 1 << 62:
        raise ValueError(f"step must be the number of steps taken, at least 0, got {step!r}")
    _check_pair(tracker, sampler)
    target = _file_path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path is a folder, {str(target)!r}: name a file in it, say checkpoint.safetensors")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write {target.name!r} to: create it")
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    under_way = tracker.under_way
    if under_way:
        warnings.warn(
            f"taskgrad: save_checkpoint() in the middle of a step: {under_way} batches that gradients were accumulated "
            "from are in no optimizer step yet, and a run that is resumed from it goes on behind them; save after "
            "optimizer.step()",
            stacklevel=2,
        )
    state = tracker.state_dict()
    tensors = {_PREFIX + name: value for name, value in state.items() if isinstance(value, Tensor)}
    parts = {"tracker": {name: value for name, value in state.items() if not isinstance(value, Tensor)}}
    if sampler is not None:
        parts["sampler"] = sampler.state_dict()
    encoded = {name: _encode(stamp, part) for name, part in parts.items()}
    tensors |= {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in encoded.items()}
    header = {"format": FORMAT, "version": VERSION, "step": str(stamp), "digest": _digest(stamp, encoded)}
    data = save(
        tensors, metadata=header
    )  # not save_file: it makes temporary files of its own, which kills leave behind
    with replacing(target) as temporary:
        temporary.write_bytes(data)


def load_checkpoint(path: str | os.PathLike[str], tracker: TaskGradTracker, sampler: Sampler | None = None) -> int:
    """Continue from a file that ``save_checkpoint`` wrote, before or after the model is loaded; returns its ``step``.

    Tracker and sampler are made as the saved ones were, see their ``load_state_dict``. Both are loaded or, where
    anything raises, none. With several ranks, call it on all of them: every rank reads the file by itself.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: there is no file to read.
        ValueError: no checkpoint, one that was cut or changed or is of a newer version; with a sampler where none is
            given, or without one where one is; of another tracker or sampler.
        TypeError, KeyError: a state with a field missing or of the wrong type.
    """
    _check_pair(tracker, sampler)
    source = _file_path(path)
    if source.is_dir():
        raise IsADirectoryError(f"path is a folder, {str(source)!r}: name the file that save_checkpoint wrote")
    if not source.is_file():  # nor a pipe, which would be waited for
        raise FileNotFoundError(f"there is no checkpoint file {str(source)!r}")
    step, parts = _read(source)
    if sampler is None and "sampler" in parts:
        raise ValueError(f"{str(source)!r} has a sampler's state too: pass the sampler, or its stream would begin anew")
    if sampler is not None and "sampler" not in parts:
        raise ValueError(f"{str(source)!r} has no sampler's state: it was saved without; pass none, or another file")
    load = tracker._check_load(parts["tracker"])
    if sampler is not None:
        sampler.load_state_dict(parts["sampler"])  # checks everything before it replaces anything
    load.commit()
    return step


def _check_pair(tracker: TaskGradTracker, sampler: Sampler | None) -> None:
    if not isinstance(tracker, TaskGradTracker):
        raise TypeError(f"tracker must be what taskgrad.track returned, got {type(tracker).__name__}")
    if sampler is None:
        return
    if not isinstance(sampler, AdaptiveBatchSampler | AdaptiveSampler):
        raise TypeError(f"sampler must be an AdaptiveBatchSampler or AdaptiveSampler, got {type(sampler).__name__}")
    if len(sampler.tasks) != len(tracker.tasks):
        raise ValueError(f"the tracker has the tasks {list(tracker.tasks)}, the sampler {list(sampler.tasks)}")


def _file_path(path: str | os.PathLike[str]) -> Path:
    found = os.fspath(path)
    if not isinstance(found, str):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    if not found or "\0" in found:
        raise ValueError(f"path must name a file, got {found!r}")
    return Path(found)


def _encode(step: int, state: Mapping[str, Any]) -> bytes:
    return json.dumps({"step": step, "state": state}, allow_nan=False).encode()


def _digest(step: int, encoded: Mapping[str, bytes]) -> str:
    """SHA-256 over version, step and the JSON parts, in hexadecimal."""
    whole = hashlib.sha256(f"{FORMAT} {VERSION} {step}".encode())
    for name in sorted(encoded):
        whole.update(f" {name} {len(encoded[name])} ".encode() + encoded[name])
    return whole.hexdigest()


def _read(source: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Step and states of a checkpoint file, whose own digest was checked; read again if it was replaced meanwhile."""
    while True:
        file = os.stat(source).st_ino
        try:
            return _read_once(source)
        except ValueError:
            if os.stat(source).st_ino == file:
                raise


def _read_once(source: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    damaged = f"{str(source)!r} was cut or changed since it was saved: load an earlier checkpoint"
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{str(source)!r} is a safetensors file of something else, not by save_checkpoint")
            if header.get("version") != VERSION:
                raise ValueError(
                    f"{str(source)!r} is a checkpoint of version {header.get('version')!r}, this taskgrad reads "
                    f"version {VERSION}: use the taskgrad that saved it, or a newer one"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{str(source)!r} is no checkpoint, or was cut: {error}") from None
    encoded = {}
    for name in ("tracker", "sampler"):
        data = tensors.pop(name, None)
        if data is not None:
            encoded[name] = data.reshape(-1).view(torch.uint8).numpy().tobytes()
    step = header.get("step", "")
    if (
        "tracker" not in encoded
        or not re.fullmatch("[0-9]{1,19}", step)
        or header.get("digest") != _digest(int(step), encoded)
    ):
        raise ValueError(damaged)
    parts = {name: json.loads(data) for name, data in encoded.items()}
    stamps = {name: part["step"] for name, part in parts.items()}
    if set(stamps.values()) != {int(step)}:
        raise ValueError(f"{str(source)!r} was put together from parts of different steps: {stamps}, the file {step}")
    states = {name: part["state"] for name, part in parts.items()}
    for name, value in tensors.items():
        states["tracker"][name.removeprefix(_PREFIX)] = value
    return int(step), states
