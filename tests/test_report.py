"""What a report says on a terminal, and what a kept one holds on to."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import taskgrad as tg
from taskgrad._text import printable
from taskgrad.report import STATISTICS, Row, Sketches, gather
from taskgrad.sampling.policies import Static
from tests.utils.single import one_step

NASTY = [
    "text",
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "tab\there",
    "bell\a\b\r",
    "\u202ereversed",
    "\ud800",
    "für",
    "日本",
]


def _tracked(tasks: list[str], width: int = 8, **options: object) -> tg.TaskGradTracker:
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    return tg.track(model, tasks, verify=False, **options)  # type: ignore[arg-type]


def test_nothing_in_a_name_acts_on_the_terminal() -> None:
    tracker = _tracked(NASTY)
    report = one_step(tracker)
    lines = str(report).split("\n")
    assert len(lines) == 2 + len(NASTY)
    assert all(line.isprintable() for line in lines)
    assert r"\x1b[31mred\x1b[0m" in lines[3] and r"two\nlines" in lines[4] and "für" in lines[9]
    assert all(len(line) == len(lines[1]) for line in lines[2:])


def test_long_names_do_not_break_the_table() -> None:
    tasks = ["x" * 300 + "a", "x" * 300 + "b", "c"]
    lines = str(one_step(_tracked(tasks))).split("\n")
    assert all(len(line) == len(lines[1]) < 120 for line in lines[1:])
    assert lines[2][:40] != lines[3][:40], "names that differ at the end are told apart"
    assert "..." in lines[2]


def test_columns_stand_below_each_other_whatever_the_numbers() -> None:
    tracker = _tracked(["a", "b", "c"])
    for number in range(60):
        report = one_step(tracker, number, scale=1e-6)
        lines = str(report).split("\n")
        assert all(len(line) == len(lines[1]) for line in lines[1:]), str(report)
    assert "+-" in str(report)


_PRINT = """
import torch, taskgrad as tg
from torch import nn
from tests.utils.single import one_step
model = nn.Linear(4, 4)
tracker = tg.track(model, ["a", "für", "日本", "\\x1b[2J"], verify=False)
print(tracker.report())
print(one_step(tracker))
print(tracker.coverage())
sampler = tg.AdaptiveBatchSampler({"a": 10, "für": 10, "日本\\n": 5})
print(sampler.realised())
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_it_prints_on_a_terminal_of_any_encoding(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PRINT],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    shown = done.stdout.decode(encoding)
    assert "\x1b" not in shown and r"\x1b[2J" in shown
    assert ("für" in shown) == (encoding != "ascii")
    assert ("日本" in shown) == encoding.startswith("utf")


def test_printable() -> None:
    assert printable("plain text") == "plain text"
    assert printable("a\tb\x7f\x9b31m\u2028") == r"a\tb\x7f\x9b31m\u2028"
    assert printable("abcdefghij", 9) == "abc...hij"
    assert printable("abcdefghi", 9) == "abcdefghi"


def test_a_stream_without_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        assert printable("für\n") == r"für\n"


class Odd(nn.Module):
    """A module and a parameter with names that no attribute has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_parameter("w\x1b[2J\n", nn.Parameter(torch.zeros(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 0 * self._parameters["w\x1b[2J\n"].sum()  # type: ignore[union-attr]


def test_names_of_parameters_too() -> None:
    tracker = tg.track(Odd(), ["a"], verify=False)
    with pytest.warns(UserWarning, match=r"w\\x1b\[2J\\n") as caught:
        one_step(tracker)
    assert all(str(w.message).isprintable() for w in caught)
    assert all(line.isprintable() for line in str(tracker.coverage()).split("\n"))


def test_names_of_a_samplers_tasks_too() -> None:
    sampler = tg.AdaptiveBatchSampler({"a\x1b[2J": 10, "b\n": 20, "x" * 200: 30}, policy=Static({"b\n": 1.0}))
    lines = str(sampler.realised()).split("\n")
    assert len(lines) == 5 and all(line.isprintable() for line in lines)
    assert len({len(line) for line in lines[1:]}) == 1


# what a kept report holds


@pytest.mark.slow
def test_kept_reports_hold_no_sketches() -> None:
    """200 kept reports of 100 tasks over 2,176 columns: 870 kB each, if they held them."""
    tasks = [f"task {t}" for t in range(100)]
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    tracker = tg.track(model, tasks, verify=False)
    columns = tracker.state_dict()["memory.ema"].shape[1]
    kept = [one_step(tracker, number) for number in range(5)]
    assert kept[-1].cosine_se.shape == (100, 100)
    gc.collect()
    before = _tensor_bytes()
    kept += [one_step(tracker, number) for number in range(5, 205)]
    gc.collect()
    each = (_tensor_bytes() - before) / 200
    own = 3 * 100 * 101 * 8 + 30 * 100 * 8  # three matrices and the vectors
    assert each < own < 0.4 * len(tasks) * columns * 4, f"{each:.0f} bytes a report"


def _tensor_bytes() -> int:
    """Of all storages alive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    storages = {}
    for t in found:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # without memory of its own: of other tests
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("mode", ["sketch", "exact"])
def test_the_cosines_error_can_be_had_until_the_next_step(mode: str) -> None:
    tracker = _tracked(["a", "b", "c"], width=40, mode=mode, sketch_dim=64)
    first = one_step(tracker, 0)
    asked = first.cosine_se
    assert asked.isfinite().all() and (mode == "exact") == bool((asked == 0).all())
    second = one_step(tracker, 1)
    assert first.cosine_se is asked
    third = one_step(tracker, 2)
    # not asked for in time; exact products have no error at any time
    assert bool(second.cosine_se.isnan().all()) == (mode == "sketch")
    assert third.to_dict()["cosine_se"][0][1] is not None
    assert (third.to_dict()["cosine_se"][0][1] == 0) == (mode == "exact")


def test_the_error_is_had_without_moving_the_maps() -> None:
    """They are megabytes on a GPU. Numbers on "meta" cannot be copied to the host."""
    tracker = _tracked(["a", "b", "c"], width=40, sketch_dim=64)
    report = one_step(tracker)
    assert report._sketches is not None
    sketches = report._sketches()
    assert sketches is not None and any(not m.exact for m in sketches.maps)
    away = Sketches(sketches.block, tuple(m.to(torch.device("meta")) for m in sketches.maps))
    twin = dataclasses.replace(report, _sketches=weakref.ref(away))
    assert torch.equal(twin.cosine_se, report.cosine_se) and report.cosine_se[0, 1] > 0


def test_before_any_step_there_is_no_error_to_be_had() -> None:
    assert _tracked(["a", "b"]).report().cosine_se.isnan().all()


def test_copies_and_pickles_carry_the_error() -> None:
    tracker = _tracked(["a", "b", "c"], width=40, sketch_dim=64)
    report = one_step(tracker)
    copies = [pickle.loads(pickle.dumps(report)), copy.deepcopy(report), copy.copy(report)]
    assert len(pickle.dumps(report)) < 20_000
    one_step(tracker, 1)
    for twin in copies:
        assert str(twin.to_dict()) == str(report.to_dict()) and str(twin) == str(report)
        assert twin.cosine_se[0, 1] > 0


def _sizes(row: Row, tasks: int) -> list[int]:
    return [{"T": tasks, "T + 1": tasks + 1}[size] for size in row.shape]


@pytest.mark.parametrize("name", STATISTICS)
def test_every_row_of_the_table_is_filled_delivered_told_and_documented(name: str) -> None:
    tracker, row = _tracked(["a", "b", "c"]), STATISTICS[name]
    empty = getattr(tracker.report(), name)
    report = one_step(tracker)
    value = getattr(report, name)
    assert list(value.shape) == _sizes(row, 3)
    assert value.dtype == (torch.int64 if row.whole else torch.float64)
    if row.given:
        assert empty is None
    else:
        assert (empty.shape, empty.dtype) == (value.shape, value.dtype)
        assert row.kept or bool(empty.isnan().all())
    assert report.to_dict()[name] == pickle.loads(pickle.dumps(report)).to_dict()[name]
    assert f"\n        {name}: " in (tg.StepReport.__doc__ or "")


def test_a_new_field_is_one_row_and_a_value_in_the_statistic_that_it_names() -> None:
    statistics = {by: dict.fromkeys(STATISTICS, torch.zeros(2)) for by in ("counts", "gram", "reading", "memory")}
    with pytest.raises(KeyError, match="windows"):
        gather(statistics)
    statistics["windows"] = {"overwrite": torch.zeros(2)}
    with pytest.raises(KeyError, match="others_cosine_mean"):
        gather(statistics)
    statistics["windows"] = statistics["counts"] | {"nobody asks for": torch.zeros(2)}
    assert list(gather(statistics)) == list(STATISTICS)
