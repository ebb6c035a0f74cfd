"""How ops are registered: one order of steps, and which kernel runs on a GPU, decided without one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import taskgrad.ops
from taskgrad.ops import _native, _register
from taskgrad.ops._register import OPS, Cpp, Triton
from tests.utils import offline

TRITON = Path(_register.__file__).parent / "triton"
KERNELS = [(name, kernel) for name, op in OPS.items() for kernel in op.cuda]


def test_every_kernel_is_behind_an_op() -> None:
    """Nothing is compiled that nothing calls. ``wgrad_sketch`` is called by two ops that add a product to it."""
    from taskgrad.ops.wgrad_sketch import _PRODUCTS

    reached = {kernel.stem for _, kernel in [*KERNELS, ("", _PRODUCTS)] if isinstance(kernel, Triton)}
    assert reached == {path.stem for path in TRITON.glob("*.py")} - {"__init__"}
    registered = (offline.ROOT / "csrc" / "cuda" / "register.cpp").read_text()
    assert {line.split('"')[1] for line in registered.splitlines() if "m.impl(" in line} == {
        kernel.name for _, kernel in KERNELS if isinstance(kernel, Cpp)
    }


def test_native_cpu_kernels_are_those_of_csrc() -> None:
    recipe = json.loads((offline.ROOT / "csrc" / "build.json").read_text())
    text = "".join((offline.ROOT / "csrc" / source).read_text() for source in recipe["sources"])
    assert sorted(_native.kernels) == sorted(name for name in OPS if f'm.impl("{name}"' in text)
    assert sorted(_native.kernels) == sorted(name for name, op in OPS.items() if op.native)


PRIVATE = {"segments_hold", "sketch_of_rows"}  # parts of others


def test_no_name_but_the_public_ones_and_their_parts_is_an_op() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("taskgrad::")
    }
    assert registered == set(OPS) == {*taskgrad.ops.__all__, *PRIVATE}


# ------------------------------------------------------------------------------------------ which kernel, on a GPU


class OnGpu(Tensor):
    """Says that it is on a GPU, and holds nothing."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Makes tensors of an sm_90."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnGpu)


def arguments(name: str, make: Callable[..., Tensor], dtype: torch.dtype, segments: int, rows: int) -> tuple[Any, ...]:
    offsets = make(segments + 1, dtype=torch.int64)
    y, x, order = make(6, 2, 8, dtype=dtype), make(6, 2, 8, dtype=dtype), make(6, dtype=torch.int64)
    stat = make(6, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    double = torch.float64  # before, after, theta, to_mean, correction
    memory = [make(*shape, dtype=double) for shape in ((3, 100), (3, 100), (100,), (3,), (3, 1))]
    return {
        "segment_sum": (y, order, offsets),
        "norm_segment_sum": (y, x, None, stat, None, offsets),
        "sum_gram": (make(rows, 100, dtype=dtype),),
        "memory_read": (make(3, 100, dtype=dtype), *memory[:2], make(4, 100, dtype=dtype), *memory[2:]),
        "memory_write": (
            *(make(3, 100, dtype=dtype), *memory[:2], make(4, 100, dtype=dtype), memory[3], make(3, dtype=torch.bool)),
            *(None, memory[2], memory[2], memory[4], 0.9),
        ),
        "sketch_all": ([make(6, 8, dtype=dtype)], [make(6, 2)], [make(8, 2)]),
        "sketch_params": (make(6, 8, dtype=dtype), make(6, 2), make(8, 2)),
        "ghost_gram": (y[:, 0], x[:, 0], offsets),
        "wgrad_gram": (y[:, 0], x[:, 0], offsets),
        "embedding_stats": (y, make(6, 2, dtype=torch.int64), order, offsets, 50, -1, make(50, 2), None),
    }[name]


def language(kernel: object) -> str:
    return {Cpp: "C++", Triton: "Triton", type(None): "reference"}[type(kernel)]


CHOICES = [  # op, dtype, segments, rows of a block, with the C++ kernels, without
    ("segment_sum", torch.bfloat16, 3, 3, "C++", "Triton"),
    ("segment_sum", torch.float32, 5000, 3, "C++", "reference"),
    ("segment_sum", torch.float64, 3, 3, "reference", "reference"),
    ("segment_sum", torch.float32, 0, 3, "reference", "reference"),
    ("norm_segment_sum", torch.float32, 3, 3, "C++", "Triton"),
    ("norm_segment_sum", torch.float64, 3, 3, "reference", "reference"),
    ("sum_gram", torch.float32, 3, 32, "C++", "Triton"),
    ("sum_gram", torch.float32, 3, 33, "Triton", "Triton"),
    ("sum_gram", torch.float32, 3, 65, "reference", "reference"),
    ("sum_gram", torch.float64, 3, 3, "reference", "reference"),
    ("sum_gram", torch.float32, 3, 0, "reference", "reference"),
    *((name, torch.float32, 3, 3, "Triton", "Triton") for name in ("memory_read", "memory_write", "sketch_params")),
    *((name, torch.bfloat16, 3, 3, "Triton", "Triton") for name in ("ghost_gram", "wgrad_gram", "embedding_stats")),
    *((name, torch.float64, 3, 3, "reference", "reference") for name in ("memory_read", "ghost_gram", "wgrad_gram")),
]


@pytest.mark.parametrize("built", [True, False], ids=["with C++", "without"])
@pytest.mark.parametrize(("name", "dtype", "segments", "rows", "with_cpp", "without"), CHOICES)
def test_which_kernel_runs_on_a_gpu(name, dtype, segments, rows, with_cpp, without, built, gpu, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(_native, "has_cuda", lambda kernel: built)
    chosen = OPS[name].kernel(*arguments(name, gpu, dtype, segments, rows))
    assert language(chosen) == (with_cpp if built else without)


@pytest.mark.parametrize("name", sorted({name for name, kernel in KERNELS}))
def test_on_an_old_gpu_and_without_triton_the_reference_runs(name, gpu, monkeypatch) -> None:
    monkeypatch.setattr(_native, "has_cuda", lambda kernel: False)
    given = arguments(name, gpu, torch.float32, 3, 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "an old one")
        assert OPS[name].kernel(*given) is None
    monkeypatch.setattr(_register, "_triton_is_missing", lambda: True)
    assert OPS[name].kernel(*given) is None


def test_a_gpu_s_kernels_are_those_of_the_library_in_force() -> None:
    """A library for the CPU alone, and one that is not there, have none."""
    assert not _native.has_cuda("no_such_kernel")
    if torch.version.cuda is None:
        assert not _native.has_cuda("segment_sum")


def test_the_cpp_kernels_get_offsets_where_and_as_they_want_them() -> None:
    """int64, whatever the caller has (here without a device to move them to)."""
    kernel = next(k for _, k in KERNELS if isinstance(k, Cpp) and k.name == "segment_sum")
    got = kernel.launch(lambda *args: args, torch.zeros(3, 1, 2), None, torch.tensor([0, 3], dtype=torch.int32))
    assert got[2].dtype == torch.int64 and got[2].tolist() == [0, 3]


# ------------------------------------------------------------------------------------------ on a CPU

STEP = """
import sys, torch, taskgrad as tg
from torch import nn
model = nn.Sequential(nn.Embedding(9, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 3))
tracker = tg.track(model, ["a", "b"])  # without an optimizer: torch's own import triton
for _ in range(2):
    with tracker.batch(torch.tensor([0, 1, 1, 0])) as batch:
        losses = model(torch.randint(0, 9, (4,))).square().mean(1)
        batch.losses(losses)
        losses.mean().backward()
    tracker.step()
    model.zero_grad()
tracker.report()
print(*(name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("taskgrad.ops.triton")))
"""


def test_a_step_on_a_cpu_imports_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr


def test_triton_is_imported_by_one_function() -> None:
    """And that one by nobody but what launches a kernel."""
    code = "".join(path.read_text() for path in TRITON.parent.glob("*.py"))
    assert code.count("import triton") == 1 and code.count("import_module(") == 1 and "from .triton" not in code


WRONG = torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("values", "offsets", "error"),
    [
        (torch.zeros(2, dtype=torch.int64), torch.zeros(1, 1).long(), TypeError),  # type before shape
        (torch.zeros(2, 1, 1, 1), WRONG, ValueError),  # shape before values
        (torch.zeros(2, 1, 1), WRONG, ValueError),
    ],
)
def test_steps_are_taken_in_one_order(values, offsets, error) -> None:
    messages = {TypeError: "values must be float32", ValueError: "values must have shape|offsets must rise"}
    with pytest.raises(error, match=messages[error]) as raised:
        taskgrad.ops.segment_sum(values, None, offsets)
    if values.dim() == 4:
        assert "shape" in str(raised.value)


@pytest.mark.parametrize("name", sorted(taskgrad.ops.__all__))
def test_a_public_function_refuses_what_has_no_data(name) -> None:
    first = OPS[name].first_argument()

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    more = {
        "wgrad_sketch": lambda: (make(6, 2, 8), make(6, 2, 8), None, torch.tensor([0, 6]), None, None),
        "wgrad_stats": lambda: (make(6, 2, 8), make(6, 2, 8), None, torch.tensor([0, 6]), None, None),
        "embedding_gram": lambda: (make(6, 2, 8), make(6, 2, dtype=torch.int64), None, torch.tensor([0, 6]), 50),
        "conv_sketch": lambda: (
            make(6, 4, 7), make(6, 3, 9), make(4, 3, 3), [1], [0], [1], 1, None, torch.tensor([0, 6]), None, None
        ),
    }  # fmt: skip
    given = more[name]() if name in more else arguments(name, make, torch.float32, 3, 3)
    with pytest.raises(TypeError, match=f"{first} must be on a cpu or cuda device, got meta"):
        getattr(taskgrad.ops, name)(*given)


def test_arguments_that_want_a_gradient_are_detached() -> None:
    block = torch.randn(3, 5, requires_grad=True)
    total, gram = taskgrad.ops.sum_gram(block)
    assert not total.requires_grad and not gram.requires_grad
    left = torch.ones(6, 2, requires_grad=True)
    assert not taskgrad.ops.sketch_params(torch.ones(6, 8), left, None).requires_grad


def test_float32_is_rounded_where_torch_s_own_products_are() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert _register.tf32_allowed() is allowed
    finally:
        torch.set_float32_matmul_precision(before)
