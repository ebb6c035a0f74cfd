"""``taskgrad doctor``: what this installation runs on, and which kernels are in force and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

from . import __version__
from ._text import printable
from .capture.sketch import sketch_map
from .ops import _native, cost_model
from .ops._register import OPS, Cpp, triton_obstacle
from .ops.wgrad_sketch import splits
from .ops.wgrad_stats import gram_strategy
from .sampling.engine import native as index_engine
from .tracking.tracker import track

Facts = dict[str, str | int | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--explain",
        nargs=4,
        type=_positive,
        metavar=("N", "D_IN", "D_OUT", "T"),
        help="print what would run for a Linear layer on N rows of T tasks, and why, and nothing else",
    )


def run(args: argparse.Namespace) -> int:
    """Print the facts; 1 if the native kernels are demanded (``TASKGRAD_NATIVE=1``) and missing, else 0."""
    if args.explain is not None:
        print(explain(*args.explain))
        return 0
    facts, healthy = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {'none' if value is None else printable(str(value))}")
    return 0 if healthy else 1


def explain(rows: int, d_in: int, d_out: int, tasks: int) -> str:
    """What is done for a layer in bfloat16 on this machine's GPU, or in float32 on its CPU, as the ops themselves
    decide it, and the cost model's table."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    where = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    dense, found = cost_model.costs(rows, d_in, d_out, tasks + 1, dtype, device)
    return "\n".join(
        (
            f"{dtype} on {where}: arithmetic with assumed rates, not a measurement",
            cost_model.explain(dense, found),
            *_decisions(rows, d_in, d_out, tasks, dtype, device),
        )
    )


def _decisions(rows: int, d_in: int, d_out: int, tasks: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Of the ops, for tensors of these shapes that have one element in memory."""
    one = torch.zeros(1, dtype=dtype, device=device)
    dy, x = one.expand(rows, 1, d_out), one.expand(rows, 1, d_in)
    offsets = torch.zeros(1, dtype=torch.int64).expand(tasks + 2)
    sketch = sketch_map((d_out, d_in), inspect.signature(track).parameters["sketch_dim"].default, 0, "")
    sides = sketch.left, sketch.right
    skinny = not splits(dy, x, offsets, *sides)
    return [
        f"exact Gram: {gram_strategy(dy, x, offsets, *sides)}",
        f"sketch: {'skinny products of dY and X' if skinny else 'of the gradients of the tasks'}",
    ]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def collect() -> tuple[Facts, bool]:
    """All facts by name (``None``: absent), and whether nothing that was demanded is missing.

    Loads the native kernels, and so compiles them if no cached library is there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is among the facts
        kernels, kernels_found = _in_force(lambda: str(_native.status()))
    engine, engine_found = _in_force(lambda: index_engine.load()[1])
    facts: Facts = {
        "taskgrad": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "platform": platform.platform(),
        "cpu threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "torch built for CUDA": torch.version.cuda,
        "CUDA_HOME": CUDA_HOME,
        "nvcc": _first_line("nvcc", "--version", containing="release"),
        "compiler": _compiler(),
        "ninja": _ninja(),
        "kernels on cpu": kernels,
        "kernels on cuda": _cuda_path(),
        "index engine": engine,
    }
    return facts, kernels_found and engine_found


def _in_force(status: Callable[[], str]) -> tuple[str, bool]:
    """What ``status`` says, or why it fails, and whether it did not."""
    try:
        return status(), True
    except (RuntimeError, ValueError) as error:
        return f"unavailable: {error}", False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _cuda_path() -> str:
    if not torch.cuda.is_available():
        return "not used: torch finds no GPU"
    reason = triton_obstacle(torch.device("cuda"))
    others = "triton" if reason is None else f"reference because {reason}"
    cpp = [op.name for op in OPS.values() if any(isinstance(k, Cpp) and _native.has_cuda(k.name) for k in op.cuda)]
    return f"C++ ({', '.join(cpp)}), {others} (the others)" if cpp else others


def _compiler() -> str | None:
    try:
        command = _native.compiler()
    except RuntimeError:
        return None
    return _first_line(*command, "--version")


def _ninja() -> str | None:
    if version := _version("ninja"):
        return version
    return _first_line("ninja", "--version")


def _first_line(program: str, *arguments: str, containing: str = "") -> str | None:
    """The program's path and the first line it prints with ``containing`` in it; None if it cannot be run."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        output = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.strip() for line in output.splitlines() if containing in line]
    return f"{Path(path)}: {lines[0]}" if lines else path
