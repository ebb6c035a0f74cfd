from __future__ import annotations

import array
import collections
import enum
import time
from typing import Any

import numpy as np
import pytest
import torch

from taskgrad.sampling.data.arguments import group_by_task
from taskgrad.sampling.data.task_index import TaskIndex

IDS = [1, 0, 0, 2, 1, 0]


class Number(enum.IntEnum):
    ZERO = 0
    ONE = 1
    TWO = 2


class Name(str, enum.Enum):
    TEXT = "text"
    CODE = "ü"


def examples(index: TaskIndex, counts: np.ndarray, positions: np.ndarray) -> list[int]:
    """Data set indices of the examples at ``positions`` [N] of their tasks, ``counts`` [T] of each, sorted by task."""
    rows = np.repeat(index.offsets, counts) + positions
    found: list[int] = (rows if index.order is None else index.order[rows]).tolist()
    return found


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, dtype=np.uint8),
        np.array(IDS, dtype=np.uint64),
        np.array(IDS, dtype=">i4"),
        np.array(IDS, dtype=object),
        np.repeat(IDS, 2)[::2],
        np.ma.array(IDS),
        [np.int64(i) for i in IDS],
        [torch.tensor(i) for i in IDS],
        torch.tensor(IDS),
        torch.tensor(IDS).int(),
        torch.tensor(IDS, dtype=torch.uint16),
        array.array("i", IDS),
        collections.deque(IDS),
        [Number(i) for i in IDS],
    ],
    ids=lambda ids: f"{type(ids).__name__} {getattr(ids, 'dtype', type(ids[0]).__name__)}",
)
def test_ids_of_every_kind(ids: Any) -> None:
    index = group_by_task(ids, None)
    assert index.tasks == ("0", "1", "2") and not index.named
    assert index.sizes.tolist() == [3, 2, 1]
    assert examples(index, np.array([2, 1, 1]), np.array([0, 2, 1, 0])) == [1, 5, 4, 3]


def test_names() -> None:
    index = group_by_task(["b", "a", "b"], ["b", "a"], dataset=range(3))
    assert index.named and index.sizes.tolist() == [2, 1]
    assert examples(index, np.array([2, 1]), np.array([1, 0, 0])) == [2, 0, 1]


@pytest.mark.parametrize(
    "entries",
    [
        ["ü", "text", "ü"],
        ("ü", "text", "ü"),
        np.array(["ü", "text", "ü"]),
        np.array(["ü", "text", "ü"], dtype=object),
        [np.str_("ü"), np.str_("text"), "ü"],
        [text.encode() for text in ("ü", "text", "ü")],
        np.array([text.encode() for text in ("ü", "text", "ü")]),
        [Name.CODE, Name.TEXT, Name.CODE],
    ],
)
@pytest.mark.parametrize("tasks", [["text", "ü"], np.array(["text", "ü"]), Name, {"text": 1, "ü": 2}])
def test_names_of_every_kind(entries: Any, tasks: Any) -> None:
    index = group_by_task(entries, tasks)
    assert index.tasks == ("text", "ü") and {type(task) for task in index.tasks} == {str}
    assert index.sizes.tolist() == [1, 2]
    assert examples(index, np.array([1, 2]), np.array([0, 0, 1])) == [1, 0, 2]


def test_names_from_a_generator() -> None:
    assert group_by_task([0, 1], (name for name in "ab")).tasks == ("a", "b")


def test_names_are_compared_whole_and_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy cuts zero characters off, and makes texts of numbers."""
    assert group_by_task(["a\0", "a"], ["a", "a\0"]).order.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"unknown tasks \['a\\x00'\]"):
        group_by_task(["a\0", "b"], ["a", "b"])
    with pytest.raises(TypeError, match="holds names, but example 1 has 0"):
        group_by_task(["a", 0], ["a", "0"])
    monkeypatch.setattr("taskgrad.sampling.data.ids._CHUNK", 2)
    assert group_by_task(list("abcab"), ["a", "b", "c"]).order.tolist() == [0, 3, 1, 4, 2]
    with pytest.raises(ValueError, match=r"task_of_example names unknown tasks \['x'\], the first at example 4"):
        group_by_task(np.array(list("abcax")), ["a", "b", "c"])


def test_columns_of_tables() -> None:
    pandas = pytest.importorskip("pandas")
    for dtype in ("int32", "Int64", object):
        index = group_by_task(pandas.Series(IDS, dtype=dtype, index=range(5, 11)), None)
        assert index.sizes.tolist() == [3, 2, 1]
    names = pandas.Series(["b", "a", "b"])
    for dtype in (object, "category", "string"):
        assert group_by_task(names.astype(dtype), ["b", "a"]).sizes.tolist() == [2, 1]
    missing = pandas.Series([0, None, 1])
    with pytest.raises(TypeError, match="got float64: convert whole numbers to integers, NaN is no task"):
        group_by_task(missing, None)
    with pytest.raises((TypeError, ValueError), match=r"1 masked entries|got float64: convert"):
        group_by_task(missing.astype("Int64"), None)
    with pytest.raises(TypeError, match=r"must hold integers or names, but example 0 has 0\.0"):
        group_by_task(missing.astype(object), None)
    with pytest.raises(TypeError, match=r"holds names, but example 1 has (nan|None|<NA>)"):
        group_by_task(pandas.Series(["b", None, "a"]), ["b", "a", "None", "nan"])
    with pytest.raises(ValueError, match=r"one task per example, got shape \(6, 1\)"):
        group_by_task(pandas.DataFrame({"task": IDS}), None)


def test_columns_of_data_sets() -> None:
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"task": IDS, "name": list("baabab")})
    assert group_by_task(table["task"], None, dataset=table).sizes.tolist() == [3, 2, 1]
    assert group_by_task(table["name"], ["a", "b"], dataset=table).sizes.tolist() == [3, 3]
    assert group_by_task(pyarrow.chunked_array([IDS[:2], IDS[2:]]), None).sizes.tolist() == [3, 2, 1]
    assert group_by_task(pyarrow.array(["b", "a"]), ["a", "b"]).sizes.tolist() == [1, 1]
    with pytest.raises(TypeError, match="holds names, but example 1 has None"):
        group_by_task(pyarrow.array(["b", None]), ["None", "b"])
    with pytest.raises(TypeError, match=r"must hold integers or names, but example 0 has \{"):
        group_by_task(table, None)


def test_sorted_data_need_no_order() -> None:
    index = group_by_task([0, 0, 1, 1, 1], None)
    assert index.order is None
    assert examples(index, np.array([1, 2]), np.array([1, 0, 2])) == [1, 2, 4]


@pytest.mark.parametrize(
    "ids, tasks, error, message",
    [
        ([[0, 1]], None, ValueError, r"one task per example, got shape \(1, 2\); ids per token are for the tracker"),
        ([], None, ValueError, r"got shape \(0,\)"),
        ([0.0, 1.0], None, TypeError, "integers or names, got float64: convert whole numbers to integers"),
        ([True, False], None, TypeError, "integers or names, got bool"),
        ([1j], None, TypeError, "integers or names, got complex128"),
        (np.array([0, True], dtype=object), None, TypeError, "integers or names, but example 1 has True"),
        ([0, None, 1], None, TypeError, "integers or names, but example 1 has None"),
        (["a", None], ["a", "None"], TypeError, "task_of_example holds names, but example 1 has None"),
        ([0, "a"], ["0", "a"], TypeError, "task_of_example holds names, but example 0 has 0"),
        (["a", ["b"]], ["a", "b"], TypeError, "task_of_example must hold one task per example"),
        ([[0], [0, 1]], None, TypeError, "task_of_example must hold one task per example.*NumPy cannot take"),
        (torch.zeros(2, dtype=torch.long, device="meta"), None, TypeError, "task_of_example .*meta tensor"),
        (torch.tensor([0, 1]).to_sparse(), None, TypeError, "task_of_example .*NumPy cannot take"),
        (np.ma.array([0, 1, 0], mask=[0, 0, 1]), None, ValueError, "a masked array with 1 masked entries"),
        ((i for i in (0, 1)), None, TypeError, "task_of_example .* in a list, an array or a tensor, got <generator"),
        ({0, 1}, None, TypeError, r"in a list, an array or a tensor, got \{0, 1\}"),
        ("abab", ["a", "b"], TypeError, "in a list, an array or a tensor, got 'abab'"),
        (None, None, TypeError, "in a list, an array or a tensor, got None"),
        (3, None, TypeError, "in a list, an array or a tensor, got 3"),
        (np.zeros((2, 0)), None, ValueError, r"got shape \(2, 0\)"),
        (np.array([], dtype=str), ["a"], ValueError, r"got shape \(0,\)"),
        ([0, 2**62], None, ValueError, "has the id 4611686018427387904, but a sampler takes up to"),
        ([0, 2**70], None, ValueError, "has the id 1180591620717411303424 at example 1, but an id must fit in 64 bits"),
        ([-(2**70), 0], None, ValueError, "has the id -1180591620717411303424 at example 0"),
        (np.array([0, 2**63 + 5], dtype=np.uint64), None, ValueError, "has the id 9223372036854775813, but"),
        (
            [0, -1, -2],
            None,
            ValueError,
            r"negative ids, the first at example 1;.*for instance 'rest'",
        ),
        ([0, 2], None, ValueError, r"no examples: \['1'\]"),
        ([0, 1], ["a", "b", "c"], ValueError, r"no examples: \['c'\]; leave them out"),
        ([0, 3], ["a", "b"], ValueError, "has the id 3, but there are only 2 tasks"),
        (["a", "b"], None, ValueError, r"holds names: pass tasks="),
        (["a", "x"], ["a", "b"], ValueError, r"unknown tasks \['x'\]"),
        ([0, 1], ["a", "a"], ValueError, "distinct names"),
        ([0, 1], "ab", TypeError, "sequence of names"),
        ([0, 1], [0, 1], TypeError, "tasks must be a sequence of names, got a list with 0"),
        ([0, 1], ["a", None], TypeError, "sequence of names, got a list with None"),
        ([0, 1], {"a", "b"}, TypeError, "sequence of names, got {'a', 'b'}"),
        ([0, 1], b"ab", TypeError, "sequence of names, got b'ab'"),
        ([0, 1], 2, TypeError, "sequence of names, got 2"),
        ([0, 1], [], ValueError, "distinct names, at least one"),
    ],
)
def test_bad_input_raises(ids: Any, tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_by_task(ids, tasks)


def test_tasks_that_lie_one_after_the_other() -> None:
    index = group_by_task({"a": 3, "b": np.int32(2), "c": 4}, None, dataset=range(9))
    assert index.named and index.tasks == ("a", "b", "c") and index.order is None
    assert index.sizes.tolist() == [3, 2, 4]
    assert examples(index, np.array([1, 1, 2]), np.array([2, 0, 0, 3])) == [2, 3, 5, 8]
    turned = group_by_task({"a": 3, "b": 2, "c": 4}, ["c", "a", "b"])
    assert turned.tasks == ("c", "a", "b") and turned.sizes.tolist() == [4, 3, 2]
    assert examples(turned, np.array([2, 1, 1]), np.array([0, 3, 2, 0])) == [5, 8, 2, 3]


def test_tasks_in_ranges_may_leave_gaps_and_come_in_any_order() -> None:
    index = group_by_task({"a": range(10, 15), "b": range(2, 4)}, None, dataset=range(20))
    assert index.sizes.tolist() == [5, 2]
    assert examples(index, np.array([1, 2]), np.array([4, 1, 0])) == [14, 3, 2]


def test_the_same_data_have_the_same_digest_and_other_data_another() -> None:
    same = [group_by_task(ids, None).digest for ids in (IDS, np.array(IDS, dtype=np.int16), torch.tensor(IDS))]
    assert len(set(same)) == 1
    ranges = [{"a": 3, "b": 2}, {"a": range(0, 3), "b": range(3, 5)}, {"x": 3, "y": 2}]
    assert len({group_by_task(r, None).digest for r in ranges}) == 1
    others = [IDS[::-1], [*IDS, 0], {"a": 3, "b": 2}, {"a": 2, "b": 3}, {"a": range(0, 3), "b": range(4, 6)}]
    assert len({same[0], *(group_by_task(o, None).digest for o in others)}) == 6


def test_a_billion_examples_in_a_thousand_ranges_are_grouped_at_once() -> None:
    start = time.perf_counter()
    index = group_by_task({f"task {t}": 10**6 for t in range(1000)}, None)
    assert time.perf_counter() - start < 1
    assert len(index) == 10**9
    counts = np.zeros(1000, dtype=np.int64)
    counts[999] = 1
    assert examples(index, counts, np.array([10**6 - 1])) == [10**9 - 1]


@pytest.mark.parametrize(
    "pieces, tasks, error, message",
    [
        ({}, None, ValueError, "at least one"),
        ({"a": 0, "b": 1}, None, ValueError, r"no examples: \['a'\]"),
        ({"a": range(3, 3), "b": range(0, 3)}, None, ValueError, r"no examples: \['a'\]"),
        ({"a": -1, "b": 1}, None, ValueError, "task 'a' has -1 examples"),
        ({"a": 1.5}, None, TypeError, r"number of examples, or each its range\(start, stop\); task 'a' has 1.5"),
        ({"a": True}, None, TypeError, "task 'a' has True"),
        ({"a": np.True_}, None, TypeError, "task 'a' has np.True_|task 'a' has True"),
        ({"a": None}, None, TypeError, "task 'a' has None"),
        ({"a": "2"}, None, TypeError, "task 'a' has '2'"),
        ({"a": torch.tensor(1.5)}, None, TypeError, r"task 'a' has tensor\(1.5000\)"),
        ({"a": torch.tensor([1, 2])}, None, TypeError, r"task 'a' has tensor\(\[1, 2\]\)"),
        ({"a": np.arange(3)}, None, TypeError, r"task 'a' has array\(\[0, 1, 2\]\)"),
        ({"a": 2**70}, None, ValueError, "end at example 1180591620717411303424, a sampler takes up to 46116"),
        ({"a": 2**62, "b": 2**62}, None, ValueError, "end at example 9223372036854775808"),
        ({"a": range(0, 2**70)}, None, ValueError, "end at example 1180591620717411303424"),
        ({"a": range(2**63, 2**63 + 9)}, None, ValueError, "end at example 9223372036854775817"),
        ({"a": range(0, 3), "b": 2}, None, TypeError, r"task 'a' has range\(0, 3\)"),
        ({"a": [0, 1]}, None, TypeError, r"task 'a' has \[0, 1\]"),
        ({0: 3}, None, TypeError, "sequence of names"),
        ({"a": range(0, 6, 2), "b": range(7, 9)}, None, ValueError, r"step 1 and begin at 0 or later: \['a'\]"),
        ({"a": range(-1, 6)}, None, ValueError, "begin at 0 or later"),
        ({"a": range(0, 6), "b": range(5, 9)}, None, ValueError, "ranges of tasks 'a' and 'b' overlap at example 5"),
        ({"a": 1, "b": 1}, ["a", "c"], ValueError, r"same tasks as task_of_example: \['a', 'c'\], \['a', 'b'\]"),
        ({"a": 1, "b": 1}, ["a"], ValueError, "same tasks"),
    ],
)
def test_bad_ranges_raise(pieces: Any, tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_by_task(pieces, tasks)


@pytest.mark.parametrize("pieces", [{"a": 4, "b": 3}, {"a": 4, "b": 1}, {"a": range(3, 7)}])
def test_ranges_must_fit_the_data_set(pieces: Any) -> None:
    with pytest.raises(ValueError, match=r"end at example \d, the dataset has 6 examples"):
        group_by_task(pieces, None, dataset=range(6))


def test_ids_that_name_too_many_tasks_raise() -> None:
    with pytest.raises(ValueError, match="has the id 1048576, but a sampler takes up to 1048576 tasks"):
        group_by_task([0, 1 << 20], None)


def test_the_data_set_must_have_as_many_examples() -> None:
    with pytest.raises(ValueError, match="task_of_example has 6 entries, the dataset has 7 examples"):
        group_by_task(IDS, None, dataset=range(7))
