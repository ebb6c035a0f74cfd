"""``memory_read`` on a CPU, by the kernel in force and by the reference, against fp64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.ops import _native, memory_read
from tests.utils.memories import STRIDES, memory_arguments, restrided

module = sys.modules["taskgrad.ops.memory_read"]  # the attribute of taskgrad.ops is the function

# 512 columns are a chunk, fewer from 16 and 64 tasks on, 4 x 2 rows a tile, 65536 elements a stripe of the CPU kernel
SHAPES = [(1, 1), (1, 511), (2, 512), (4, 513), (8, 30011), (17, 1025), (65, 700)]
DTYPES = [torch.float32, torch.float64]
Arguments = dict[str, Tensor]


def want(a: Arguments) -> list[tuple[Tensor, Tensor]]:
    """dots and sums, and what each would be if nothing cancelled."""
    d = {name: x.double() for name, x in a.items()}
    mean, memory = d["gradient"][:-1] * d["to_mean"][:, None], d["ema"] * d["correction"]
    pairs = [(mean, mean), (memory, mean), (mean, d["after"] - d["before"]), (mean, d["theta"] - d["after"])]
    pairs.append((0.5 * (mean - memory), d["theta"] - d["before"]))
    sums = torch.stack([(x * y).sum(1) for x, y in pairs])
    sizes = torch.stack([x.norm(dim=1) * y.norm(dim=1) for x, y in pairs])
    g = d["gradient"]
    return [(memory @ g.mT, memory.norm(dim=1)[:, None] * g.norm(dim=1)[None, :]), (sums, sizes)]


def check(out: tuple[Tensor, Tensor], a: Arguments, tolerance: float = 1e-13) -> None:
    for got, (right, size) in zip(out, want(a), strict=True):
        assert got.dtype == torch.float64 and got.shape == right.shape and got.is_contiguous()
        assert ((got - right).abs() <= tolerance * size + 1e-300).all()


@pytest.mark.parametrize("function", [memory_read, module.reference], ids=["in force", "reference"])
@pytest.mark.parametrize("uneven", [False, True], ids=["one correction", "each its own"])
@pytest.mark.parametrize("gradient", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(function, shape, dtype, gradient, uneven):
    a = memory_arguments(*shape, dtype, gradient, uneven)
    check(function(**a), a)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 1500),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sets(st.sampled_from(["ema", "before", "after", "gradient", "theta", "to_mean", "correction"])),
    st.sampled_from(STRIDES),
    st.integers(0, 2**31),
)
def test_any_shape_and_strides(T, K, dtype, gradient, uneven, apart, kind, seed):
    a = memory_arguments(T, K, dtype, gradient, uneven, seed)
    check(memory_read(**{n: restrided(x, kind) if n in apart else x for n, x in a.items()}), a)


def test_broadcast_rows():
    a = memory_arguments(5, 600)
    a["before"] = a["theta"].expand(5, -1)
    a["ema"] = torch.zeros(1, 1).expand(5, 600)
    check(memory_read(**a), a)


def test_without_columns_all_is_zero():
    dots, sums = memory_read(**memory_arguments(3, 0))
    assert torch.equal(dots, torch.zeros(3, 4).double()) and torch.equal(sums, torch.zeros(5, 3).double())


def test_nan_stays_with_its_task():
    a = memory_arguments(5, 700)
    a["ema"][1, 3], a["gradient"][4, 699], a["before"][2, 0] = torch.nan, torch.inf, torch.nan
    dots, sums = (~x.isfinite() for x in memory_read(**a))
    assert dots[1].all() and dots[:, 4].all() and dots.sum() == 6 + 5 - 1
    assert sums.nonzero().tolist() == [[0, 4], [1, 1], [1, 4], [2, 2], [2, 4], [3, 4], [4, 1], [4, 2], [4, 4]]


def test_the_rest_is_in_the_dots_alone():
    a = memory_arguments(3, 40)
    _, sums = memory_read(**a)
    a["gradient"][3] = torch.nan
    dots, again = memory_read(**a)
    assert torch.equal(sums, again) and dots.isnan().nonzero().tolist() == [[0, 3], [1, 3], [2, 3]]


@pytest.mark.parametrize("shape", [(8, 100_001), (70, 9_001)], ids=str)
def test_same_bits_for_any_number_of_threads(shape):
    if _native.status().kind == "reference":
        pytest.skip("the reference leaves the order to the BLAS library")
    a = memory_arguments(*shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(torch.cat([x.flatten() for x in memory_read(**a)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_opcheck():
    op = torch.ops.taskgrad.memory_read.default
    for dtype in DTYPES:
        for uneven in (False, True):
            torch.library.opcheck(op, tuple(memory_arguments(3, 70, dtype, uneven=uneven).values()))
    torch.library.opcheck(op, tuple(restrided(x, "transposed") for x in memory_arguments(3, 70).values()))
    torch.library.opcheck(op, tuple(memory_arguments(2, 0).values()))


WRONG = [
    ("ema", torch.zeros(2, 3).half(), TypeError, "ema must be float32 or float64, got torch.float16"),
    ("ema", torch.zeros(2, 3, device="meta"), TypeError, "gradient must be on meta as ema is, got cpu"),
    ("ema", torch.zeros(3), ValueError, r"ema must have shape \[T, K\], got \[3\]"),
    ("before", torch.zeros(2, 3), TypeError, "before must be float64, got torch.float32"),
    ("after", torch.zeros(2, 4).double(), ValueError, r"after must have shape \[2, 3\], got \[2, 4\]"),
    ("gradient", torch.zeros(2, 3), ValueError, r"gradient must have shape \[3, 3\], got \[2, 3\]"),
    ("gradient", torch.zeros(3, 3).bfloat16(), TypeError, "gradient must be float32 or float64, got torch.bfloat16"),
    ("theta", torch.zeros(2).double(), ValueError, r"theta must have shape \[3\], got \[2\]"),
    ("theta", torch.zeros(3), TypeError, "theta must be float64, got torch.float32"),
    ("to_mean", torch.zeros(2, 1).double(), ValueError, r"to_mean must have shape \[2\], got \[2, 1\]"),
    ("correction", torch.zeros(2).double(), ValueError, r"correction must have shape \[2, 1\] or \[2, 3\], got \[2\]"),
    ("correction", None, TypeError, "correction must be a tensor, got NoneType"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
def test_wrong_input_says_what_is_needed(name, value, error, message):
    with pytest.raises(error, match=message):
        memory_read(**{**memory_arguments(2, 3), name: value})


@pytest.mark.parametrize(("name", "value"), [case[:2] for case in WRONG if isinstance(case[1], Tensor)])
def test_the_op_itself_takes_no_wrong_input(name, value):
    if value.is_meta:
        pytest.skip("goes by shapes alone")
    with pytest.raises((TypeError, ValueError, RuntimeError), match=name):
        torch.ops.taskgrad.memory_read(*{**memory_arguments(2, 3), name: value}.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 300_007), (130, 5000), (0, 3), (2, 0)], ids=str)
def test_cuda(shape, dtype, uneven):
    """Against fp64; no synchronisation, and the same bits 20 times."""
    a = memory_arguments(*shape, dtype, uneven=uneven)
    on_device = {name: x.cuda() for name, x in a.items()}
    first = memory_read(**on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [memory_read(**on_device) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for other in again for x, y in zip(first, other, strict=True))
    check((first[0].cpu(), first[1].cpu()), a, 1e-12)
