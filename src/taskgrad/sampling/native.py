"""Whether the sampler's C++ part (``csrc/index_engine``, module ``taskgrad._index_engine``) is in force, and why.

It is built when the package is installed, if a C++ compiler is there. The environment variable ``TASKGRAD_NATIVE``
overrides: ``0`` takes NumPy, ``1`` makes it an error if the extension is missing.
"""

from __future__ import annotations

import functools
import importlib
import os
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
        module = importlib.import_module("taskgrad._index_engine")
        if index_numpy.ALGORITHM != module.ALGORITHM:
            raise ImportError(f"{module.__file__} was built from other sources: install taskgrad again")
    except ImportError as error:
        reason = f"{error} (it is built on installation where a C++ compiler is found)"
        if wish == "1":
            raise RuntimeError(f"TASKGRAD_NATIVE=1, but the C++ index engine is not available: {reason}") from error
        return None, f"NumPy because {reason}"
    return module, f"C++ at {module.__file__}"


def engine_class() -> Any:
    """The ``Engine`` in force: the extension's or ``index_numpy``'s."""
    module, _ = load()
    return index_numpy.Engine if module is None else module.Engine
