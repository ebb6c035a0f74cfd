from __future__ import annotations

import base64
import copy
import json
import pickle
import random
import resource
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling import Entry, Ledger, ledger_page
from taskgrad.sampling import ledger as ledger_module
from taskgrad.sampling.engine.quota import ONE, to_units
from taskgrad.sampling.ledger_page import Before


def units(*values: float) -> np.ndarray:
    array = np.array(values)
    return to_units(array / array.sum())


def earlier(batch: int = 1) -> dict[str, Any]:
    """A ledger of other data in its saved form."""
    ledger = Ledger([5, 5])
    ledger.append(0, units(1, batch), "initial")
    return ledger.to_dict()


def filled(**options: Any) -> Ledger:
    ledger = Ledger([30, 10], **options)
    ledger.append(ledger.start, units(3, 1), "initial")
    ledger.append(ledger.start + 20, units(1, 1), "report on batch 11", ("budget",))
    return ledger


def test_the_entry_in_force_and_the_mean_mix() -> None:
    ledger = filled()
    assert [ledger.at(k).effective_at for k in (0, 19, 20, 10**9)] == [0, 0, 20, 20]
    assert np.allclose(ledger.mean(0, 40), [0.625, 0.375])
    assert np.allclose(ledger.mean(10, 20), [0.75, 0.25])
    assert np.allclose(ledger.mean(30, 40), [0.5, 0.5])
    assert ledger.mean(5, 5).tolist() == [0, 0]
    assert len(ledger) == 2 and ledger[-1].bound == ("budget",)
    assert [entry.cause for entry in ledger] == ["initial", "report on batch 11"]


def test_json_round_trip_keeps_everything() -> None:
    ledger = filled(data="ids", start=7, era=1, past=[earlier()])
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    assert again.to_dict() == ledger.to_dict()
    assert again.digest() == ledger.digest()


def test_the_digest_covers_what_determines_the_stream() -> None:
    ledgers = [
        filled(),
        filled(data="ids"),
        filled(start=1),
        filled(era=1, past=[earlier()]),
        filled(era=1, past=[earlier(2)]),
        Ledger([30, 10]),
    ]
    longer = filled()
    longer.append(30, units(1, 2), "x")
    later = Ledger([30, 10])
    later.append(0, units(3, 1), "initial")
    later.append(21, units(1, 1), "x")
    digests = [ledger.digest() for ledger in (*ledgers, longer, later)]
    assert len(set(digests)) == len(digests)
    assert filled().digest() == digests[0]


def test_entries_cannot_be_changed() -> None:
    weights = units(3, 1)
    ledger = Ledger([30, 10])
    entry = ledger.append(0, weights, "initial")
    weights[0] = 0
    assert int(entry.weights.sum()) == ONE
    with pytest.raises(ValueError, match="read-only"):
        entry.weights[0] = 5


@pytest.mark.parametrize(
    "effective_at, weights, message",
    [
        (20, units(1, 1), "append-only: batch 20 is not after its last entry, at 20"),
        (30, units(1, 1, 1), r"int64 of shape \(2,\), got int64 of shape \(3,\)"),
        (30, np.array([0.5, 0.5]), "got float64"),
        (30, np.array([ONE, 1]), "must sum to 2"),
        (30, np.array([ONE + 1, -1]), "must not be negative"),
    ],
)
def test_bad_entries_raise(effective_at: int, weights: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled().append(effective_at, weights, "test")


def test_the_first_entry_is_at_the_start() -> None:
    with pytest.raises(ValueError, match="first entry must take effect at batch 4"):
        Ledger([1], start=4).append(5, np.array([ONE]), "x")
    with pytest.raises(ValueError, match="before batch 4"):
        filled(start=4).at(3)


def test_a_tampered_ledger_is_refused() -> None:
    data = filled().to_dict()
    data["pages"][0][1] = data["pages"][0][2]
    with pytest.raises(ValueError, match="does not match its checksum"):
        Ledger.from_dict(data)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: "".join(c for c in text if c.isprintable()))
CAUSES = st.one_of(TEXTS, st.builds("report on batch {}, {} late".format, st.integers(0), st.integers(0, 99)))


@st.composite
def histories(draw: Any) -> tuple[Ledger, list[Entry]]:
    """A ledger and what was appended to it."""
    tasks = draw(st.integers(1, 5))
    start = draw(st.sampled_from([0, 7, 10**12]))
    ledger = Ledger(draw(st.lists(st.integers(0, 10**9), min_size=tasks, max_size=tasks)), start=start)
    entries: list[Entry] = []
    at = start
    for _ in range(draw(st.integers(0, 14))):
        parts = draw(st.lists(st.sampled_from([0, 1, 3, 10**6]), min_size=tasks, max_size=tasks))
        parts[draw(st.integers(0, tasks - 1))] += 1
        bound = draw(st.lists(st.sampled_from(["budget", "min_weight"]), max_size=2))
        entries.append(Entry(at, units(*parts), draw(CAUSES), tuple(bound), draw(TEXTS)))
        ledger.append(at, entries[-1].weights, entries[-1].cause, bound, entries[-1].why)
        at += draw(st.sampled_from([1, 10, 10**6]))
    return ledger, entries


@contextmanager
def small_pages(size: int = 3, whys: int = 2) -> Iterator[None]:
    """Pages of few entries, so that short ledgers have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_page, "SIZE", size)
        patch.setattr(ledger_module, "WHYS", whys)
        yield


def fields(entries: Iterable[Entry]) -> list[tuple[Any, ...]]:
    return [(e.effective_at, e.weights.tolist(), e.cause, e.bound, e.why) for e in entries]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 4))
def test_what_was_appended_can_be_read_packed_or_not(data: st.DataObject, size: int) -> None:
    with small_pages(size):
        ledger, entries = data.draw(histories())
        without = max(len(entries) // size - 2, 0) * size
        expected = [(*entry[:4], "" if i < without else entry[4]) for i, entry in enumerate(fields(entries))]
        for each in (ledger, Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))):
            assert fields(each) == expected and len(each) == len(entries)
            assert fields(each[i] for i in range(-len(entries), 0)) == expected
            assert each.digest() == ledger.digest() and each.to_dict() == ledger.to_dict()
            blocks = list(each.blocks())
            assert [int(b) for starts, _ in blocks for b in starts] == [e.effective_at for e in entries]
            assert [row.tolist() for _, rows in blocks for row in rows] == [e.weights.tolist() for e in entries]
            assert fields(pickle.loads(pickle.dumps(each))) == expected
            for at in (len(entries), -len(entries) - 1):
                with pytest.raises(IndexError):
                    each[at]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(0, 14))
def test_a_loaded_ledger_goes_on_like_the_one_that_was_saved(data: st.DataObject, cut: int) -> None:
    with small_pages():
        ledger, entries = data.draw(histories())
        again = Ledger(ledger.sizes, start=ledger.start)
        for i, e in enumerate(entries):
            if i == cut:
                again = Ledger.from_dict(again.to_dict())
            again.append(e.effective_at, e.weights, e.cause, e.bound, e.why)
        assert again.to_dict() == ledger.to_dict()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_at_and_mean_against_brute_force(data: st.DataObject) -> None:
    with small_pages():
        ledger, entries = data.draw(histories().filter(lambda drawn: len(drawn[1]) > 0))
        begins = ledger.start
        starts = sorted({b + d for b in [e.effective_at for e in entries] for d in (-1, 0, 1)} - {begins - 1})
        for batch in starts:
            expected = [e for e in entries if e.effective_at <= batch][-1]
            assert ledger.at(batch).effective_at == expected.effective_at
            assert ledger.at(batch).weights.tolist() == expected.weights.tolist()
        first, last = sorted(data.draw(st.tuples(st.sampled_from(starts), st.sampled_from(starts))))
        total = [Fraction(0)] * len(ledger.sizes)
        until = [*(e.effective_at for e in entries[1:]), last]
        for e, end in zip(entries, until, strict=True):
            batches = max(min(end, last) - max(e.effective_at, first), 0)
            total = [t + batches * w for t, w in zip(total, e.weights.tolist(), strict=True)]
        assert ledger.mean(first, last).tolist() == [float(t / (max(last - first, 1) * ONE)) for t in total]


def long(count: int, tasks: int = 3) -> Ledger:
    rng = np.random.default_rng(3)
    ledger = Ledger([10_000, *[1000] * (tasks - 1)])
    for i in range(count):
        shares = 1 + rng.random(tasks)
        ledger.append(10 * i, to_units(shares / shares.sum()), f"report on batch {max(10 * i - 65, 0)}", (), f"why {i}")
    return ledger


def test_a_long_ledger_is_small_and_keeps_the_newest_whys() -> None:
    ledger = long(19_000)
    again = Ledger.from_dict(ledger.to_dict())
    oldest = 18 * 1024 - 16 * 1024
    assert [ledger[i].why for i in (0, oldest - 1, oldest, 18_999)] == ["", "", f"why {oldest}", "why 18999"]
    assert again[12_345].cause == "report on batch 123385" and again.at(123_459).effective_at == 123_450
    # Two of the three weights are random numbers of 40 bits, in base64: 13.3 characters for each entry.
    assert len(json.dumps(ledger.to_dict())) < 19_000 * 18
    assert sum(len(page[1]) for page in ledger.to_dict()["pages"]) < 19_000 // 4


def eras() -> dict[str, Any]:
    """The saved form of a ledger of the third era."""
    past: list[dict[str, Any]] = []
    for era in range(3):
        ledger = Ledger([30 + era, 10, 5], data=f"ids {era}", start=40 * era, era=era, past=past)
        for i in range(7):
            cause = f"report on batch {40 * era + 5 * i}"
            ledger.append(40 * era + 5 * i, units(3 + i, 1, 1 + era), cause, ("budget",), f"raised b {i}")
        past = [*past, {**ledger.to_dict(), "past": [], "tasks": ["a", "b", "c"]}]
    return ledger.to_dict()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a saved form stands."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def nested(depth: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


STRANGE = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**30,
    10**5000,
    1 << 62,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    "é\n",
    "0" * 64,
]
STRANGE += [[], {}, [[]], [1, 2], {"a": 1}, nested(5000), b"bytes", ["", "", ""], "AAAA", "\ud800"]


def mutate(data: dict[str, Any], rng: random.Random) -> str:
    """Change something in ``data``, and say what."""
    *way, last = rng.choice(list(places(data)))
    parent = data
    for key in way:
        parent = parent[key]
    old = parent[last]
    kind = rng.choice(("delete", "strange", "strange", "duplicate", "near", "near", "near"))
    if kind == "delete":
        del parent[last]
    elif kind == "duplicate" and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(old))
    elif kind == "duplicate":
        parent[f"{last}x"] = copy.deepcopy(old)
    elif kind == "near" and isinstance(old, str) and old:
        i = rng.randrange(len(old))
        parent[last] = rng.choice((old[:i], old[:i] + rng.choice("aZ0f+/=") + old[i + 1 :], old[:i] + old[i:] * 2))
    elif kind == "near" and isinstance(old, int):
        parent[last] = old + rng.choice((-1, 1, 1 << 40))
    elif kind == "near" and isinstance(old, list) and old:
        parent[last] = rng.choice((old[::-1], old[1:], old + old))
    else:
        parent[last] = rng.choice(STRANGE)
    return f"{kind} at {(*way, last)}"


def is_same(data: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal, as JSON tells values apart; what JSON does not have is equal to nothing."""
    try:
        return json.dumps(data) == json.dumps(other)
    except (TypeError, ValueError, RecursionError):
        return False


@pytest.mark.parametrize("seed", range(3))
def test_no_changed_state_is_accepted(seed: int) -> None:
    with small_pages():
        good = eras()
        Ledger.from_dict(copy.deepcopy(good))
        rng = random.Random(seed)
        refused = 0
        for _ in range(1000):
            data = copy.deepcopy(good)
            what = mutate(data, rng)
            if is_same(data, good):
                continue
            with pytest.raises((TypeError, ValueError, KeyError)) as error:
                Ledger.from_dict(data)
                pytest.fail(f"accepted: {what}")
            assert type(error.value) in (TypeError, ValueError, KeyError), what
            named = (
                "past",
                "sizes",
                "data",
                "start",
                "era",
                "entries",
                "pages",
                "digest",
                "checksum",
                "field",
                "mapping",
            )
            assert any(name in str(error.value) for name in named), (what, error.value)
            assert len(str(error.value)) < 600, what
            refused += 1
        assert refused > 900


@pytest.mark.parametrize("seed", range(3))
def test_a_forged_checksum_hides_no_other_stream(seed: int) -> None:
    """With a right checksum, what decides the stream is still refused, and everything else is still sound."""
    with small_pages():
        good = eras()
        rng = random.Random(seed)
        accepted = 0
        for _ in range(700):
            data = copy.deepcopy(good)
            what = mutate(data, rng)
            try:
                ledger_module._checked(data["past"])
                data["checksum"] = ledger_module._checksum(data, data["past"])
            except (TypeError, ValueError, KeyError, RecursionError):
                continue
            try:
                ledger = Ledger.from_dict(data)
            except (TypeError, ValueError, KeyError):
                continue
            accepted += 1
            assert ledger.digest() == good["digest"], what
            fields(ledger)
        assert accepted > 0


@pytest.mark.parametrize("stream", range(3))
@pytest.mark.parametrize("content", [b"\0" * 10**8, b"[" * 10**6, b"", b"[[],[],[],[],[]]", b"\xff" * 400])
def test_what_a_page_holds_is_bounded(stream: int, content: bytes) -> None:
    data = filled().to_dict()
    data["pages"][0][stream] = base64.b64encode(zlib.compress(content)).decode()
    data["checksum"] = ledger_module._checksum(data, ())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"pages\[0\]\.(mixes|notes|whys): "):
        Ledger.from_dict(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("change", [lambda s: s + b"x", lambda s: s[:-1], lambda s: b"x" + s, lambda s: b""])
@pytest.mark.parametrize("stream", range(3))
def test_streams_end_where_they_should(stream: int, change: Any) -> None:
    data = filled().to_dict()
    data["pages"][0][stream] = base64.b64encode(change(base64.b64decode(data["pages"][0][stream]))).decode()
    data["checksum"] = ledger_module._checksum(data, ())
    with pytest.raises(ValueError, match=r"pages\[0\]\.(mixes|notes|whys): "):
        Ledger.from_dict(data)


@pytest.mark.parametrize("batches", [(1, 20), (0, 0), (20, 0)])
def test_batches_out_of_order_are_refused_whatever_digests_say(batches: tuple[int, int]) -> None:
    for size in (1, 2):
        with small_pages(size):
            ledger = filled()
            entries = [replace(e, effective_at=at) for e, at in zip(ledger, batches, strict=True)]
            before, ledger._pages, ledger._tail = Before(0, np.zeros(2, dtype=np.int64)), [], []
            for i in range(0, 2, size):
                ledger._pages.append(ledger_page.packed(entries[i : i + size], before))
                before = ledger._pages[-1].after
            with pytest.raises(ValueError, match=r"pages\[\d\]\.mixes: (it begins at|the entries' batches|a batch is)"):
                Ledger.from_dict(ledger.to_dict())


def test_whys_go_with_their_page_even_where_it_was_open() -> None:
    with small_pages(whys=1):
        ledger = long(4)
        assert ledger[0].why == "why 0"
        for i in range(4, 7):
            ledger.append(10 * i, units(1, 1, i), "x", (), "x")
        assert ledger[0].why == ""


def test_whys_stand_in_the_newest_pages_only() -> None:
    with small_pages(whys=1):
        data = long(10).to_dict()
        assert [bool(page[2]) for page in data["pages"]] == [False, False, True, True]
        data["pages"][0][2] = data["pages"][3][2]
        data["checksum"] = ledger_module._checksum(data, ())
        with pytest.raises(ValueError, match=r"pages\[0\]\.whys: the newest pages have them"):
            Ledger.from_dict(data)


@pytest.mark.parametrize("wrong", [None, [], "ledger", 3])
def test_something_else_is_no_saved_ledger(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a saved ledger must be a mapping, got"):
        Ledger.from_dict(wrong)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sizes": []}, ValueError, "sizes must hold one size per task"),
        ({"sizes": [3, -1]}, ValueError, "sizes must be at least 0 and below 2"),
        ({"sizes": [1 << 61, 1 << 61]}, ValueError, "below 2.*62 together"),
        ({"sizes": [2.0]}, TypeError, "sizes must be made of integers, got 2.0"),
        ({"start": True}, TypeError, "start must be made of integers, got True"),
        ({"data": 3}, TypeError, "data must be text, got 3"),
        ({"era": 1}, ValueError, "era is 1, but past holds 0"),
        ({"era": 1, "past": [{**earlier(), "era": 1}]}, ValueError, r"past\[0\]: era is 1"),
        ({"era": 1, "past": [{**earlier(), "tasks": ["a"]}]}, ValueError, r"past\[0\]: tasks must be 2 names, got 1"),
        ({"era": 1, "past": [{**earlier(), "more": 1}]}, ValueError, r"past\[0\]: the saved ledger has a field 'more'"),
        ({"era": 1, "past": [3]}, TypeError, r"past\[0\]: a saved ledger must be a mapping, got 3"),
        (
            {"era": 1, "past": [Ledger([1], start=9).to_dict()]},
            ValueError,
            "start is 0, before that of the ledger in past",
        ),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Ledger(**{"sizes": [1], **arguments})


@pytest.mark.parametrize("field", ["cause", "why", "bound"])
@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31m", "x" * 201, "\ud800"])
def test_texts_that_cannot_be_printed_on_a_line_are_refused(field: str, text: str) -> None:
    texts: dict[str, Any] = {"cause": "initial", field: (text,) if field == "bound" else text}
    with pytest.raises(ValueError, match=f"{field}: a text must be printable, of 200 characters at most, got '"):
        Ledger([1]).append(0, np.array([ONE]), **texts)


def test_an_empty_ledger_has_nothing_in_force() -> None:
    ledger = Ledger.from_dict(Ledger([1, 2]).to_dict())
    assert len(ledger) == 0 and list(ledger) == [] and ledger.mean(0, 5).tolist() == [0, 0]
    with pytest.raises(ValueError, match="the ledger is empty"):
        ledger.at(0)
