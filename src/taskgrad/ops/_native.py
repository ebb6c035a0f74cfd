"""Where the CPU kernels of ``csrc/`` come from.

Three ways, tried in this order and only when a kernel is first needed, never at import:

1. ahead of time: a library that ``setup.py`` put into the package, because torch was importable when it was
   built (``pip install --no-build-isolation .``);
2. compiled on first use, into a per-user cache that later processes load from. The sources use the stable ABI
   of LibTorch, whose headers compile in seconds;
3. the reference in Python, with one warning that says why.

The environment variable ``TASKGRAD_NATIVE`` overrides this: ``0`` takes the reference, ``1`` makes it an
error if the native kernels cannot be had. ``TORCH_EXTENSIONS_DIR`` moves the cache, as it does for torch's
own extensions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Kind = Literal["ahead of time", "compiled on first use", "reference"]

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY = "taskgrad_ops"
_lock = threading.Lock()


@dataclass(frozen=True)
class NativeStatus:
    """Which kernels are in force; ``detail`` is the library's path, or why the reference runs."""

    kind: Kind
    detail: str

    def __str__(self) -> str:
        joint = " because " if self.kind == "reference" else " at "
        return f"{self.kind}{joint}{self.detail}"


def status() -> NativeStatus:
    """Load the native kernels if that has not been tried in this process, and say what is in force.

    Raises:
        ValueError: ``TASKGRAD_NATIVE`` is neither unset, ``0`` nor ``1``.
        RuntimeError: ``TASKGRAD_NATIVE=1`` and the kernels can neither be found nor compiled.
    """
    with _lock:  # functools.cache alone would let two threads compile
        return _status()


@functools.cache
def _status() -> NativeStatus:
    wish = os.environ.get("TASKGRAD_NATIVE", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"TASKGRAD_NATIVE must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return NativeStatus("reference", "TASKGRAD_NATIVE=0")
    try:
        return _load_built() or _load_compiled()
    except Exception as error:  # whatever fails here, the reference still gives the right answer
        if wish == "1":
            raise RuntimeError(f"TASKGRAD_NATIVE=1, but the native kernels are not available: {error}") from error
        reason = str(error).strip() or type(error).__name__
        warnings.warn(
            f"taskgrad runs its slower reference kernels: {reason.splitlines()[0]} "
            "(`taskgrad doctor` says more, TASKGRAD_NATIVE=0 silences this)",
            RuntimeWarning,
            stacklevel=2,
        )
        return NativeStatus("reference", reason)


def _load_built() -> NativeStatus | None:
    for library in sorted(_PACKAGE.glob("_C*.so")):
        torch.ops.load_library(library)
        return NativeStatus("ahead of time", str(library))
    return None


def _load_compiled() -> NativeStatus:
    source_dir, recipe = _recipe()
    library = _cache_dir() / _key(source_dir, recipe) / f"{_LIBRARY}.so"
    if not library.exists():
        _compile(source_dir, recipe, library)
    torch.ops.load_library(library)
    return NativeStatus("compiled on first use", str(library))


def _recipe() -> tuple[Path, dict[str, list[str]]]:
    """The folder of the C++ sources, installed or in a checkout, and its ``build.json``."""
    for folder in (_PACKAGE / "_csrc", _PACKAGE.parents[1] / "csrc"):
        with contextlib.suppress(FileNotFoundError):
            return folder, json.loads((folder / "build.json").read_text())
    raise RuntimeError(f"the C++ sources are missing from {_PACKAGE}")


def _cache_dir() -> Path:
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / "taskgrad"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taskgrad"


def _key(source_dir: Path, recipe: dict[str, list[str]]) -> str:
    """A name that changes with everything the library depends on; torch's version stands for its headers."""
    digest = hashlib.sha256(json.dumps([recipe, torch.__version__, platform.machine(), platform.libc_ver()]).encode())
    for source in (*recipe["sources"], *recipe["headers"]):
        digest.update((source_dir / source).read_bytes())
    return digest.hexdigest()[:16]


def _compile(source_dir: Path, recipe: dict[str, list[str]], library: Path) -> None:
    """Compile in a scratch folder, then move the library to its place in one step: never seen half done."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler: {compiler!r} is not on PATH (install g++ 9 or newer, or set CXX)")
    library.parent.mkdir(parents=True, exist_ok=True)
    with _file_lock(library.parent / "lock"):
        if library.exists():  # another process was faster
            return
        from torch.utils import cpp_extension

        print(f"taskgrad: compiling its CPU kernels, once, into {library.parent}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch, _ninja_on_path():
            cpp_extension.load(
                _LIBRARY,
                [str(source_dir / source) for source in recipe["sources"]],
                extra_cflags=recipe["cflags"],
                build_directory=scratch,
                is_python_module=False,
            )
            os.replace(Path(scratch) / library.name, library)


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Held by one process at a time and released by the kernel when it dies (torch's lock file is not)."""
    import fcntl  # POSIX only; elsewhere the reference runs

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """torch looks for ninja on PATH, where pip's ninja is only if the virtual environment is active."""
    import ninja

    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
