"""The index file: the examples of a data set sorted by task, to be memory-mapped.

    8 bytes   "taskgrad"
    ints      format version (4 bytes), bytes per example (4), tasks, examples, where the order begins, bytes of names
    32 bytes  SHA-256 of the task ids, each as 4 bytes
    4 bytes   CRC-32 of all that follows the names
    32 bytes  SHA-256 of the header: all of the above, sizes and names
    int64     size of each task
    JSON      names of the tasks, or null
    uint32 or uint64, from the next multiple of 4096 on: the order

Everything little-endian. Nothing of a file is used before all of it has been verified.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..._files import replacing
from ..arrays import IntArray
from ..engine.index import MAX_TASKS
from .grouping import order_dtype

VERSION = 2

_MAGIC = b"taskgrad"
_FIXED = struct.Struct("<8sIIQQQQ32sI")
_PAGE = 4096
_MOST_LABEL = 1 << 28
_SCHEME = "ids-sha256:"
_CHUNK = 1 << 20  # stays in the processor's cache between reading and checking


class Content(NamedTuple):
    """``digest`` of the ids; ``names`` or None; ``sizes`` int64 [T]; ``order`` [examples], memory-mapped."""

    digest: str
    names: tuple[str, ...] | None
    sizes: IntArray
    order: npt.NDArray[Any]


def is_at(path: Path) -> bool:
    """Whether there is an index file at ``path``, sound or not; raises ValueError if another file is there."""
    try:
        with _open(path) as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _other(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def create(path: Path, digest: str, names: tuple[str, ...] | None, sizes: IntArray) -> Iterator[npt.NDArray[Any]]:
    """The order, uint32 or uint64 [examples], to be filled in; the file appears at ``path`` afterwards, or never.

    Raises ValueError if the names are too long for a header, OSError if there is no room for the file.
    """
    examples = int(sizes.sum())
    label = json.dumps(names).encode()
    if len(label) > _MOST_LABEL:
        raise ValueError(f"tasks take {len(label)} bytes as JSON, an index file holds up to {_MOST_LABEL} of names")
    header = _header_bytes(len(sizes), len(label))
    begin = _begin(header)
    dtype = order_dtype(examples)
    length = begin + examples * dtype.itemsize
    with replacing(path) as temporary, temporary.open("r+b") as file:
        _reserve(file.fileno(), length, path)
        mapped = np.memmap(file, dtype=dtype, mode="r+", offset=begin, shape=(examples,))
        yield np.asarray(mapped)
        mapped.flush()
        del mapped
        checksum = 0
        file.seek(header)
        for chunk in _chunks(file, length - header):
            checksum = zlib.crc32(chunk, checksum)
        raw = bytes.fromhex(digest.removeprefix(_SCHEME))
        fixed = _FIXED.pack(_MAGIC, VERSION, dtype.itemsize, len(sizes), examples, begin, len(label), raw, checksum)
        rest = sizes.astype("<i8").tobytes() + label
        file.seek(0)
        file.write(fixed + hashlib.sha256(fixed + rest).digest() + rest)


def read(path: Path) -> Content:
    """What the file holds, after all of it has been read once and verified, in little memory.

    Raises ValueError if it is no index file, of another version, or if anything in it is not as it was written.
    """
    with _open(path) as file:
        length = os.fstat(file.fileno()).st_size
        fixed = file.read(_FIXED.size)
        if not fixed.startswith(_MAGIC):
            raise _other(path)
        version = int.from_bytes(fixed[8:12], "little")
        if version != VERSION:
            raise ValueError(
                f"{path} is an index file of format {version}, this version reads {VERSION}: build it anew"
            )
        if len(fixed) < _FIXED.size:
            raise _damaged(path, f"it ends after {length} bytes")
        _, _, itemsize, tasks, examples, begin, label_bytes, raw, checksum = _FIXED.unpack(fixed)
        header = _header_bytes(tasks, label_bytes)
        # before so much is read
        if not 1 <= tasks <= MAX_TASKS or label_bytes > _MOST_LABEL or header > length:
            raise _damaged(path, "its header")
        expected = file.read(32)
        rest = file.read(header - file.tell())
        if hashlib.sha256(fixed + rest).digest() != expected:
            raise _damaged(path, "its header")
        if begin != _begin(header) or itemsize != order_dtype(examples).itemsize:
            raise _damaged(path, "its header contradicts itself")
        if length != begin + examples * itemsize:
            raise _damaged(path, f"it has {length} bytes instead of {begin + examples * itemsize}")
        names = _names(rest[8 * tasks :], tasks, path)
        sizes = np.frombuffer(rest[: 8 * tasks], dtype="<i8").astype(np.int64)
        if sizes.min() < 1 or sum(sizes.tolist()) != examples:
            raise _damaged(path, f"its sizes do not make {examples} examples")
        dtype = order_dtype(examples)
        _verify(file, path, checksum, begin - header, examples, dtype)
        # of this file, not of one that has taken its place
        mapped = np.memmap(file, dtype=dtype, mode="r", offset=begin, shape=(examples,))
    return Content(_SCHEME + raw.hex(), names, sizes, np.asarray(mapped))


def _verify(
    file: io.BufferedIOBase, path: Path, checksum: int, padding: int, examples: int, dtype: np.dtype[Any]
) -> None:
    found, highest = zlib.crc32(file.read(padding)), 0
    for chunk in _chunks(file, examples * dtype.itemsize):
        found = zlib.crc32(chunk, found)
        if len(chunk) % dtype.itemsize == 0:  # else the file was cut meanwhile
            highest = max(highest, int(np.frombuffer(chunk, dtype).max()))
    if found != checksum:
        raise _damaged(path, "its order")
    if highest >= examples:
        raise _damaged(path, f"its order names example {highest} of {examples}")


def _chunks(file: io.BufferedIOBase, length: int) -> Iterator[memoryview]:
    """The next ``length`` bytes, or those that are there; each chunk holds until the next one is asked for."""
    view = memoryview(bytearray(min(_CHUNK, length)))
    while length:
        count = file.readinto(view[: min(len(view), length)])
        if not count:
            return
        yield view[:count]
        length -= count


def _names(label: bytes, tasks: int, path: Path) -> tuple[str, ...] | None:
    try:
        names = json.loads(label)
    except (ValueError, RecursionError):
        raise _damaged(path, "its names are no JSON") from None
    if names is None:
        return None
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or not len(set(names)) == len(names) == tasks
    ):
        raise _damaged(path, f"its names are not those of {tasks} tasks")
    return tuple(names)


def _open(path: Path) -> io.BufferedReader:
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe would be waited for
        raise _other(path)
    return path.open("rb")  # which has its own error for a folder


def _other(path: Path) -> ValueError:
    return ValueError(f"{path} is not an index file of taskgrad: choose another path")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"the index file {path} is damaged ({what}): build it anew")


def _header_bytes(tasks: int, label_bytes: int) -> int:
    return _FIXED.size + 32 + 8 * tasks + label_bytes


def _begin(header: int) -> int:
    return -(-header // _PAGE) * _PAGE


def _reserve(descriptor: int, length: int, path: Path) -> None:
    # Else a full disk would be found out by a signal, in the middle of writing through the mapping.
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, length)
        else:
            os.ftruncate(descriptor, length)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: no room for {length} bytes", str(path)) from None
