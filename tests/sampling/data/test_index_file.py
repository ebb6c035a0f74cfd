"""Index files that are damaged, forged, killed while they are written, or written by several at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskgrad.sampling.data import index_file
from taskgrad.sampling.data.task_index import TaskIndex

FIXED = struct.Struct("<8sIIQQQQ32sI")
NAMES = ("text", "code", "legal")
IDS = np.random.default_rng(3).integers(0, 3, 500)

SHAPES: dict[str, tuple[Any, Any]] = {
    "names": (IDS, NAMES),
    "no names": (IDS, None),
    "one example": ([0], None),
    "a header of two pages": (np.random.default_rng(4).permutation(np.arange(3000) % 1000), None),
    "order of several pages": (np.random.default_rng(5).integers(0, 4, 6000), ("a", "b", "ü", "d")),
}


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))


def zero(data: bytearray, rng: random.Random) -> None:
    at, length = rng.randrange(len(data)), rng.choice([4, 512, 4096])
    data[at : at + length] = bytes(len(data[at : at + length]))


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice([rng.randrange(len(data)), len(data) - rng.randrange(1, 9)]) :]


def extend(data: bytearray, rng: random.Random) -> None:
    length = rng.choice([1, 4, 8, 4096])
    data += rng.choice([bytes(length), rng.randbytes(length)])


def swap(data: bytearray, rng: random.Random) -> None:
    length = rng.choice([1, 4, 8, 512])
    a, b = (rng.randrange(len(data) // length) * length for _ in range(2))
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice([1, 4, 8])]


def repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.choice([1, 4, 8])]


def header_number(data: bytearray, rng: random.Random) -> None:
    at = 8 + 4 * rng.randrange(10)
    value = rng.choice([0, 1, 2, 3, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
    data[at : at + 8] = value.to_bytes(8, "little")


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    flip,
    flip,
    overwrite,
    zero,
    cut,
    extend,
    swap,
    remove,
    repeat,
    header_number,
]


def sign(data: bytearray) -> None:
    """Make both checksums right, where there is a header to hold them."""
    if len(data) < FIXED.size + 32:
        return
    tasks, label = (int.from_bytes(data[at : at + 8], "little") for at in (16, 40))
    header = FIXED.size + 32 + 8 * tasks + label
    if header > len(data):
        return
    data[FIXED.size - 4 : FIXED.size] = zlib.crc32(data[header:]).to_bytes(4, "little")
    covered = data[: FIXED.size] + data[FIXED.size + 32 : header]
    data[FIXED.size : FIXED.size + 32] = hashlib.sha256(covered).digest()


@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_is_changed_is_noticed(tmp_path: Path, shape: str) -> None:
    ids, names = SHAPES[shape]
    path = tmp_path / "x"
    TaskIndex.build(path, ids, tasks=names)
    content = path.read_bytes()
    rng = random.Random(f"mutations of {shape}")
    tried = 0
    while tried < 800:
        data = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 2])):
            if data:
                rng.choice(MUTATIONS)(data, rng)
        if data == content:
            continue
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x is not an index file|x is an index file of format|x is damaged"):
            TaskIndex.open(path)
        tried += 1


@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_is_forged_is_refused_or_can_be_used(tmp_path: Path, shape: str) -> None:
    """With right checksums: it may be of other data, but nothing crashes, now or later."""
    ids, names = SHAPES[shape]
    path = tmp_path / "x"
    TaskIndex.build(path, ids, tasks=names)
    content = path.read_bytes()
    rng = random.Random(f"forgeries of {shape}")
    refused = 0
    for _ in range(400):
        data = bytearray(content)
        rng.choice(MUTATIONS)(data, rng)
        sign(data)
        path.write_bytes(data)
        try:
            index = TaskIndex.open(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert index.sizes.min() >= 1 and len(index) == len(index.order) > int(index.order.max())
        assert len(index.tasks) == len(index.sizes) == len(set(index.tasks))
    assert refused > 100


def forge(
    path: Path,
    *,
    version: int = 2,
    itemsize: int = 4,
    tasks: int | None = None,
    examples: int | None = None,
    begin: int = 4096,
    label: bytes = b'["a", "b"]',
    sizes: Any = (2, 3),
    order: Any = (0, 2, 1, 3, 4),
    dtype: str = "<u4",
    label_bytes: int | None = None,
) -> None:
    """An index file that says what it is told to, with right checksums."""
    examples = len(order) if examples is None else examples
    tasks = len(sizes) if tasks is None else tasks
    rest = np.array(sizes, dtype="<u8").tobytes() + label
    content = bytes(max(begin - FIXED.size - 32 - len(rest), 0)) if begin <= 1 << 20 else b""
    content += np.array(order, dtype=dtype).tobytes()
    length = len(label) if label_bytes is None else label_bytes
    fixed = FIXED.pack(b"taskgrad", version, itemsize, tasks, examples, begin, length, bytes(32), zlib.crc32(content))
    path.write_bytes(fixed + hashlib.sha256(fixed + rest).digest() + rest + content)


def test_what_is_forged_well_is_read(tmp_path: Path) -> None:
    forge(tmp_path / "x")
    index = TaskIndex.open(tmp_path / "x")
    assert index.tasks == ("a", "b") and index.order.tolist() == [0, 2, 1, 3, 4]


@pytest.mark.parametrize(
    "said",
    [
        {"tasks": 0, "sizes": (), "label": b"null", "order": ()},
        {"tasks": 1},
        {"tasks": 3},
        {"tasks": 1 << 21},
        {"tasks": 1 << 61},
        {"tasks": (1 << 64) - 1},
        {"examples": 4},
        {"examples": 6},
        {"examples": 0},
        {"examples": 1 << 62},
        {"examples": (1 << 64) - 1},
        {"sizes": (2, 2)},
        {"sizes": (5, 0)},
        {"sizes": (6, (1 << 64) - 1)},
        {"sizes": ((1 << 63) + 2, (1 << 63) + 3)},
        {"sizes": (1 << 63, 1 << 63)},
        {"sizes": ((1 << 63) - 1, 5)},
        {"sizes": ((1 << 63) - 1, (1 << 63) - 1, 7), "label": b"null"},
        {"itemsize": 0},
        {"itemsize": 3},
        {"itemsize": 8},
        {"itemsize": 8, "dtype": "<u8"},
        {"itemsize": 2, "dtype": "<u2"},
        {"itemsize": (1 << 32) - 1},
        {"begin": 0},
        {"begin": 4095},
        {"begin": 4100},
        {"begin": 8192},
        {"begin": 1 << 40},
        {"begin": (1 << 64) - 1},
        {"label": b"[]"},
        {"label": b'["a"]'},
        {"label": b'["a", "a"]'},
        {"label": b'["a", 1]'},
        {"label": b'["a", ["b"]]'},
        {"label": b'["a", null]'},
        {"label": b'["a", "b", "c"]'},
        {"label": b'{"a": 1, "b": 2}'},
        {"label": b'"ab"'},
        {"label": b"false"},
        {"label": b"0"},
        {"label": b""},
        {"label": b"["},
        {"label": b"[" * 3000},
        {"label": b"[" + b"1" * 3000 + b"]"},
        {"label": b'["a", "\xff"]'},
        {"label_bytes": 1 << 28},
        {"label_bytes": 1 << 29},
        {"label_bytes": 1 << 62},
        {"label_bytes": (1 << 64) - 1},
        {"label_bytes": 0},
        {"order": (0, 2, 1, 3, 5)},
        {"order": (0, 2, 1, 3, (1 << 32) - 1)},
        {"version": 0},
        {"version": 3},
    ],
    ids=lambda said: str(said)[:60],
)
def test_a_header_that_means_nothing_is_refused_at_once(tmp_path: Path, said: dict[str, Any]) -> None:
    path = tmp_path / "x"
    forge(path, **said)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"x is damaged \(.*\): build it anew|x is an index file of format"):
            TaskIndex.open(path)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_a_forged_length_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file may be of any length: what the header asks for is bounded too."""
    for said in ({"tasks": 1 << 36}, {"label_bytes": 1 << 39}, {"tasks": 1 << 20, "label_bytes": 1 << 38}):
        forge(tmp_path / "x", **said)
        os.truncate(tmp_path / "x", 1 << 40)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="damaged"):
                TaskIndex.open(tmp_path / "x")
            assert tracemalloc.get_traced_memory()[1] < 4e6
        finally:
            tracemalloc.stop()


def test_opening_takes_little_memory(tmp_path: Path) -> None:
    TaskIndex.build(tmp_path / "x", np.arange(3_000_000) % 7)
    tracemalloc.start()
    try:
        TaskIndex.open(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 3e6  # of 12 MB
    finally:
        tracemalloc.stop()


def test_names_too_long_for_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "_MOST_LABEL", 10)
    with pytest.raises(ValueError, match="tasks take 25 bytes as JSON, an index file holds up to 10"):
        TaskIndex.build(tmp_path / "x", IDS, tasks=NAMES)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate")
def test_no_room_for_the_file(tmp_path: Path) -> None:
    import resource

    TaskIndex.build(tmp_path / "x", IDS)
    content = (tmp_path / "x").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"no room for 404096 bytes: '.*x'"):
            TaskIndex.build(tmp_path / "x", np.arange(100_000) % 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == content


def test_a_builder_that_is_alive_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskgrad.sampling.data import task_index

    sort, sorting, go_on = task_index.sort_by_task, threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        if threading.current_thread() is slow:
            sorting.set()
            assert go_on.wait(60)
        sort(*args)

    monkeypatch.setattr(task_index, "sort_by_task", wait)
    raised: list[Exception] = []

    def build() -> None:
        try:
            TaskIndex.build(tmp_path / "x", IDS)
        except Exception as error:
            raised.append(error)

    slow = threading.Thread(target=build)
    slow.start()
    assert sorting.wait(60)
    (temporary,) = tmp_path.iterdir()
    stem = temporary.name.rsplit(".", 2)[0]
    (tmp_path / f"{stem}.0123456789abcdef.tmp").write_bytes(b"of a process that was killed")
    other = TaskIndex.build(tmp_path / "x", IDS[::-1].copy())
    assert {p.name for p in tmp_path.iterdir()} == {"x", temporary.name}
    go_on.set()
    slow.join()
    assert not raised
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert TaskIndex.open(tmp_path / "x").digest != other.digest


def test_another_build_at_the_last_moment_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TaskIndex.build(tmp_path / "other", IDS[::-1].copy())
    replace = os.replace

    def and_again(source: Any, target: Any) -> None:
        replace(source, target)
        replace(tmp_path / "other", target)

    monkeypatch.setattr("taskgrad._files.os.replace", and_again)
    with pytest.raises(ValueError, match=r"another process has built an index of other task ids or names at .*x"):
        TaskIndex.build(tmp_path / "x", IDS)


_BUILD_AND_KILL = """
import json, os, random, signal, sys, time
import numpy as np
from taskgrad.sampling.data.task_index import TaskIndex

path, rounds = sys.argv[1], int(sys.argv[2])
folder = os.path.dirname(path)
random.seed(1)
ids = [np.random.default_rng(i).integers(0, 5, 1_500_000).astype(np.uint8) for i in range(2)]
found = {"whole": 0, "none": 0, "left": 0}

def builder(first):
    child = os.fork()
    if child == 0:
        for i in range(first, first + 1000):
            TaskIndex.build(path, ids[i % 2])
        os._exit(0)
    return child

for k in range(rounds):
    children = [builder(k)]
    deadline = time.monotonic() + 30
    while k % 2 and not any(n.endswith(".tmp") for n in os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.04 if k % 2 else 0.3))
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found["left"] += sum(n.endswith(".tmp") for n in os.listdir(folder))
    try:
        order = TaskIndex.open(path).order
    except FileNotFoundError:
        found["none"] += 1
    else:
        assert any(np.array_equal(order, np.argsort(x, kind="stable")) for x in ids)
        found["whole"] += 1
    if k % 3 == 2 and os.path.exists(path):
        os.unlink(path)
TaskIndex.build(path, ids[0])
TaskIndex.build(path, ids[1])
found["files"] = os.listdir(folder)
print(json.dumps(found))
"""

_BUILD_AT_ONCE = """
import os, sys, time
import numpy as np
from taskgrad.sampling.data.task_index import TaskIndex

path = sys.argv[1]
ids = [np.random.default_rng(i).integers(0, 5, 20_000).astype(np.uint8) for i in range(2)]
orders = [np.argsort(x, kind="stable") for x in ids]

def build(mine):
    for _ in range(40):
        try:
            index = TaskIndex.build(path, ids[mine])
        except ValueError as error:
            assert "another process has built an index of other task ids" in str(error), error
        else:
            assert np.array_equal(index.order, orders[mine])

children = []
for i in range(4):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            build(i % 2)
            code = 0
        finally:
            os._exit(code)
    children.append(child)
while not os.path.exists(path):
    time.sleep(0.001)
for _ in range(60):
    order = TaskIndex.open(path).order
    assert any(np.array_equal(order, x) for x in orders)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print("done")
"""


def _run(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_kill_9_leaves_none_or_a_whole_file_and_nothing_in_the_end(tmp_path: Path) -> None:
    found = json.loads(_run(_BUILD_AND_KILL, str(tmp_path / "x"), "16"))
    assert found["whole"] + found["none"] == 16
    assert found["whole"] and found["left"]
    assert found["files"] == ["x"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_four_processes_build_at_once(tmp_path: Path) -> None:
    assert _run(_BUILD_AT_ONCE, str(tmp_path / "x")).strip() == "done"
