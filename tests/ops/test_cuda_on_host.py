"""The CUDA C++ kernels without a GPU: their device code is compiled for the host and run by loops over threads.

It proves indexing, masking and arithmetic. A host runs the threads of a phase one after another, so it would not see a
barrier that is missing within one.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import taskgrad.ops
from taskgrad.ops import _native
from tests.utils import offline
from tests.utils.rows import COUNTS, make_rows

sum_module = sys.modules["taskgrad.ops.sum_gram"]
segment_module = sys.modules["taskgrad.ops.segment_sum"]


def built() -> bool:
    return torch.cuda.is_available() and _native.has_cuda("sum_gram")


needs_built = pytest.mark.skipif(not built(), reason="needs a CUDA device and kernels built ahead of time")

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(CODES)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    if offline.nvcc() is None:
        pytest.skip("needs nvcc")
    path = tmp_path_factory.mktemp("cuda") / "cuda_on_host.so"
    source = Path(__file__).with_name("cuda_on_host.cu")
    command = ["nvcc", *offline.NVCC_FLAGS, "-shared", "-Xcompiler", "-fPIC", "-gencode=arch=compute_80,code=sm_80"]
    done = subprocess.run([*command, str(source), "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(path))
    loaded.sum_gram_scratch.restype = ctypes.c_int64
    return loaded


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def numbers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


# 32 columns and more are a tile: 1024 at up to 8 rows, 512 at 16, 256 at 32; 528 programs at most
@pytest.mark.parametrize("vectors", [True, False], ids=["16 bytes", "scalar"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 1023), (4, 1024), (5, 1025), (8, 3001), (9, 512), (16, 513), (17, 300), (32, 257)], ids=str
)
def test_sum_gram(library, shape, dtype, vectors):
    rows, columns = shape
    stride = columns + -columns % 8 if vectors else columns + 1
    block = torch.randn(rows, stride).to(dtype)[:, :columns]
    total = torch.empty(columns, dtype=dtype)
    gram = torch.empty(rows, rows, dtype=torch.float64)
    scratch = torch.empty(library.sum_gram_scratch(*numbers(*shape)), dtype=torch.float64)
    pointers = [address(t) for t in (block, total, gram, scratch)]
    library.sum_gram_host(CODES[dtype], *pointers, *numbers(rows, columns, stride), ctypes.c_bool(vectors))
    exact = block.double()
    norms = exact.norm(dim=1)
    assert ((gram - exact @ exact.mT).abs() <= 1e-6 * norms[:, None] * norms[None, :]).all()
    assert torch.equal(gram, gram.mT)
    rounding = torch.finfo(dtype).eps + rows * torch.finfo(torch.float32).eps
    assert ((total.double() - exact.sum(0)).abs() <= rounding * exact.abs().sum(0)).all()


def test_sum_gram_takes_several_tiles_per_program(library):
    rows, columns = 32, 256 * 529 + 3
    block = torch.randn(rows, columns)
    total, gram = torch.empty(columns), torch.empty(rows, rows, dtype=torch.float64)
    scratch = torch.empty(library.sum_gram_scratch(*numbers(rows, columns)), dtype=torch.float64)
    pointers = [address(t) for t in (block, total, gram, scratch)]
    library.sum_gram_host(0, *pointers, *numbers(rows, columns, columns), ctypes.c_bool(False))
    torch.testing.assert_close(gram, block.double() @ block.double().mT, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(total, block.sum(0))


@pytest.mark.parametrize("vectors", [True, False], ids=["16 bytes", "scalar"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sum", "layer norm", "rms norm"])
@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("counts", [*COUNTS, [3, 0, 0, 30, 1, 0, 7, 0]], ids=str)
@pytest.mark.parametrize("rows_per_part", [1, 5, 1000])
def test_segment_sum(library, counts, shuffled, kind, dtype, vectors, rows_per_part):
    _, order, offsets = make_rows(counts, shuffled)
    entries, rows, d = sum(counts), 3, 24 if vectors else 5
    dy, x = (torch.randn(entries, rows + 2, d).to(dtype)[:, :rows] for _ in range(2))
    mean, rstd = torch.randn(entries, rows), torch.rand(entries, rows) + 0.5
    if kind == "sum":
        x = mean = rstd = None
    elif kind == "rms norm":
        mean = None
    gamma, beta = torch.empty(len(counts), d), torch.empty(len(counts), d)
    parts = -(-entries * rows // rows_per_part)
    scratch = torch.empty(2 * (parts + len(counts)) * d)
    strides = dy.stride()[:2] if x is None else (*dy.stride()[:2], *x.stride()[:2])
    shape = (ctypes.c_int64 * 8)(entries, rows, d, len(counts), *strides)
    pointers = [address(t) for t in (dy, x, mean, rstd, order, offsets, gamma, beta, scratch)]
    library.segment_sum_host(CODES[dtype], *pointers, shape, ctypes.c_int64(rows_per_part), ctypes.c_bool(vectors))
    torch.testing.assert_close(beta, segment_module.reference(dy, order, offsets), rtol=1e-5, atol=1e-4)
    if x is not None:
        wide = (dy.double(), x.double(), None if mean is None else mean.double(), rstd.double())
        want = segment_module.norm_reference(*wide, order, offsets)[0]
        torch.testing.assert_close(gamma.double(), want, rtol=1e-5, atol=1e-4)


def test_registration_compiles_against_torch(tmp_path):
    """Against the headers of any torch, also one built without CUDA (which could not load it)."""
    from torch.utils.cpp_extension import include_paths

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    recipe = json.loads((offline.ROOT / "csrc" / "build.json").read_text())
    flags = [*recipe["cflags"], *recipe["cuda_cflags"], "-Werror", "-fPIC", "-std=c++20"]
    include = [f"-isystem{path}" for path in include_paths()]
    source = offline.ROOT / "csrc" / "cuda" / "register.cpp"
    command = [compiler, *flags, *include, "-c", str(source), "-o", str(tmp_path / "register.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@needs_built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1025), (8, 300_007), (17, 4096), (32, 100_001)], ids=str)
def test_sum_gram_on_a_gpu(shape, dtype):
    block = torch.randn(shape).to(dtype).cuda()
    first = torch.ops.taskgrad_cuda.sum_gram(block)
    exact = block.double()
    norms = exact.norm(dim=1)
    assert ((first[1] - exact @ exact.mT).abs() <= 1e-6 * norms[:, None] * norms[None, :]).all()
    for ours, direct in zip(taskgrad.ops.sum_gram(block), first, strict=True):
        assert torch.equal(ours, direct)  # the op runs this kernel
    torch.testing.assert_close(first[0], sum_module.reference(block)[0])
    assert_repeats(lambda: torch.ops.taskgrad_cuda.sum_gram(block), first)


@pytest.mark.gpu
@needs_built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [5, 768])
def test_segment_sum_on_a_gpu(dtype, d):
    _, order, offsets = make_rows([30, 0, 1, 200], True)
    dy, x = (torch.randn(231, 7, d).to(dtype) for _ in range(2))
    mean, rstd = torch.randn(231, 7), torch.rand(231, 7) + 0.5
    want = segment_module.norm_reference(dy.double(), x.double(), mean.double(), rstd.double(), order, offsets)
    on_device = [t.cuda() for t in (dy, x, mean, rstd, order, offsets)]
    first = torch.ops.taskgrad_cuda.norm_segment_sum(*on_device)
    for got, exact in zip(first, want, strict=True):
        torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-4, atol=1e-3)
    assert torch.equal(torch.ops.taskgrad_cuda.segment_sum(on_device[0], *on_device[4:]), first[1])
    assert_repeats(lambda: torch.ops.taskgrad_cuda.norm_segment_sum(*on_device), first)


def assert_repeats(call, first):
    """The same bits 20 times, without waiting for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [call() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, first, strict=True))
