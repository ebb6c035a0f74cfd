"""The index file: the examples of a data set sorted by task, to be memory-mapped.

    8 bytes   "taskgrad"
    ints      format version (4 bytes), bytes per example (4), tasks, examples, where the order begins, bytes of names
    32 bytes  SHA-256 of the task ids, each as 4 bytes
    32 bytes  SHA-256 of the header: all of the above, sizes and names
    int64     size of each task
    JSON      names of the tasks, or null
    uint32 or uint64, from a multiple of 4096 on: the order

Everything little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import IntArray

VERSION = 1

_MAGIC = b"taskgrad"
_FIXED = struct.Struct("<8sIIQQQQ32s")
_PAGE = 4096
_SCHEME = "ids-sha256:"


class Content(NamedTuple):
    """``digest`` of the ids; ``names`` or None; ``sizes`` int64 [T]; ``order``, memory-mapped, or None."""

    digest: str
    names: tuple[str, ...] | None
    sizes: IntArray
    order: npt.NDArray[Any] | None


@contextmanager
def create(
    path: Path, digest: str, names: tuple[str, ...] | None, sizes: IntArray, dtype: npt.DTypeLike
) -> Iterator[npt.NDArray[Any]]:
    """The order, [examples] of ``dtype``, to be filled in; the file appears at ``path`` afterwards, or never."""
    examples = int(sizes.sum())
    label = json.dumps(names).encode()
    header = _FIXED.size + 32 + 8 * len(sizes) + len(label)
    begin = -(-header // _PAGE) * _PAGE
    itemsize = np.dtype(dtype).itemsize
    raw = bytes.fromhex(digest.removeprefix(_SCHEME))
    fixed = _FIXED.pack(_MAGIC, VERSION, itemsize, len(sizes), examples, begin, len(label), raw)
    rest = sizes.astype("<i8").tobytes() + label
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            file.write(fixed + hashlib.sha256(fixed + rest).digest() + rest)
            file.flush()
            _reserve(descriptor, begin + examples * itemsize)
            mapped = np.memmap(part, dtype=dtype, mode="r+", offset=begin, shape=(examples,))
            yield np.asarray(mapped)
            mapped.flush()
            del mapped
            os.fsync(descriptor)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def read(path: Path, *, whole: bool) -> Content:
    """What the file holds; without ``whole`` only its header is read and checked."""
    with path.open("rb") as file:
        fixed = file.read(_FIXED.size)
        if len(fixed) < _FIXED.size or not fixed.startswith(_MAGIC):
            raise ValueError(f"{path} is not an index file of taskgrad: choose another path")
        _, version, itemsize, tasks, examples, begin, label_bytes, raw = _FIXED.unpack(fixed)
        if version != VERSION:
            raise ValueError(
                f"{path} is an index file of format {version}, this version reads {VERSION}: build it anew"
            )
        length = os.fstat(file.fileno()).st_size
        checksum = file.read(32)
        room = max(length - file.tell(), 0)
        rest = file.read(min(8 * tasks + label_bytes, room))
        if hashlib.sha256(fixed + rest).digest() != checksum:
            raise ValueError(f"the header of the index file {path} is damaged: delete it and build it anew")
    names = json.loads(rest[8 * tasks :])
    sizes = np.frombuffer(rest[: 8 * tasks], dtype="<i8").astype(np.int64)
    order = None
    if whole:
        if length != begin + examples * itemsize:
            raise ValueError(
                f"the index file {path} has {length} bytes instead of {begin + examples * itemsize}: delete it and "
                "build it anew"
            )
        mapped = np.memmap(path, dtype=f"<u{itemsize}", mode="r", offset=begin, shape=(examples,))
        order = np.asarray(mapped)
    return Content(_SCHEME + raw.hex(), names and tuple(names), sizes, order)


def _reserve(descriptor: int, length: int) -> None:
    # Else a full disk would be found out by a signal, in the middle of writing through the mapping.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, length)
    else:
        os.ftruncate(descriptor, length)
