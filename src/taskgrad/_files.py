"""Files that are either the old one or the new one, whole, whenever the process is killed."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path``: what the block writes there is flushed to the disk and takes the
    place of ``path`` when the block ends. An exception leaves ``path`` as it was. A link is followed.

    What a killed process left is removed by the next one that writes ``path``. Raises OSError.
    """
    target = Path(os.path.realpath(path))
    # not the name itself, which may be as long as the file system allows; neither does another thread write to it
    stem = f".{hashlib.sha256(target.name.encode(errors='surrogatepass')).hexdigest()[:16]}."
    temporary = target.parent / f"{stem}{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    for left in target.parent.glob(f"{stem}*.tmp"):
        if not _alive(int(left.name.split(".")[2])):
            left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
