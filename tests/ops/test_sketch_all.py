"""``sketch_all`` on a CPU, by the kernel in force and by the reference, against the maps themselves in fp64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.capture.sketch import SketchMap, sketch_map
from taskgrad.ops import _native, sketch_all

module = sys.modules["taskgrad.ops.sketch_all"]  # the attribute of taskgrad.ops is the function

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# identities, vectors, matrices with one side or both, more than two dimensions; 16 x 256 is a block of the CPU kernel,
# 2**17 elements a stripe
SHAPES = [(5,), (), (700,), (1, 1), (15, 64), (17, 257), (300, 5), (3, 900), (37, 2, 3, 11), (1000, 290), (0, 4), (0,)]


def sketch(values: list[Tensor], maps: list[SketchMap], function=sketch_all) -> Tensor:
    return function(values, [m.left for m in maps], [m.right for m in maps])


def want(values: list[Tensor], maps: list[SketchMap]) -> Tensor:
    return torch.cat([m(x.double()[None])[0] for x, m in zip(values, maps, strict=True)])


def close(got: Tensor, right: Tensor) -> None:
    assert got.dtype == torch.float64 and got.shape == right.shape
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("function", [sketch_all, module.reference], ids=["in force", "reference"])
@pytest.mark.parametrize("dim", [1, 7, 300, None])
def test_all_kinds_at_once(function, dim):
    values = [torch.randn(shape).to(dtype) for shape in SHAPES for dtype in DTYPES]
    maps = [sketch_map(x.shape, dim, 0, str(i)) for i, x in enumerate(values)]
    close(sketch(values, maps, function), want(values, maps))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_list(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    values, maps = [], []
    for i in range(data.draw(st.integers(1, 5))):
        shape = data.draw(st.lists(st.integers(1, 40), max_size=3))
        x = torch.randn(shape).to(data.draw(st.sampled_from(DTYPES)))
        maps.append(sketch_map(x.shape, data.draw(st.sampled_from([None, 1, 5, 64])), 0, str(i)))
        how = data.draw(st.sampled_from(["", "transposed", "columns"]))
        if how == "transposed" and x.dim():
            x = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
        elif how == "columns" and x.dim():
            x = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=x.dtype)[..., ::2].copy_(x)
        values.append(x)
    close(sketch(values, maps), want(values, maps))


def signs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randint(0, 2, shape) * 2 - 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("r0", "r1"), [(0, 3), (3, 0), (5, 6), (None, 9), (6, None)])
def test_any_signs_of_any_dtype_and_strides(dtype, r0, r1):
    x = torch.randn(70, 600)
    left = None if r0 is None else signs(r0, 70, dtype=dtype).mT
    right = None if r1 is None else signs(600, 2 * r1, dtype=dtype)[:, ::2]
    wide = x.double() if left is None else left.double().mT @ x.double()
    wide = wide if right is None else wide @ right.double()
    rank = (1 if r0 is None else r0) * (1 if r1 is None else r1)
    close(sketch_all([x], [left], [right]), wide.flatten() * (rank**-0.5 if rank else 1))


def test_an_update_a_millionth_of_the_parameter_comes_through():
    theta = [torch.randn(300, 200), torch.randn(2000), torch.randn(30)]
    moved = [x + 1e-6 * torch.randn(x.shape) for x in theta]
    maps = [sketch_map(x.shape, 64, 0, str(i)) for i, x in enumerate(theta)]
    exact = want([b.double() - a.double() for a, b in zip(theta, moved, strict=True)], maps)
    assert (sketch(moved, maps) - sketch(theta, maps) - exact).norm() < 1e-6 * exact.norm()


def test_nan_stays_in_its_own_sketch():
    values = [torch.randn(40, 50), torch.randn(40, 50), torch.randn(99), torch.randn(3)]
    maps = [sketch_map(x.shape, 10, 0, str(i)) for i, x in enumerate(values)]
    values[1][7, 3] = values[3][1] = torch.nan
    broken = sketch(values, maps).isnan()
    first = maps[0].dim
    assert broken[first : first + maps[1].dim].all() and broken.sum() == maps[1].dim + 1


def test_same_bits_for_any_number_of_threads():
    if _native.status().kind == "reference":
        pytest.skip("the reference leaves the order to the BLAS library")
    values = [torch.randn(2000, 301), torch.randn(5000), torch.randn(301, 900)]
    maps = [sketch_map(x.shape, 256, 0, str(i)) for i, x in enumerate(values)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(sketch(values, maps))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_parameters_that_require_a_gradient():
    values = [torch.randn(4, 5, requires_grad=True), torch.randn(3, requires_grad=True)]
    maps = [sketch_map(x.shape, 6, 0, str(i)) for i, x in enumerate(values)]
    out = sketch(values, maps)
    assert not out.requires_grad
    close(out, want([x.detach() for x in values], maps))


def test_opcheck():
    values = [torch.randn(6, 5), torch.randn(90), torch.randn(3).double(), torch.randn(4, 30).bfloat16()]
    maps = [sketch_map(x.shape, 8, 0, str(i)) for i, x in enumerate(values)]
    arguments = values, [m.left for m in maps], [m.right for m in maps]
    torch.library.opcheck(torch.ops.taskgrad.sketch_all.default, arguments)


BUCKETS = torch.tensor([[0, 2], [1, 3]])
WRONG = [
    ([torch.zeros(3)], [None], [], ValueError, "of one length, not 0, got the lengths 1, 1 and 0"),
    ([], [], [], ValueError, "of one length, not 0, got the lengths 0, 0 and 0"),
    ([torch.zeros(3).long()], [None], [None], TypeError, r"values\[0\] must be float32.*got torch.int64"),
    ([torch.zeros(3), torch.zeros(2).to_sparse()], [None] * 2, [None] * 2, TypeError, r"values\[1\] must be dense"),
    ([torch.zeros(2), torch.zeros(2, device="meta")], [None] * 2, [None] * 2, TypeError, r"values\[1\] must be on cpu"),
    ([torch.zeros(3)], [BUCKETS], [None], ValueError, r"left\[0\] and right\[0\] must both.*one of them alone"),
    ([torch.zeros(())], [BUCKETS], [torch.ones(1)], ValueError, r"must both be there for a vector.*no dimensions"),
    ([torch.zeros(3)], [torch.ones(3, 2)], [torch.ones(3)], TypeError, r"left\[0\] must be int64, got torch.float32"),
    ([torch.zeros(3)], [BUCKETS[0]], [torch.ones(3)], ValueError, r"left\[0\] of a vector must have shape \[r, m\]"),
    ([torch.zeros(3)], [BUCKETS], [torch.ones(2)], ValueError, r"right\[0\] must have shape \[3\], got \[2\]"),
    ([torch.zeros(2)], [BUCKETS], [torch.ones(2)], ValueError, r"left\[0\] must lie in \[0, 3\), got values from 0"),
    ([torch.zeros(3)], [BUCKETS - 1], [torch.ones(3)], ValueError, r"left\[0\] must lie in \[0, 4\), got values from"),
    ([torch.zeros(2, 3)], [torch.ones(3, 1)], [None], ValueError, r"left\[0\] must have shape \[2, r\], got \[3, 1\]"),
    ([torch.zeros(2, 3)], [None], [torch.ones(3).long()], TypeError, r"right\[0\] must be float32.*int64"),
    ([torch.zeros(2, 2, 2)], [None], [torch.ones(2, 1)], ValueError, r"right\[0\] must have shape \[4, r\]"),
]


@pytest.mark.parametrize(("values", "left", "right", "error", "message"), WRONG)
def test_wrong_input_says_what_is_needed(values, left, right, error, message):
    with pytest.raises(error, match=message):
        sketch_all(values, left, right)


def test_lists_are_needed():
    with pytest.raises(TypeError, match="values must be a list, got Tensor"):
        sketch_all(torch.zeros(2), [None], [None])
    with pytest.raises(TypeError, match="cpu or cuda device, got meta"):
        sketch_all([torch.zeros(2, device="meta")], [None], [None])


@pytest.mark.parametrize(("values", "left", "right"), [case[:3] for case in WRONG if len(case[0]) != 2])
def test_the_op_itself_takes_no_wrong_input(values, left, right):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"values|left|right"):
        torch.ops.taskgrad.sketch_all(values, left, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    """Against fp64; no synchronisation, and the same bits 20 times."""
    values = [torch.randn(shape).to(dtype) for shape in SHAPES for dtype in DTYPES]
    maps = [sketch_map(x.shape, 64, 0, str(i)) for i, x in enumerate(values)]
    on_device, there = [x.cuda() for x in values], [m.to(torch.device("cuda")) for m in maps]
    first = sketch(on_device, there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [sketch(on_device, there) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in again)
    torch.testing.assert_close(first.cpu(), want(values, maps), rtol=1e-11, atol=1e-9)
