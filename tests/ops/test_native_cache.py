"""Compiled kernels that are damaged, foreign, old or half there: built anew, or the reference with one warning; never a
crash. Each in a process of its own."""

from __future__ import annotations

import ctypes  # noqa: F401, for _ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import taskgrad
from taskgrad.ops import _native, _seal

PACKAGE = Path(taskgrad.__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(list(PACKAGE.glob("_C*.so"))), reason="the package carries built kernels"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="needs a compiler"),
]

CALL = """
import warnings, torch, taskgrad
from taskgrad.ops import _native, segment_sum, sum_gram
{first}
block = torch.randn(3, 1000)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        total, gram = sum_gram(block)
        sums = segment_sum(block, None, torch.tensor([0, 1, 3]))
torch.testing.assert_close(gram, block.double() @ block.double().mT)
torch.testing.assert_close(sums[1], block[1:].sum(0))
print(_native.status().kind)
print(_native.status().detail)
print(*[str(warning.message) for warning in caught], sep="\\n")
"""


def start(cache: Path, source: Path = PACKAGE.parent, first: str = "", **environment: str) -> subprocess.Popen[str]:
    settings = {"TASKGRAD_NATIVE": "", "TORCH_EXTENSIONS_DIR": str(cache), "PYTHONPATH": str(source), **environment}
    command = [sys.executable, "-c", CALL.format(first=first)]
    return subprocess.Popen(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str, list[str], str]:
    """Kind and detail of the status, warnings, and what was printed besides."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    kind, detail, *warned = out.splitlines()
    return kind, detail, [line for line in warned if line.startswith("taskgrad")], err


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache that two processes filled at once, with a compiler that is a command with an argument, after a process
    that had begun to was killed."""
    cache = tmp_path_factory.mktemp("cache")
    killed = start(cache)
    while not list(cache.rglob("build-*")):
        assert killed.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    both = [start(cache, CXX=f"env {os.environ.get('CXX', 'c++')}") for _ in range(2)]
    said = ""
    for process in both:
        kind, _, warned, err = finish(process)
        assert (kind, warned) == ("compiled on first use", [])
        said += err
    assert said.count("\n") == said.count("taskgrad: compiling its CPU kernels, once") == 1
    assert not list(cache.rglob("build-*"))
    return cache


@pytest.fixture
def library(built, tmp_path) -> Path:
    shutil.copytree(built, tmp_path / "cache")
    (found,) = (tmp_path / "cache").rglob("taskgrad_ops.so")
    return found


def cut(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def empty(library: Path) -> None:
    os.truncate(library, 0)


def flip(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 3] ^= 4
    library.write_bytes(content)


def foreign(library: Path) -> None:
    """Another library in its place, whole and sealed as ours: it has none of the kernels."""
    shutil.copy(sys.modules["_ctypes"].__file__, library)
    _seal.put(library, _native._sources())


def foreign_without_a_seal_of_its_own(library: Path) -> None:
    shutil.copy(sys.modules["_ctypes"].__file__, library)


def old(library: Path) -> None:
    """Whole, of other sources."""
    seal = _seal.beside(library)
    seal.write_text(f"{'0' * 16} {seal.read_text().split()[1]}\n")


def without_seal(library: Path) -> None:
    _seal.beside(library).unlink()


def seal_is_no_text(library: Path) -> None:
    _seal.beside(library).write_bytes(b"\xff\xfe")


def seal_is_empty(library: Path) -> None:
    _seal.beside(library).write_text("")


def folder(library: Path) -> None:
    library.unlink()
    library.mkdir()
    (library / "something").touch()


def dangling(library: Path) -> None:
    library.unlink()
    library.symlink_to("nowhere")


DAMAGES = [
    cut,
    empty,
    flip,
    foreign_without_a_seal_of_its_own,
    old,
    without_seal,
    seal_is_no_text,
    seal_is_empty,
    folder,
    dangling,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_and_ours_is_not_loaded(damage: Callable[[Path], None], library):
    damage(library)
    kind, detail, warned, _ = finish(start(library.parents[2], CXX="no-such-compiler"))
    assert kind == "reference" and "no-such-compiler" in detail
    assert len(warned) == 1 and warned[0].startswith("taskgrad runs its slower reference kernels: no C++ compiler")


@pytest.mark.parametrize("damage", [cut, folder])
def test_it_is_built_anew(damage: Callable[[Path], None], library):
    damage(library)
    assert finish(start(library.parents[2]))[:3] == ("compiled on first use", str(library), [])
    assert finish(start(library.parents[2], CXX="no-such-compiler"))[:3] == ("compiled on first use", str(library), [])


def test_a_cache_that_cannot_be_written_serves_what_it_holds(library, tmp_path):
    for path in (library, *library.parents[:2]):
        path.chmod(0o555)
    assert finish(start(library.parents[2]))[:3] == ("compiled on first use", str(library), [])
    (tmp_path / "file").touch()  # permissions mean nothing to root; a file in the place of the folder does
    kind, _, warned, _ = finish(start(tmp_path / "file"))
    assert kind == "reference" and len(warned) == 1


def test_a_library_without_all_the_kernels_is_not_called_for_ever(library):
    first = '_native.kernels.append("conv_sketch")'
    kind, detail, warned, _ = finish(start(library.parents[2], first=first))
    assert kind == "reference" and detail.endswith("has no kernel for conv_sketch") and len(warned) == 1


def test_a_library_of_somebody_else_has_no_kernels(library):
    foreign(library)
    kind, detail, warned, _ = finish(start(library.parents[2]))
    assert kind == "reference" and "has no kernel for segments_hold" in detail and len(warned) == 1


@pytest.mark.parametrize("damage", [None, old, cut])
def test_ahead_of_time_only_of_these_sources(damage: Callable[[Path], None] | None, library, tmp_path):
    package = tmp_path / "source" / "taskgrad"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    if not (package / "_csrc").exists():
        shutil.copytree(PACKAGE.parents[1] / "csrc", package / "_csrc")
    ahead = Path(shutil.copy(library, package / "_C.abi3.so"))
    shutil.copy(_seal.beside(library), _seal.beside(ahead))
    if damage is not None:
        damage(ahead)
    kind, detail, warned, err = finish(start(library.parents[2], package.parent))
    assert warned == []
    if damage is None:
        assert (kind, detail, err) == ("ahead of time", str(ahead), "")
    else:
        assert (kind, detail) == ("compiled on first use", str(library))
        assert err.startswith(f"taskgrad: {ahead} is not used: it is ")
        version = _seal.version(_native._sources())
        assert err.count("\n") == 1 and (
            damage is not old or f"version {'0' * 16}, the sources here are of version {version}" in err
        )


def test_a_version_changes_with_every_source_and_every_flag(tmp_path):
    sources = Path(shutil.copytree(_native._sources(), tmp_path / "csrc"))
    before = _seal.version(sources)
    assert before == _seal.version(_native._sources())
    recipe = json.loads((sources / "build.json").read_text())
    files = [name for key in recipe for name in recipe[key] if not name.startswith("-")]
    there = {path.relative_to(sources).as_posix() for room in ("ops", "cuda") for path in (sources / room).iterdir()}
    assert set(files) == there  # nothing is compiled that the version does not know
    found = {before}
    for name in ("build.json", *files):
        (sources / name).write_text((sources / name).read_text() + "\n")
        found.add(_seal.version(sources))
    assert len(found) == len(files) + 2
