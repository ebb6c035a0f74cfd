"""A page of the ledger: ``SIZE`` entries packed once, about 10 bytes each, and read back as arrays.

Three zlib streams. ``mixes``: from which batch on, and the weights, as what changed against the entry before: one bit
for every weight, then the differences of those that moved, all task by task, their bytes sorted by significance. The
largest task's weight follows from the sum. ``notes``: causes and guards, as JSON; of a cause only its wording is kept
as text, its numbers are counted from the entry's batch, which makes them alike. ``whys``: JSON.

A stream is never decompressed beyond what its entries can fill. What is read may be damaged: every fault raises
ValueError.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import IntArray, frozen_ints
from .engine.quota import ONE

SIZE = 1024
"""Entries in a page; only a ledger's last page has fewer."""
LONGEST = 200
"""Characters of a cause, of a why, and of the names of an entry's guards together."""
LATEST = 1 << 62
"""Batches are counted below this."""
_MIXES_LEVEL = 4  # their bytes are zeros or noise, and with many tasks a higher level takes seconds
_TEXT_LEVEL = 9
_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,14})(?![0-9])")
_GAP = "\0"  # where a number was; no entry's text holds it


@dataclass(frozen=True)
class Entry:
    """Weights int64 [T] (units of 2**-40) in force from batch ``effective_at`` on.

    ``cause`` says where they come from, ``bound`` names the guards that changed what the policy had asked for, and
    ``why`` says in the policy's words what changed and for which tasks; empty in old entries of a long ledger.
    """

    effective_at: int
    weights: IntArray
    cause: str
    bound: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Before:
    """What a page's first entry is told apart from: the batch and the weights int64 [T] of the entry before it."""

    batch: int
    weights: IntArray


@dataclass(frozen=True)
class Page:
    """A packed page. ``first``: the batch of its first entry; ``before`` and ``after``: what the
    page's first entry and the next page's are told apart from; ``digest`` is that of its mixes."""

    count: int
    first: int
    before: Before
    after: Before
    digest: bytes
    mixes: bytes
    notes: bytes
    whys: bytes

    def arrays(self) -> tuple[IntArray, IntArray]:
        """Batches int64 [n] and weights int64 [n, T], read-only."""
        return unpack_mixes(self.mixes, self.count, self.before)

    def entries(self) -> list[Entry]:
        """The entries, in order."""
        starts, weights = self.arrays()
        causes, bounds = unpack_notes(self.notes, starts)
        whys = unpack_whys(self.whys, self.count)
        return [Entry(*fields) for fields in zip(starts.tolist(), weights, causes, bounds, whys, strict=True)]


def packed(entries: Sequence[Entry], before: Before) -> Page:
    """The page of ``entries``, at least one."""
    starts = np.array([entry.effective_at for entry in entries], dtype=np.int64)
    weights = np.stack([entry.weights for entry in entries])
    mixes = _pack_mixes(starts, weights, before)
    return _page(starts, weights, before, (mixes, _pack_notes(entries), _pack_json([entry.why for entry in entries])))


def read(mixes: bytes, notes: bytes, whys: bytes, count: int, before: Before, kept: bool) -> Page:
    """The page whose streams were saved, decoded once to see that it can be; whys only where they are ``kept``."""
    starts, weights = unpack_mixes(mixes, count, before)
    unpack_notes(notes, starts)
    if kept != bool(whys):
        raise ValueError("whys: the newest pages have them, the others do not")
    unpack_whys(whys, count)
    return _page(starts, weights, before, (mixes, notes, whys))


def _page(starts: IntArray, weights: IntArray, before: Before, streams: tuple[bytes, bytes, bytes]) -> Page:
    after = Before(int(starts[-1]), frozen_ints(weights[-1]))
    return Page(len(starts), int(starts[0]), before, after, digest(starts, weights), *streams)


def digest(starts: IntArray, weights: IntArray) -> bytes:
    """SHA-256 of batches int64 [n] and weights int64 [n, T], one mix after the other."""
    return hashlib.sha256(np.column_stack([starts, weights]).astype("<i8").tobytes()).digest()


def _pack_mixes(starts: IntArray, weights: IntArray, before: Before) -> bytes:
    batches = np.diff(starts, prepend=before.batch)
    changes = np.delete(np.diff(weights, axis=0, prepend=before.weights[None]), _implied(before), axis=1).T
    moved = changes != 0
    differences = changes[moved]
    folded = (differences << 1) ^ (differences >> 63)  # small, whatever the sign
    return zlib.compress(_planes(batches) + np.packbits(moved).tobytes() + _planes(folded), _MIXES_LEVEL)


def unpack_mixes(stream: bytes, count: int, before: Before) -> tuple[IntArray, IntArray]:
    """Batches int64 [n], ascending, and weights int64 [n, T], each mix summing to 2**40; both read-only."""
    tasks = len(before.weights)
    cells = count * (tasks - 1)
    bits = -(-cells // 8)
    raw = _inflate("mixes", stream, 8 * count + bits + 8 * cells)
    head, mask, tail = raw[: 8 * count], raw[8 * count : 8 * count + bits], raw[8 * count + bits :]
    if len(head) != 8 * count or len(mask) != bits:
        raise ValueError(f"mixes: the stream is too short for {count} entries of {tasks} tasks")
    moved = np.unpackbits(np.frombuffer(mask, np.uint8), count=cells).astype(bool)
    if len(tail) != 8 * int(moved.sum()):
        raise ValueError(f"mixes: the stream holds {len(tail)} bytes of changes, {8 * int(moved.sum())} were announced")
    folded = _from_planes(tail)
    changes = np.zeros(cells, dtype=np.int64)
    changes[moved] = (folded.view(np.uint64) >> np.uint64(1)).view(np.int64) ^ -(folded & 1)
    implied = _implied(before)
    others = np.delete(before.weights, implied)[:, None] + np.cumsum(changes.reshape(tasks - 1, count), axis=1)
    gaps = _from_planes(head)
    starts = before.batch + np.cumsum(gaps)
    # No sum wraps around unseen: a step within these bounds, from a value within them, stays below 2**63.
    if (changes < -ONE).any() or (changes > ONE).any() or (others < 0).any() or (others > ONE).any():
        raise ValueError("mixes: a weight is negative or above 2**40")
    if (gaps < 0).any() or (gaps >= LATEST).any() or (starts < 0).any() or (starts >= LATEST).any():
        raise ValueError("mixes: a batch is negative or beyond 2**62")
    if (gaps[1:] == 0).any():
        raise ValueError("mixes: the entries' batches do not ascend")
    rest = ONE - others.sum(axis=0)
    if (rest < 0).any():
        raise ValueError("mixes: an entry's weights sum to more than 2**40")
    weights = np.ascontiguousarray(np.insert(others, implied, rest, axis=0).T)
    starts.setflags(write=False)
    weights.setflags(write=False)
    return starts, weights


def _implied(before: Before) -> int:
    """The task whose weights are left out; before the first entry all are zero, and it is the first task."""
    return int(before.weights.argmax())


def _pack_notes(entries: Sequence[Entry]) -> bytes:
    wordings: dict[str, int] = {}
    guards: dict[tuple[str, ...], int] = {}
    numbers: list[int] = []
    worded, bound = [], []
    for entry in entries:
        worded.append(wordings.setdefault(_NUMBER.sub(_GAP, entry.cause), len(wordings)))
        numbers += [int(number) - entry.effective_at for number in _NUMBER.findall(entry.cause)]
        bound.append(guards.setdefault(entry.bound, len(guards)))
    return _pack_json([list(wordings), worded, numbers, [list(names) for names in guards], bound])


def unpack_notes(stream: bytes, starts: IntArray) -> tuple[list[str], list[tuple[str, ...]]]:
    """Causes and guards of the entries at the batches ``starts``."""
    count = len(starts)
    fields = _unpack_json("notes", stream, 8 * LONGEST * count)
    if not (isinstance(fields, list) and len(fields) == 5 and all(isinstance(field, list) for field in fields)):
        raise ValueError("notes: five lists are needed")
    wordings, worded, numbers, guards, bound = fields
    if not all(isinstance(text, str) for text in wordings):
        raise ValueError("notes: a cause is no text")
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in guards):
        raise ValueError("notes: the names of guards are no lists of texts")
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (*numbers, *worded, *bound)):
        raise ValueError("notes: a number is no integer")
    pieces = [text.split(_GAP) for text in wordings]
    names = [tuple(each) for each in guards]
    if len(worded) != count or len(bound) != count:
        raise ValueError(f"notes: {len(worded)} causes and {len(bound)} lists of guards for {count} entries")
    if not all(0 <= i < len(pieces) for i in worded) or not all(0 <= i < len(names) for i in bound):
        raise ValueError("notes: an entry's cause or guards are missing")
    if sum(len(pieces[i]) - 1 for i in worded) != len(numbers):
        raise ValueError("notes: the causes need other numbers than there are")
    following = iter(numbers)
    causes = []
    for at, i in zip(starts.tolist(), worded, strict=True):
        parts = pieces[i]
        causes.append(parts[0] + "".join(f"{next(following) + at}{part}" for part in parts[1:]))
    check_texts("notes", causes)
    check_texts("notes", [" ".join(each) for each in names])
    return causes, [names[i] for i in bound]


def unpack_whys(stream: bytes, count: int) -> list[str]:
    """The entries' whys; all empty where the page does not keep them."""
    if not stream:
        return [""] * count
    whys = _unpack_json("whys", stream, 8 * LONGEST * count)
    if not (isinstance(whys, list) and len(whys) == count and all(isinstance(why, str) for why in whys)):
        raise ValueError(f"whys: a list of {count} texts is needed")
    check_texts("whys", whys)
    return whys


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raise ValueError unless all ``texts`` are printable and no longer than ``LONGEST``."""
    for text in texts:
        if not text.isprintable() or len(text) > LONGEST:
            raise ValueError(f"{name}: a text must be printable, of {LONGEST} characters at most, got {text[:300]!r}")


def _planes(values: IntArray) -> bytes:
    """The bytes of int64 [n], the lowest of all values first."""
    out: bytes = values.astype("<i8").view(np.uint8).reshape(-1, 8).T.tobytes()
    return out


def _from_planes(data: bytes) -> IntArray:
    planes: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(8, -1)
    return np.ascontiguousarray(planes.T).view("<i8").reshape(-1).astype(np.int64)


def _pack_json(value: Any) -> bytes:
    return zlib.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), _TEXT_LEVEL)


def _unpack_json(name: str, stream: bytes, most: int) -> Any:
    data = _inflate(name, stream, most)
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from None


def _inflate(name: str, stream: bytes, most: int) -> bytes:
    """What the zlib ``stream`` holds, at most ``most`` bytes."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(stream, most + 1)
    except zlib.error as error:
        raise ValueError(f"{name}: not a zlib stream ({error})") from None
    if len(data) > most or not inflater.eof or inflater.unused_data:
        raise ValueError(f"{name}: the stream is cut, goes on behind its end, or holds more than {most} bytes")
    return data
