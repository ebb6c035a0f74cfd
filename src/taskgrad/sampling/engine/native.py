"""Whether the sampler's C++ part (``csrc/index_engine``, module ``taskgrad._index_engine``) is in force, and why.

It is built when the package is installed, if a C++ compiler is there. The environment variable ``TASKGRAD_NATIVE``
overrides: ``0`` takes NumPy, ``1`` makes it an error if the extension is missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

from . import index_numpy


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The extension, or None, and which of the two is in force in words; decided once in a process.

    Raises:
        ValueError: ``TASKGRAD_NATIVE`` is neither unset, ``0`` nor ``1``.
        RuntimeError: ``TASKGRAD_NATIVE=1`` and the extension cannot be imported.
    """
    wish = os.environ.get("TASKGRAD_NATIVE", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"TASKGRAD_NATIVE must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None, "NumPy because TASKGRAD_NATIVE=0"
    try:
        check_is_whole("taskgrad._index_engine")
        module = importlib.import_module("taskgrad._index_engine")
        built = (module.ALGORITHM, getattr(module, "INTERFACE", 1))
        if built != (index_numpy.ALGORITHM, index_numpy.INTERFACE):
            raise ImportError(f"{module.__file__} was built from other sources: install taskgrad again")
    except ImportError as error:
        reason = f"{error} (it is built on installation where a C++ compiler is found)"
        if wish == "1":
            raise RuntimeError(f"TASKGRAD_NATIVE=1, but the C++ index engine is not available: {reason}") from error
        return None, f"NumPy because {reason}"
    return module, f"C++ at {module.__file__}"


def check_is_whole(name: str) -> None:
    """Raise ImportError if the file of an extension module ends before what is to be mapped of it (ELF of 64 bits):
    importing it would kill the process."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return  # importing it says why
    try:
        content = Path(spec.origin).read_bytes()
        if content[:6] != b"\x7fELF\x02\x01":
            return
        (headers,), (size, count) = struct.unpack_from("<Q", content, 32), struct.unpack_from("<HH", content, 54)
        ends = [sum(struct.unpack_from("<Q16xQ", content, headers + i * size + 8)) for i in range(count)]
    except (OSError, OverflowError, struct.error) as error:
        raise ImportError(f"{spec.origin} cannot be read: {error}") from None
    if max(ends, default=0) > len(content):
        raise ImportError(f"{spec.origin} is cut off: install taskgrad again")


def engine_class() -> Any:
    """The ``Engine`` in force: the extension's or ``index_numpy``'s."""
    module, _ = load()
    return index_numpy.Engine if module is None else module.Engine
