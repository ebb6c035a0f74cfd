"""Files that are either the old one or the new one, whole, whenever the process is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path``: what the block writes there is flushed to the disk and takes the
    place of ``path`` when the block ends. An exception leaves ``path`` as it was. A link is followed.

    What a killed process left is removed by the next one that writes ``path``. Raises OSError, also where ``path`` is
    there and no file (a folder, a device, a pipe).
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a file that could be replaced", str(path))
    # not the name itself, which may be as long as the file system allows; neither does another thread write to it
    stem = f".{hashlib.sha256(target.name.encode(errors='surrogatepass')).hexdigest()[:16]}."
    temporary = target.parent / f"{stem}{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened, and signal 0 ends a process
        _sync(target.parent)
        for left in target.parent.glob(f"{stem}*.tmp"):
            process = left.name.split(".")[2]
            if process.isdigit() and not _alive(int(process)):
                left.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file is in place, and some network file systems cannot do it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
