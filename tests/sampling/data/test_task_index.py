from __future__ import annotations

import copy
import json
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgrad
from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.data import grouping
from taskgrad.sampling.data.arguments import group_by_task
from taskgrad.sampling.data.task_index import TaskIndex
from taskgrad.sampling.engine import native
from taskgrad.sampling.engine.index import IndexEngine
from taskgrad.sampling.engine.quota import to_units
from taskgrad.sampling.policies import Uniform

NAMES = ("text", "code", "legal")
IDS = np.random.default_rng(3).integers(0, 3, 500).astype(np.int16)


@pytest.fixture(scope="module", params=["C++", "NumPy"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here holds for both; chunks are small so that there are several."""
    if request.param == "C++" and native.load()[0] is None:
        pytest.skip("the C++ index engine is not built or not wanted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "_CHUNK", 64)
        if request.param == "NumPy":
            patch.setattr(native, "load", lambda: (None, "NumPy for this test"))
        yield


@pytest.fixture
def built(tmp_path: Path) -> TaskIndex:
    return TaskIndex.build(tmp_path / "a.index", IDS, tasks=NAMES)


def test_public_name() -> None:
    assert taskgrad.TaskIndex is TaskIndex


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 6), min_size=1, max_size=300),
    dtype=st.sampled_from(["int8", "uint8", "int16", "uint16", "int32", ">i4", "uint32", "int64", "uint64"]),
)
def test_the_order_is_that_of_a_stable_sort(tmp_path_factory: Any, ids: list[int], dtype: str) -> None:
    array = np.array(ids + list(range(7)), dtype=dtype)
    index = TaskIndex.build(tmp_path_factory.mktemp("index") / "x", array)
    expected = np.argsort(array, kind="stable")
    assert index.order is not None and index.order.dtype.itemsize == 4
    assert np.array_equal(index.order, expected)
    assert index.sizes.tolist() == np.bincount(array.astype(np.int64)).tolist()
    assert index.offsets.tolist() == [int(np.sum(array < t)) for t in range(7)]
    in_memory = group_by_task(array, None)
    assert in_memory.digest == index.digest
    assert in_memory.order is None or np.array_equal(in_memory.order, expected)


def test_both_engines_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TaskIndex.build(tmp_path / "a", IDS, tasks=NAMES)
    monkeypatch.undo()
    monkeypatch.setattr(grouping, "_CHUNK", 100)
    TaskIndex.build(tmp_path / "b", IDS.astype(np.int64), tasks=list(NAMES))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_eight_bytes_above_four_billion_examples() -> None:
    assert grouping.order_dtype(1 << 32).itemsize == 4
    assert grouping.order_dtype((1 << 32) + 1).itemsize == 8
    ids = np.array([1, 0, 1], dtype=np.uint8)
    out = np.empty(3, dtype=np.uint64)
    grouping.sort_by_task(ids, grouping.survey("ids", ids, 2), out)
    assert out.tolist() == [1, 0, 2]


def test_a_file_of_eight_bytes_an_example(tmp_path: Path, built: TaskIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("taskgrad.sampling.data.index_file.order_dtype", lambda examples: np.dtype("<u8"))
        index = TaskIndex.build(tmp_path / "x", IDS, tasks=NAMES)
        assert index.order is not None and index.order.dtype == np.uint64
        assert np.array_equal(index.order, built.order)
    with pytest.raises(ValueError, match="its header contradicts itself"):
        TaskIndex.open(tmp_path / "x")


def test_ids_from_a_memory_map_a_tensor_or_a_list(tmp_path: Path, built: TaskIndex) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    for i, ids in enumerate((mapped, torch.from_numpy(IDS), IDS.tolist())):
        other = TaskIndex.build(tmp_path / f"{i}.index", ids, tasks=NAMES)
        assert other.path is not None and built.path is not None
        assert other.path.read_bytes() == built.path.read_bytes()


def test_reopening_holds_no_order_in_memory(built: TaskIndex) -> None:
    assert built.path is not None
    index = TaskIndex.open(str(built.path))
    assert index.tasks == NAMES and index.named
    assert (index.digest, index.sizes.tolist()) == (built.digest, built.sizes.tolist())
    base: Any = index.order
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) and base.mode == "r"


def test_the_sampler_draws_the_same_from_file_and_from_ids(built: TaskIndex) -> None:
    options: dict[str, Any] = {"batch_size": 16, "policy": Uniform(), "dataset": range(500)}
    from_file = AdaptiveBatchSampler(built, **options)
    from_ids = AdaptiveBatchSampler(IDS, tasks=NAMES, **options)
    assert list(from_file) == list(from_ids)
    assert from_file.tasks == NAMES
    again = AdaptiveBatchSampler(IDS, tasks=NAMES, **options)
    again.load_state_dict(json.loads(json.dumps(from_file.state_dict())))
    assert next(iter(again)) == next(iter(from_file))


def test_each_rank_gets_its_rows(built: TaskIndex) -> None:
    engine = IndexEngine(0, built.sizes, 12, num_replicas=3)
    engine.commit(0, to_units(built.sizes / 500))
    assert built.order is not None
    for k in range(50):
        draw = engine.draw(k)
        rows = built.order[np.repeat(built.offsets, draw.counts) + draw.positions].tolist()
        assert np.array_equal(np.bincount(IDS[rows], minlength=3), draw.counts)
        for rank in range(3):
            assert built.examples(engine, k, rank) == rows[(rank + draw.offset) % 3 :: 3]


def test_a_state_does_not_load_on_other_data_of_the_same_sizes(tmp_path: Path, built: TaskIndex) -> None:
    state = AdaptiveBatchSampler(built, 16, Uniform()).state_dict()
    for i, other in enumerate((IDS[::-1].copy(), np.sort(IDS))):
        index = TaskIndex.build(tmp_path / str(i), other, tasks=NAMES)
        with pytest.raises(ValueError, match=r"other examples of the same number per task.*rebase\(state\)"):
            AdaptiveBatchSampler(index, 16, Uniform()).load_state_dict(state)
        sampler = AdaptiveBatchSampler(index, 16, Uniform())
        sampler.rebase(state)
        assert sampler.ledger.era == 1


def test_names_of_a_task_index(tmp_path: Path, built: TaskIndex) -> None:
    with pytest.raises(ValueError, match=r"tasks are \['a', 'b', 'c'\], but the TaskIndex has .*leave tasks out"):
        group_by_task(built, ["a", "b", "c"])
    numbered = TaskIndex.build(tmp_path / "b", IDS)
    assert numbered.tasks == ("0", "1", "2") and not numbered.named
    named = group_by_task(numbered, NAMES)
    assert named.tasks == NAMES and named.named
    for twin in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert twin.tasks == NAMES and np.array_equal(twin.order, named.order)
    assert len(pickle.dumps(named)) < 800  # the path, not the order
    with pytest.raises(ValueError, match="has 500 entries, the dataset has 7"):
        group_by_task(built, None, dataset=range(7))


def test_building_again_opens_what_is_there_or_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    TaskIndex.build(path, IDS)
    inode = path.stat().st_ino
    TaskIndex.build(path, IDS.astype(np.int64))
    assert path.stat().st_ino == inode
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert len(TaskIndex.build(path, IDS)) == 500
    old = TaskIndex.open(path)
    before = np.array(old.order)
    other = TaskIndex.build(path, IDS[::-1].copy())
    assert other.digest != old.digest and not np.array_equal(other.order, before)
    assert np.array_equal(old.order, before)  # a run that has the old one open keeps it
    assert TaskIndex.build(path, IDS[::-1].copy(), tasks=NAMES).tasks == NAMES


def test_files_that_are_no_index_are_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, IDS)
    content = path.read_bytes()
    for call in (lambda: TaskIndex.open(path), lambda: TaskIndex.build(path, IDS)):
        with pytest.raises(ValueError, match="is not an index file of taskgrad: choose another path"):
            call()
    assert path.read_bytes() == content
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is not an index file"):
        TaskIndex.open(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        TaskIndex.open(tmp_path / "nothing")


def test_a_file_cut_short_or_changed_raises(built: TaskIndex) -> None:
    assert built.path is not None
    path, content = built.path, built.path.read_bytes()
    for length in (len(content) - 1, len(content) - 300, 4096, len(content) + 1):
        path.write_bytes((content + b"\0")[:length])
        message = rf"a\.index is damaged \(it has {length} bytes instead of {len(content)}\): build it anew"
        with pytest.raises(ValueError, match=message):
            TaskIndex.open(path)
    for length in (12, 80, 120, 140, 160):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"is damaged \((it ends after 12 bytes|its header)|it ends after 80"):
            TaskIndex.open(path)
    for at in (12, 17, 30, 60, 86, 100, 130, 150):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"is damaged \(its header\): build it anew"):
            TaskIndex.open(path)
    for at in (4000, 4096, 5000, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"is damaged \(its order\): build it anew"):
            TaskIndex.open(path)
    path.write_bytes(content[:8] + b"\1" + content[9:])
    with pytest.raises(ValueError, match="of format 1, this version reads 2: build it anew"):
        TaskIndex.open(path)


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    TaskIndex.build(path, IDS)
    content = path.read_bytes()

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taskgrad.sampling.data.task_index.sort_by_task", fail)
    with pytest.raises(KeyboardInterrupt):
        TaskIndex.build(path, IDS[::-1].copy())
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_several_may_build_at_once(tmp_path: Path) -> None:
    threads = [threading.Thread(target=TaskIndex.build, args=(tmp_path / "x", IDS)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(TaskIndex.open(tmp_path / "x").order, np.argsort(IDS, kind="stable"))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "ids, tasks, error, message",
    [
        ([], None, ValueError, r"got shape \(0,\)"),
        (np.zeros((2, 2), dtype=int), None, ValueError, "one task per example"),
        ([0.5], None, TypeError, "task_ids must hold integers or names, got float64: convert whole numbers"),
        (["a", "c"], ["a", "b"], ValueError, r"task_ids names unknown tasks \['c'\], the first at example 1"),
        (["a", None], ["a", "b"], TypeError, "task_ids holds names, but example 1 has None"),
        ([True, False], None, TypeError, "got bool"),
        ([0] * 99 + [-1], None, ValueError, "task_ids has negative ids, the first at example 99"),
        (np.array([0, 2**63], dtype=np.uint64), None, ValueError, "has the id 9223372036854775808"),
        ([0, 2], ["a", "b", "c"], ValueError, r"no examples: \['b'\]"),
        ([0, 3], ["a", "b"], ValueError, "has the id 3, but there are only 2 tasks"),
    ],
)
def test_bad_ids_raise_and_make_no_file(
    tmp_path: Path, ids: Any, tasks: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TaskIndex.build(tmp_path / "x", ids, tasks=tasks)
    assert not list(tmp_path.iterdir())


def test_names_of_every_kind_survive_the_file(tmp_path: Path) -> None:
    names = ("a\nb", 'quote"', "überschrift")
    assert TaskIndex.build(tmp_path / "x", IDS, tasks=names).tasks == names


def test_names_as_ids_make_the_same_file(tmp_path: Path, built: TaskIndex) -> None:
    assert built.path is not None
    other = TaskIndex.build(tmp_path / "b", [NAMES[t] for t in IDS], tasks=NAMES)
    assert other.path is not None and other.path.read_bytes() == built.path.read_bytes()


def test_damaged_files_and_those_of_other_versions_are_built_anew(built: TaskIndex) -> None:
    assert built.path is not None
    content = built.path.read_bytes()
    for at in (8, 16, 200, 4000, 5000):
        built.path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        TaskIndex.build(built.path, IDS, tasks=NAMES)
        assert built.path.read_bytes() == content


@pytest.mark.parametrize("moved", [1, 70, 400])
def test_ids_that_change_between_the_two_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    """Swapped, so that the numbers stay the same; or of a task more often than was counted; or of no task."""
    np.save(tmp_path / "ids.npy", IDS)
    survey = grouping.survey

    def change_after(*args: Any) -> Any:
        found = survey(*args)
        ids = np.load(tmp_path / "ids.npy", mmap_mode="r+")
        other = int(np.flatnonzero(ids != ids[moved])[0])
        if moved == 1:
            ids[[moved, other]] = ids[[other, moved]]
        else:
            ids[moved] = ids[other] if moved == 70 else 3000
        ids.flush()
        return found

    monkeypatch.setattr("taskgrad.sampling.data.task_index.survey", change_after)
    with pytest.raises(ValueError, match="task ids changed between two readings"):
        TaskIndex.build(tmp_path / "x", np.load(tmp_path / "ids.npy", mmap_mode="r"))
    assert [p.name for p in tmp_path.iterdir()] == ["ids.npy"]
    np.save(tmp_path / "ids.npy", IDS)
    with pytest.raises(ValueError, match="task ids changed between two readings"):
        group_by_task(np.load(tmp_path / "ids.npy", mmap_mode="r"), None)


def test_copies_open_the_file_again_and_notice_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index = TaskIndex.build("x", IDS, tasks=NAMES)
    assert index.path == tmp_path / "x"
    data = pickle.dumps(index)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    twin = pickle.loads(data)
    assert (twin.tasks, twin.digest, twin.path) == (NAMES, index.digest, index.path)
    assert isinstance(twin.order.base, np.memmap) and np.array_equal(twin.order, index.order)
    content = index.path.read_bytes()
    TaskIndex.build(index.path, IDS[::-1].copy(), tasks=NAMES)  # of the same sizes
    for call in (lambda: pickle.loads(data), lambda: copy.deepcopy(index)):
        with pytest.raises(ValueError, match="x was replaced by one of other task ids or names"):
            call()
    TaskIndex.build(index.path, IDS, tasks=NAMES[::-1])
    with pytest.raises(ValueError, match="x was replaced by one of other task ids or names"):
        pickle.loads(data)
    index.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        pickle.loads(data)
    index.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"opens its index file again, which is not there: '.*x'"):
        pickle.loads(data)
    in_memory = pickle.loads(pickle.dumps(group_by_task(IDS, NAMES)))
    assert np.array_equal(in_memory.order, index.order) and in_memory.digest == index.digest


def test_links_are_followed_and_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "y")
    TaskIndex.build(tmp_path / "x", IDS)
    assert (tmp_path / "x").is_symlink() and len(TaskIndex.open(tmp_path / "disk" / "y")) == len(IDS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_what_is_no_file_is_neither_waited_for_nor_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for call in (TaskIndex.open, lambda path: TaskIndex.build(path, IDS)):
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(ValueError, match=f"{path} is not an index file of taskgrad"):
                call(path)
        with pytest.raises(IsADirectoryError):
            call(tmp_path)
