"""The append-only weight ledger: every mix that was ever in force, from which batch on, and why.

Weights are integers that sum to 2**40, so the ledger reads the same on every machine. Together with seed, sizes and
batch size it determines the whole stream of batches. Full pages of entries are packed once and opened when they are
asked for, so a long ledger costs little memory and little time in a checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import json
import operator
import re
import reprlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import ledger_page
from .arrays import FloatArray, IntArray, frozen_ints
from .engine.quota import ONE
from .ledger_page import Before, Entry, Page

WHYS = 16
"""Full pages that keep their whys, the newest ones; with the page under way that is 16,384 entries or more."""
__all__ = ["Entry", "Ledger"]
_LIMIT = 1 << 62
_FIELDS = ("sizes", "data", "start", "era", "past", "entries", "pages", "digest", "checksum")
_HEX = re.compile(r"[0-9a-f]{64}")


class Ledger:
    """Entries for data of fixed ``sizes``, from batch ``start`` on; ``data`` says which example is of which task.

    When the data change, a new ledger takes over: ``era`` counts them, ``past`` holds the earlier ones in JSON form
    (``to_dict``, and ``"tasks"``: their names), and the digest covers them. Raises TypeError, ValueError or KeyError
    where these are not what ``to_dict`` gives.
    """

    def __init__(
        self,
        sizes: Sequence[int] | IntArray,
        *,
        data: str = "",
        start: int = 0,
        era: int = 0,
        past: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.sizes = tuple(_whole("sizes", n) for n in sizes)
        if not self.sizes or sum(self.sizes) >= _LIMIT:
            raise ValueError("sizes must hold one size per task, below 2**62 together")
        self.data = _text("data", data)
        self.start = _whole("start", start)
        self.past = _checked(past)
        self.era = _whole("era", era)
        if self.era != len(self.past):
            raise ValueError(f"era is {self.era}, but past holds {len(self.past)} earlier ledgers")
        if self.past and self.past[-1]["start"] > self.start:
            raise ValueError(f"start is {self.start}, before that of the ledger in past, {self.past[-1]['start']}")
        self._pages: list[Page] = []
        self._tail: list[Entry] = []
        self._opened: tuple[int, list[Entry]] | None = None  # a page's number and entries

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)  # a copy shares no list, and its arrays are read-only too

    def append(
        self, effective_at: int, weights: IntArray, cause: str, bound: Sequence[str] = (), why: str = ""
    ) -> Entry:
        """Add an entry. Raises ValueError unless it is later than the last one, its weights fit the ledger and its
        texts can be printed on a line of 200 characters."""
        weights = np.asarray(weights)
        if weights.dtype != np.int64 or weights.shape != (len(self.sizes),):
            raise ValueError(
                f"weights must be int64 of shape ({len(self.sizes)},), got {weights.dtype} of shape {weights.shape}"
            )
        if (weights < 0).any() or (weights > ONE).any() or int(weights.sum()) != ONE:
            raise ValueError(f"weights must not be negative and must sum to 2**40, got a sum of {int(weights.sum())}")
        last = self._last_batch()
        if last is None and effective_at != self.start:
            raise ValueError(f"the first entry must take effect at batch {self.start}, got {effective_at}")
        if last is not None and effective_at <= last:
            raise ValueError(f"the ledger is append-only: batch {effective_at} is not after its last entry, at {last}")
        names = tuple(bound)
        for name, text in (("cause", cause), ("bound", " ".join(names)), ("why", why)):
            ledger_page.check_texts(name, [text])
        entry = Entry(_whole("effective_at", effective_at), frozen_ints(weights), cause, names, why)
        self._tail.append(entry)
        if len(self._tail) == ledger_page.SIZE:
            self._add(ledger_page.packed(self._tail, self._before()))
            self._tail = []
        return entry

    def at(self, batch: int) -> Entry:
        """The entry in force at ``batch``. Raises ValueError for a batch before ``start``, or where there is none."""
        if not len(self):
            raise ValueError("the ledger is empty: nothing is in force yet")
        if batch < self.start:
            raise ValueError(f"batch {batch} lies before batch {self.start}, where this ledger begins")
        if self._tail and self._tail[0].effective_at <= batch:
            entries = self._tail
        else:
            entries = self._page(bisect_right(self._pages, batch, key=lambda page: page.first) - 1)
        return entries[bisect_right(entries, batch, key=lambda entry: entry.effective_at) - 1]

    def mean(self, start: int, stop: int) -> FloatArray:
        """Intended mix over batches ``start:stop``: probabilities [T], float64, correctly rounded."""
        high, low = np.zeros((2, len(self.sizes)), dtype=np.int64)
        if stop - start >= 1 << 42:
            raise ValueError(f"a mean is over fewer than 2**42 batches, got {start}:{stop}")
        firsts = [*(page.first for page in self._pages), *(entry.effective_at for entry in self._tail[:1])]
        for (starts, weights), end in zip(self.blocks(), [*firsts[1:], stop], strict=False):
            until = np.append(starts[1:], end)
            batches = np.maximum(np.minimum(until, stop) - np.maximum(starts, start), 0)
            if batches.any():  # in two halves, which no sum of fewer than 2**42 batches overflows
                high += batches @ (weights >> 20)
                low += batches @ (weights & ((1 << 20) - 1))
        count = max(stop - start, 1) * ONE
        return np.array([((h << 20) + w) / count for h, w in zip(high.tolist(), low.tolist(), strict=True)])

    def blocks(self) -> Iterator[tuple[IntArray, IntArray]]:
        """All entries as arrays, many at a time: batches int64 [n] and weights int64 [n, T], not to be changed."""
        for page in self._pages:
            yield page.arrays()
        if self._tail:
            yield _arrays(self._tail)

    def digest(self) -> str:
        """SHA-256 over data, batches and weights, in hexadecimal: equal digests mean equal streams.

        What does not bear on the stream, causes, guards and whys, is in the saved form's ``checksum`` instead.
        """
        data = self.data.encode("utf-8", "surrogatepass")
        header = np.array(
            [self.era, self.start, len(self), len(data), len(self.sizes), *self.sizes], dtype="<i8"
        ).tobytes()
        total = hashlib.sha256(header + data)
        for earlier in self.past:
            total.update(bytes.fromhex(earlier["digest"]))
        for page in self._pages:
            total.update(page.digest)
        if self._tail:
            total.update(ledger_page.digest(*_arrays(self._tail)))
        return total.hexdigest()

    def __len__(self) -> int:
        return ledger_page.SIZE * len(self._pages) + len(self._tail)

    def __iter__(self) -> Iterator[Entry]:
        for number in range(len(self._pages)):
            yield from self._page(number)
        yield from self._tail

    def __getitem__(self, index: int) -> Entry:
        position = range(len(self))[operator.index(index)]
        number, within = divmod(position, ledger_page.SIZE)
        return (self._page(number) if number < len(self._pages) else self._tail)[within]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: a few bytes for each weight that changed. ``pages`` are as in ``ledger_page``, in base64."""
        pages = [*self._pages, *([ledger_page.packed(self._tail, self._before())] if self._tail else [])]
        fields = {
            "sizes": list(self.sizes),
            "data": self.data,
            "start": self.start,
            "era": self.era,
            "past": [dict(earlier) for earlier in self.past],
            "entries": len(self),
            "pages": [[base64.b64encode(s).decode() for s in (p.mixes, p.notes, p.whys)] for p in pages],
            "digest": self.digest(),
        }
        return {**fields, "checksum": _checksum(fields, self.past)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ledger:
        """The ledger that ``to_dict`` wrote.

        Raises TypeError, ValueError or KeyError, naming the field, for anything else: the digest must be that of the
        entries, and the checksum that of everything.
        """
        _check_fields(data)
        past = _checked(_listed("past", data["past"]))
        return cls._read(data, past)

    @classmethod
    def _read(cls, data: Mapping[str, Any], past: tuple[dict[str, Any], ...]) -> Ledger:
        """The ledger of the saved form ``data``, whose ``past`` is known to be right."""
        ledger = cls(_listed("sizes", data["sizes"]), data=data["data"], start=data["start"])
        ledger.past, ledger.era = past, _whole("era", data["era"])
        if ledger.era != len(past):
            raise ValueError(f"era is {ledger.era}, but there are {len(past)} earlier ledgers in past")
        count = _whole("entries", data["entries"])
        pages = _listed("pages", data["pages"])
        if len(pages) != -(-count // ledger_page.SIZE):
            raise ValueError(f"pages: {count} entries do not fill {len(pages)} pages")
        for name in ("digest", "checksum"):
            if not _HEX.fullmatch(_text(name, data[name])):
                raise ValueError(f"{name} must be 64 hexadecimal digits, got {_shown(data[name])}")
        streams = [_streams(f"pages[{number}]", page) for number, page in enumerate(pages)]
        if _checksum(data, past) != data["checksum"]:
            raise ValueError("the ledger does not match its checksum: the saved state was changed or cut")
        full = count // ledger_page.SIZE
        for number, (mixes, notes, whys) in enumerate(streams):
            entries = min(count - number * ledger_page.SIZE, ledger_page.SIZE)
            try:
                page = ledger_page.read(mixes, notes, whys, entries, ledger._before(), kept=number >= full - WHYS)
            except ValueError as error:
                raise ValueError(f"pages[{number}].{error}") from None
            last = ledger._last_batch()
            if page.first != ledger.start if last is None else page.first <= last:
                raise ValueError(f"pages[{number}].mixes: it begins at batch {page.first}, after {last}")
            if entries == ledger_page.SIZE:
                ledger._add(page)
            else:
                ledger._tail = page.entries()
        if ledger.digest() != data["digest"]:
            raise ValueError("the ledger does not match its digest: the saved state was changed or cut")
        return ledger

    def _add(self, page: Page) -> None:
        self._pages.append(page)
        if len(self._pages) > WHYS:
            self._pages[-WHYS - 1] = replace(self._pages[-WHYS - 1], whys=b"")
            self._opened = None

    def _page(self, number: int) -> list[Entry]:
        if self._opened is None or self._opened[0] != number:
            self._opened = (number, self._pages[number].entries())
        return self._opened[1]

    def _before(self) -> Before:
        """What the first entry after the full pages follows."""
        if not self._pages:
            return Before(self.start, np.zeros(len(self.sizes), dtype=np.int64))
        return self._pages[-1].after

    def _last_batch(self) -> int | None:
        if self._tail:
            return self._tail[-1].effective_at
        return self._pages[-1].after.batch if self._pages else None


def _arrays(entries: Sequence[Entry]) -> tuple[IntArray, IntArray]:
    return np.array([entry.effective_at for entry in entries]), np.stack([entry.weights for entry in entries])


def _checked(past: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """``past`` where every earlier ledger in it can be read, given those before it."""
    done: list[dict[str, Any]] = []
    for number, earlier in enumerate(past):
        try:
            _check_fields(earlier, "tasks")
            if _listed("past", earlier["past"]):
                raise ValueError("past must be empty in an earlier ledger: the earlier ones stand before it")
            ledger = Ledger._read(earlier, tuple(done))
            tasks = _listed("tasks", earlier.get("tasks", ["" for _ in ledger.sizes]))
            if len([_text("tasks", task) for task in tasks]) != len(ledger.sizes):
                raise ValueError(f"tasks must be {len(ledger.sizes)} names, got {len(tasks)}")
            if done and done[-1]["start"] > ledger.start:
                raise ValueError(f"start is {ledger.start}, before that of the ledger before, {done[-1]['start']}")
        except (TypeError, ValueError, KeyError) as error:
            raise type(error)(f"past[{number}]: {error.args[0]}") from None
        done.append(dict(earlier))
    return tuple(done)


def _checksum(fields: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over a saved form's ``fields``; for those of ``past`` stand their checksums and names."""
    own = {name: fields[name] for name in _FIELDS if name not in ("past", "checksum")}
    own["past"] = [[earlier["checksum"], earlier.get("tasks")] for earlier in past]
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _check_fields(data: Any, *optional: str) -> None:
    if not isinstance(data, Mapping):
        raise TypeError(f"a saved ledger must be a mapping, got {_shown(data)}")
    for name in _FIELDS:
        if name not in data:
            raise KeyError(f"the saved ledger has no field {name!r}")
    unknown = [name for name in data if name not in (*_FIELDS, *optional)]
    if unknown:
        raise ValueError(f"the saved ledger has a field {_shown(unknown[0])}; its fields are {[*_FIELDS, *optional]}")


def _whole(name: str, value: Any) -> int:
    """``value`` as an int in [0, 2**62)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be made of integers, got {_shown(value)}")
    found = operator.index(value)
    if not 0 <= found < _LIMIT:
        raise ValueError(f"{name} must be at least 0 and below 2**62, got {_shown(found)}")
    return found


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {_shown(value)}")
    return value


def _listed(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {_shown(value)}")
    return value


def _streams(name: str, page: Any) -> tuple[bytes, bytes, bytes]:
    """The three streams of a page in base64."""
    fields = [_text(name, field) for field in _listed(name, page)]
    if len(fields) != 3:
        raise ValueError(f"{name} must hold mixes, notes and whys, got {len(fields)} texts")
    try:
        mixes, notes, whys = (base64.b64decode(field, validate=True) for field in fields)
    except ValueError as error:
        raise ValueError(f"{name} is not base64: {error}") from None
    return mixes, notes, whys


def _shown(value: Any) -> str:
    """``value`` in a message, however large or deep it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)
