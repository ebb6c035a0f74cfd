"""No Triton kernel is compiled anew because a batch has another number of rows.

Every launch function runs on CPU tensors; in place of the launch, Triton's own binder says under which key the kernel
would be looked up in its cache.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import taskgrad.ops.triton as kernels  # noqa: E402
from taskgrad.ops.triton import (  # noqa: E402
    embedding_stats,
    ghost_gram,
    memory_read,
    memory_write,
    segment_sum,
    sketch_params,
    sum_gram,
    wgrad_gram,
    wgrad_sketch,
)

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the compiler")

# entries and rows of each: ones, odd numbers, multiples of 16, more than a program takes
BATCHES = [(1, 1), (3, 1), (16, 1), (33, 1), (48, 1), (7, 5), (7, 16), (16, 7), (16, 16), (2048, 1), (5000, 3)]
TASKS = 5  # and rest


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """What kernels would have been compiled for, by name."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    found: dict[str, set[str]] = {}
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def bound(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, rest = binder(*args, **options)
        found.setdefault(kernel.__name__, set()).add(f"{specialization} {rest}")

    monkeypatch.setattr(JITFunction, "run", bound)
    return found


def _offsets(entries: int) -> Tensor:
    return torch.linspace(0, entries, TASKS + 2).long()


def of_segment_sum(entries: int, rows: int, d: int) -> None:
    segment_sum.launch(torch.zeros(entries, rows, d), None, _offsets(entries))


def of_norm(entries: int, rows: int, d: int) -> None:
    x, rstd = torch.zeros(entries, rows, d), torch.zeros(entries, rows)
    segment_sum.launch_norm(x, x, None, rstd, torch.arange(entries), _offsets(entries))


def of_embedding(entries: int, rows: int, d: int) -> None:
    index = torch.zeros(entries, rows, dtype=torch.int64)
    v, left = torch.zeros(entries, rows, d), torch.zeros(10, 4)
    embedding_stats.launch(v, index, torch.arange(entries), _offsets(entries), left)


def of_wgrad_sketch(entries: int, rows: int, d: int) -> None:
    u = torch.zeros(entries * rows, d)
    wgrad_sketch.launch(u, u, rows, torch.arange(entries), _offsets(entries), 132, 9)


def of_wgrad_gram(entries: int, rows: int, d: int) -> None:
    dy, tile = torch.zeros(entries * rows, d), wgrad_gram.tile_config(torch.float32, False, d, d, 132, 9)
    wgrad_gram.launch(dy, dy, _offsets(entries) * rows, torch.zeros(d, d), tile, 132, tf32=False)


def of_ghost_gram(entries: int, rows: int, d: int) -> None:
    dy, tile = torch.zeros(entries * rows, d), ghost_gram.tile_config(torch.float32, False, 9)
    ghost_gram.launch(dy, dy, _offsets(entries) * rows, tile, 132, tf32=False)


ROWS = [of_segment_sum, of_norm, of_embedding, of_wgrad_sketch, of_wgrad_gram, of_ghost_gram]


@pytest.mark.parametrize("d", [1, 10, 48], ids=lambda d: f"d={d}")
@pytest.mark.parametrize("launch", ROWS)
def test_another_number_of_rows_compiles_nothing(
    launch: Callable[[int, int, int], None], d: int, keys: dict[str, set[str]]
) -> None:
    for entries, rows in BATCHES:
        launch(entries, rows, d)
    assert keys and all(len(of_kernel) == 1 for of_kernel in keys.values()), keys


def of_memory(tasks: int, numbers: int) -> None:
    ema, gradient = torch.zeros(tasks, numbers), torch.zeros(tasks + 1, numbers)
    before, after = torch.zeros(2, tasks, numbers, dtype=torch.float64)
    theta, to_mean = torch.zeros(numbers, dtype=torch.float64), torch.zeros(tasks, dtype=torch.float64)
    one = torch.ones(tasks, 1, dtype=torch.float64)
    memory_read.launch(ema, before, after, gradient, theta, to_mean, one)
    seen = torch.ones(tasks, dtype=torch.bool)
    memory_write.launch(ema, before, after, gradient, to_mean, seen, None, theta, theta, one, 0.9)


def of_sum_gram(tasks: int, numbers: int) -> None:
    sum_gram.launch(torch.zeros(tasks, numbers))


@pytest.mark.parametrize("launch", [of_memory, of_sum_gram])
def test_another_number_of_tasks_compiles_nothing(
    launch: Callable[[int, int], None], keys: dict[str, set[str]]
) -> None:
    for tasks in (1, 2, 14, 15):  # of 16 on blocks are larger
        launch(tasks, 480)
        launch(tasks, 48_000)
    assert keys and all(len(of_kernel) == 1 for of_kernel in keys.values()), keys


def test_the_height_of_a_parameter_compiles_nothing(keys: dict[str, set[str]]) -> None:
    for d0 in (2, 16, 4096):
        sketch_params.launch(torch.zeros(d0, 64), torch.zeros(d0, 8), torch.zeros(64, 8))
    assert len(keys["sketch_params_kernel"]) == 1


def test_every_kernel_is_launched_here(keys: dict[str, set[str]]) -> None:
    for launch in ROWS:
        launch(4, 3, 8)
    of_memory(3, 40)
    of_sum_gram(3, 40)
    sketch_params.launch(torch.zeros(20, 64), torch.zeros(20, 8), torch.zeros(64, 8))
    names = set()
    for stem in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{stem.name}")
        names |= {name for name in vars(module) if name.endswith("_kernel")}
    assert keys.keys() == names
