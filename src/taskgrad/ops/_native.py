"""Where the native kernels of ``csrc/`` come from.

Three ways, tried in this order and only when a kernel is first needed, never at import:

1. ahead of time: a library that ``setup.py`` put into the package, because torch was importable when it was
   built (``pip install --no-build-isolation .``);
2. compiled on first use, into a per-user cache that later processes load from. The sources use the stable ABI
   of LibTorch, whose headers compile in seconds;
3. the reference in Python, with one warning that says why.

A library is loaded only if its seal, a file beside it, names the version of the sources that are here (what an old one
registers cannot be taken back) and the SHA-256 of what it is (loading a part of one kills the process): ``_seal``.
One in the package that is not is named and left alone; one in the cache is built anew.

Kernels for CUDA are in a library built ahead of time alone, where ``setup.py`` found torch with CUDA and a toolkit.

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
import shlex
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

from . import _seal

Kind = Literal["ahead of time", "compiled on first use", "reference"]

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY = "taskgrad_ops"
kernels: list[str] = []
"""The ops that a library must have a kernel for; every op says so itself when it is registered."""
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


def ready() -> bool:
    """Whether the native kernels are in force; loads them if that has not been tried."""
    return status().kind != "reference"


@functools.cache
def has_cuda(name: str) -> bool:
    """Whether the library in force has the kernel ``name`` for CUDA; loads it if that has not been tried."""
    return ready() and torch._C._dispatch_has_kernel(f"taskgrad_cuda::{name}")


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


def compiler() -> list[str]:
    """The C++ compiler as torch calls it: ``CXX``, a command that may have arguments (``ccache g++``), or ``c++``.

    Raises:
        RuntimeError: it is not on PATH.
    """
    wish = os.environ.get("CXX", "c++")
    try:
        command = shlex.split(wish)
    except ValueError as error:
        raise RuntimeError(f"no C++ compiler: CXX is {wish!r} ({error})") from None
    if not command or shutil.which(command[0]) is None:
        name = command[0] if command else wish
        raise RuntimeError(f"no C++ compiler: {name!r} is not on PATH (install g++ 9 or newer, or set CXX)")
    return command


def _load_built() -> NativeStatus | None:
    for library in sorted(_PACKAGE.glob("_C*.so")):
        fault = _seal.fault(library, _sources())
        if fault is None:
            try:
                _load(library)
            except (OSError, RuntimeError) as error:
                fault = str(error)
            else:
                return NativeStatus("ahead of time", str(library))
        print(f"taskgrad: {library} is not used: {fault}", file=sys.stderr, flush=True)
    return None


def _load_compiled() -> NativeStatus:
    sources = _sources()
    library = _cache_dir() / _key(sources) / f"{_LIBRARY}.so"
    if _seal.fault(library, sources) is not None:
        _compile(sources, library)
    _load(library)
    return NativeStatus("compiled on first use", str(library))


def _load(library: Path) -> None:
    torch.ops.load_library(library)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in kernels if not has_kernel(f"taskgrad::{name}", "CPU")]
    if missing:  # calls to them would come back to Python for ever
        raise RuntimeError(f"{library} has no kernel for {', '.join(missing)}")


def _sources() -> Path:
    """The folder of the C++ sources, installed or in a checkout."""
    for folder in (_PACKAGE / "_csrc", _PACKAGE.parents[1] / "csrc"):
        if (folder / "build.json").exists():
            return folder
    raise RuntimeError(f"the C++ sources are missing from {_PACKAGE}")


def _cache_dir() -> Path:
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / "taskgrad"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taskgrad"


def _key(sources: Path) -> str:
    """A name that changes with everything the library depends on; torch's version stands for its headers."""
    facts = [_seal.version(sources), torch.__version__, platform.machine(), platform.libc_ver()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _compile(sources: Path, library: Path) -> None:
    """Compile in a scratch folder, then move the library to its place in one step: never seen half done."""
    command = compiler()
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _file_lock(folder / "lock"):
        if _seal.fault(library, sources) is None:  # another process was faster
            return
        for left in folder.glob("build-*"):  # by a process that was killed: this one holds the lock
            shutil.rmtree(left, ignore_errors=True)
        from torch.utils import cpp_extension

        print(f"taskgrad: compiling its CPU kernels, once, into {folder}", file=sys.stderr, flush=True)
        recipe = json.loads((sources / "build.json").read_text())
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch,
            _build_environment(command, Path(scratch)),
        ):
            cpp_extension.load(
                _LIBRARY,
                [str(sources / source) for source in recipe["sources"]],
                extra_cflags=recipe["cflags"],
                build_directory=scratch,
                is_python_module=False,
            )
            built = Path(scratch) / library.name
            seal = _seal.put(built, sources)
            _move(built, library)
            _move(seal, _seal.beside(library))


def _move(file: Path, to: Path) -> None:
    """Put a file in the place of whatever is there, once its content is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    if to.is_dir() and not to.is_symlink():
        shutil.rmtree(to)
    os.replace(file, to)


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Held by one process at a time and released by the kernel when it dies (torch's lock file is not)."""
    import fcntl  # POSIX only; elsewhere the reference runs

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _build_environment(command: list[str], scratch: Path) -> Iterator[None]:
    """What torch needs to find ninja, where pip's is on PATH only if the virtual environment is active, and a compiler
    that is more than one word, which it would look for as one: a script in ``scratch`` is that word."""
    import ninja

    changes = {"PATH": os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])}
    if len(command) > 1:
        script = scratch / "c++"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        changes["CXX"] = str(script)
        changes["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"  # it warns of one it does not know; the library's ABI is C
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
