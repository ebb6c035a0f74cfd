"""The simulator's C++ part (``simulator.cpp``), compiled on first use, and its reports as policies read them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgrad.ops._native import compiler

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SOURCE = Path(__file__).with_name("simulator.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC"]
COLUMNS = (
    "examples", "loss", "norm", "signal", "overwrite", "overwrite_se", "pull", "own_pull", "gained", "undone",
    "retention", "retention_se",
)  # fmt: skip
"""Columns of a report, in the order of the C++ part."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled simulator, from the temporary folder if it was compiled before. Raises RuntimeError without a
    compiler, and subprocess.CalledProcessError where it fails."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([*FLAGS, platform.processor(), platform.node()]).encode())
    built = Path(tempfile.gettempdir(), f"taskgrad-simulator-{os.getuid()}-{key.hexdigest()[:16]}.so")
    if not built.exists():
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch, "simulator.so")
            subprocess.run([*compiler(), *FLAGS, "-o", str(out), str(SOURCE)], check=True)
            moving = built.with_suffix(f".{os.getpid()}")
            moving.write_bytes(out.read_bytes())
            os.replace(moving, built)
    found = ctypes.CDLL(str(built))
    for kind in ("float", "double"):
        getattr(found, f"make_{kind}").restype = ctypes.c_void_p
        getattr(found, f"parameters_{kind}").restype = ctypes.c_void_p
    return found


class Simulator:
    """A network in training; see ``simulator.cpp``.

    Args:
        tasks: names of the T tasks.
        inputs, width, outputs: of the network.
        regression: squared error of one output instead of cross entropy.
        adam: Adam with torch's defaults instead of plain SGD; ``rate``: learning rate.
        scale: of the task code.
        start: initial parameters: W1 [inputs, width], b1, W2 [outputs, width], b2, E [T, width], one after the other.
        effects: whether reports hold what was gained, undone and retained.
        dtype: float32, or float64 to compare with.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        inputs: int,
        width: int,
        outputs: int,
        start: Floats,
        *,
        rate: float,
        adam: bool = True,
        scale: float = 1.0,
        regression: bool = False,
        effects: bool = False,
        dtype: Any = np.float32,
    ) -> None:
        self.tasks = tuple(tasks)
        self.dtype = np.dtype(dtype)
        self.inputs, self.steps = inputs, 0
        self._kind = {"float32": "float", "float64": "double"}[self.dtype.name]
        start = np.ascontiguousarray(start, self.dtype)
        self.size = inputs * width + width + width * outputs + outputs + len(self.tasks) * width
        if start.shape != (self.size,):
            raise ValueError(f"start must hold {self.size} parameters, got shape {start.shape}")
        sizes = (ctypes.c_int(n) for n in (inputs, width, outputs, len(self.tasks), regression, adam, effects))
        self._made = ctypes.c_void_p(
            self._function("make")(*sizes, ctypes.c_double(rate), ctypes.c_double(scale), _at(start))
        )

    def _function(self, name: str) -> Any:
        return getattr(library(), f"{name}_{self._kind}")

    def __del__(self) -> None:
        if hasattr(self, "_made"):
            self._function("drop")(self._made)

    def step(self, x: npt.NDArray[Any], task: Ints, y: npt.NDArray[Any], gram: bool = False) -> SimpleNamespace:
        """Train on rows ``x`` [B, inputs] of the tasks ``task`` [B], sorted, with labels ``y`` [B]; gives the report.
        ``gram``: whether it holds the [T, T] inner products of the tasks' gradients."""
        count = len(self.tasks)
        x, y = np.ascontiguousarray(x, self.dtype), np.ascontiguousarray(y, self.dtype)
        said = np.empty((count, len(COLUMNS)))
        products = np.empty((count, count)) if gram else None
        self._function("step")(
            self._made,
            ctypes.c_int(len(task)),
            *map(_at, (x, task, y, said)),
            None if products is None else _at(products),
        )
        self.steps += 1
        columns = dict(zip(COLUMNS, said.T, strict=True))
        return SimpleNamespace(
            tasks=self.tasks, step=self.steps, valid=True, tokens=columns["examples"], gram=products, **columns
        )

    def evaluate(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[Floats, Floats]:
        """Loss and accuracy (regression: mean squared error), [T] each, on rows ``x`` [N, inputs], ``y`` [T, N]."""
        x, y = np.ascontiguousarray(x, self.dtype), np.ascontiguousarray(y, self.dtype)
        losses, scores = np.empty(len(self.tasks)), np.empty(len(self.tasks))
        self._function("evaluate")(self._made, ctypes.c_int(len(x)), _at(x), _at(y), _at(losses), _at(scores))
        return losses, scores

    def parameters(self) -> npt.NDArray[Any]:
        """A copy of the parameters, as ``start``."""
        found = ctypes.cast(
            self._function("parameters")(self._made), ctypes.POINTER(np.ctypeslib.as_ctypes_type(self.dtype))
        )
        return np.ctypeslib.as_array(found, (self.size,)).copy()


def _at(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
