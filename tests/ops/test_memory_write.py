"""``memory_write`` on a CPU, by the kernel in force and by the reference, against fp64."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.ops import _native, memory_write
from tests.utils.memories import STRIDES, memory_arguments, restrided, write_arguments

module = sys.modules["taskgrad.ops.memory_write"]  # the attribute of taskgrad.ops is the function

SHAPES = [(1, 1), (1, 511), (2, 512), (4, 513), (8, 30011), (17, 1025), (65, 700)]  # around chunks and stripes
DTYPES = [torch.float32, torch.float64]
WRITTEN = ("ema", "before", "after")
Arguments = dict[str, Any]


def cloned(a: Arguments) -> Arguments:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in a.items()}


def check(function: Any, a: Arguments, given: Arguments | None = None, tolerance: float = 1e-13) -> None:
    """Call ``function`` with ``given``, the same values as ``a`` of other strides, and compare all it did."""
    given = cloned(a) if given is None else given
    predicted = function(**given)
    memory, way = a["ema"].double() * a["correction"], a["theta_after"] - a["theta_before"]
    size = memory.norm(dim=1) * way.norm()
    assert predicted.dtype == torch.float64 and predicted.shape == size.shape
    assert ((predicted - memory @ way).abs() <= tolerance * size + 1e-300).all()

    row, old = a["seen"][:, None], a["ema"]
    mean = (a["gradient"][:-1].double() * a["to_mean"][:, None]).to(old.dtype)
    enters = row if a["left_out"] is None else row & ~a["left_out"]
    right = torch.where(enters, a["decay"] * old + (1 - a["decay"]) * mean, old)
    assert torch.equal(given["ema"], right)  # by bits
    assert torch.equal(given["before"], torch.where(row, a["theta_before"], a["before"]))
    assert torch.equal(given["after"], torch.where(row, a["theta_after"], a["after"]))
    for name, x in a.items():
        if isinstance(x, Tensor) and name not in WRITTEN:
            torch.testing.assert_close(given[name], x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [memory_write, module.reference], ids=["in force", "reference"])
@pytest.mark.parametrize("uneven", [False, True], ids=["all the same", "each column its own"])
@pytest.mark.parametrize("gradient", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(function, shape, dtype, gradient, uneven):
    check(function, write_arguments(memory_arguments(*shape, dtype, gradient, uneven), left_out=uneven))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 1500),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sets(st.sampled_from([*WRITTEN, "gradient", "to_mean", "seen", "left_out", "theta_before", "correction"])),
    st.sampled_from(STRIDES),
    st.sampled_from([0.0, 0.3, 0.95, 1.0, 1]),
    st.integers(0, 2**31),
)
def test_any_shape_and_strides(T, K, dtype, gradient, uneven, apart, kind, decay, seed):
    a = write_arguments(memory_arguments(T, K, dtype, gradient, uneven, seed), not uneven, decay)
    given = {n: restrided(x, kind) if n in apart and x is not None else x for n, x in cloned(a).items()}
    check(memory_write, a, given)


@pytest.mark.parametrize("function", [memory_write, module.reference], ids=["in force", "reference"])
def test_what_does_not_enter_may_be_nan(function):
    a = write_arguments(memory_arguments(4, 700), left_out=True)
    a["gradient"][~torch.cat([a["seen"], torch.tensor([False])])] = torch.nan
    a["gradient"][:, a["left_out"]] = torch.inf
    a["to_mean"][~a["seen"]] = torch.nan
    check(function, a)


@pytest.mark.parametrize("function", [memory_write, module.reference], ids=["in force", "reference"])
def test_nothing_is_written_beside_the_memory(function):
    a = write_arguments(memory_arguments(3, 515))
    given = cloned(a)
    rooms = {name: torch.full((9, 520), 7.0, dtype=a[name].dtype) for name in WRITTEN}
    for name, room in rooms.items():
        given[name] = room[1:7:2, 2:517].copy_(a[name])
    check(function, a, given)
    for room in rooms.values():
        room[1:7:2, 2:517] = 7.0
        assert (room == 7.0).all()


def test_a_broadcast_theta():
    a = write_arguments(memory_arguments(3, 40))
    a["theta_after"] = torch.ones(1, dtype=torch.float64).expand(40)
    check(memory_write, a, {**cloned(a), "theta_after": a["theta_after"]})


def test_same_bits_for_any_number_of_threads():
    if _native.status().kind == "reference":
        pytest.skip("the reference leaves the order to the BLAS library")
    a = write_arguments(memory_arguments(8, 100_001), left_out=True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            given = cloned(a)
            results.append([memory_write(**given), *(given[name] for name in WRITTEN)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


def test_opcheck():
    op = torch.ops.taskgrad.memory_write.default
    for dtype in DTYPES:
        for left_out in (False, True):
            torch.library.opcheck(op, tuple(write_arguments(memory_arguments(3, 70, dtype), left_out).values()))
    a = write_arguments(memory_arguments(3, 70, uneven=True))
    torch.library.opcheck(op, tuple(restrided(x, "rows") if n in WRITTEN else x for n, x in a.items()))


WRONG = [
    ("ema", torch.zeros(2, 3).half(), TypeError, "ema must be float32 or float64, got torch.float16"),
    ("ema", torch.zeros(3).expand(2, 3), ValueError, r"ema must not overlap itself, got the strides \(0, 1\)"),
    ("before", torch.zeros(4).double().as_strided((2, 3), (1, 1)), ValueError, "before must not overlap itself"),
    ("after", torch.zeros(2, 1).double().expand(2, 3), ValueError, "after must not overlap itself"),
    ("gradient", torch.zeros(2, 3), ValueError, r"gradient must have shape \[3, 3\], got \[2, 3\]"),
    ("seen", torch.zeros(2), TypeError, "seen must be bool, got torch.float32"),
    ("seen", torch.zeros(3, dtype=torch.bool), ValueError, r"seen must have shape \[2\], got \[3\]"),
    ("left_out", torch.zeros(2, dtype=torch.bool), ValueError, r"left_out must have shape \[3\], got \[2\]"),
    ("left_out", torch.zeros(3, dtype=torch.uint8), TypeError, "left_out must be bool, got torch.uint8"),
    ("theta_before", torch.zeros(2).double(), ValueError, r"theta_before must have shape \[3\], got \[2\]"),
    ("theta_after", torch.zeros(3), TypeError, "theta_after must be float64, got torch.float32"),
    ("correction", torch.zeros(1, 3).double(), ValueError, r"correction must have shape \[2, 1\] or \[2, 3\]"),
    ("decay", 1.5, ValueError, r"decay must lie in \[0, 1\], got 1.5"),
    ("decay", float("nan"), ValueError, r"decay must lie in \[0, 1\], got nan"),
    ("decay", None, TypeError, "decay must be a number, got NoneType"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
def test_wrong_input_says_what_is_needed_and_writes_nothing(name, value, error, message):
    given = {**write_arguments(memory_arguments(2, 3)), name: value}
    before = cloned(given)
    with pytest.raises(error, match=message):
        memory_write(**given)
    assert all(torch.equal(given[n], before[n]) for n in WRITTEN)


@pytest.mark.parametrize(("name", "value"), [case[:2] for case in WRONG if case[1] is not None])
def test_the_op_itself_takes_no_wrong_input(name, value):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=name):
        torch.ops.taskgrad.memory_write(*{**write_arguments(memory_arguments(2, 3)), name: value}.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 300_007), (130, 5000), (0, 3), (2, 0)], ids=str)
def test_cuda(shape, dtype, left_out):
    """Against fp64 and the reference; no synchronisation, and the same bits twice."""
    a = write_arguments(memory_arguments(*shape, dtype), left_out)
    predicted = module.reference(**cloned(a))
    results = []
    for _ in range(2):
        given = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in cloned(a).items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            results.append([memory_write(**given), *(given[name] for name in WRITTEN)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    module.reference(**(right := cloned(a)))
    torch.testing.assert_close(results[0][0].cpu(), predicted, rtol=1e-11, atol=1e-9)
    for name, x in zip(WRITTEN, results[0][1:], strict=True):
        torch.testing.assert_close(x.cpu(), right[name], rtol=1e-6, atol=1e-7)


def test_an_empty_tensor_does_not_overlap_itself_whatever_its_strides() -> None:
    empty = torch.zeros(0, 1, dtype=torch.float64).expand(0, 5)
    vector, none = torch.zeros(5, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    ema, gradient, seen = torch.zeros(0, 5), torch.zeros(1, 5), torch.zeros(0, dtype=torch.bool)
    found = memory_write(ema, empty, empty, gradient, none, seen, None, vector, vector, none[:, None], 0.9)
    assert found.shape == (0,)
