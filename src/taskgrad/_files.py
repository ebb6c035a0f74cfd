"""Files that are either the old one or the new one, whole, whenever the process is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the folder of ``path``, empty: what the block writes to it is flushed to the disk and takes
    the place of ``path`` when the block ends. An exception leaves ``path`` as it was. A link is followed.

    What a killed process left is removed by the next one that writes ``path``, before it writes. Raises OSError, also
    where ``path`` is there and no file (a folder, a device, a pipe).
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a file that could be replaced", str(path))
    # not the name itself, which may be as long as the file system allows
    stem = f".{hashlib.sha256(target.name.encode(errors='surrogatepass')).hexdigest()[:16]}."
    _remove_leftovers(target.parent, stem)
    temporary, descriptor = _create(target.parent, stem)
    try:
        try:
            yield temporary
            os.fsync(descriptor)
            if target.exists():
                shutil.copymode(target, temporary)
            if os.name != "posix":  # there an open file cannot be renamed
                os.close(descriptor)
                descriptor = -1
            os.replace(temporary, target)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(target.parent)


def _create(folder: Path, stem: str) -> tuple[Path, int]:
    """A new file, locked for as long as its descriptor is open: the lock goes when the process ends, however it ends.

    A process id instead would say nothing to another container or another machine that shares the folder.
    """
    while True:
        temporary = folder / f"{stem}{secrets.token_hex(8)}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(temporary, flags, 0o666)
        _lock(descriptor, wait=True)
        if temporary.exists():  # else it was taken for a leftover before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _remove_leftovers(folder: Path, stem: str) -> None:
    for left in folder.glob(f"{stem}*.tmp"):
        try:
            descriptor = os.open(left, os.O_RDWR | getattr(os, "O_NONBLOCK", 0))
        except OSError:  # just renamed, or of somebody else
            continue
        try:
            if _lock(descriptor, wait=False):
                left.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock was got: False too where the file system has none."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file is in place, and some network file systems cannot do it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
