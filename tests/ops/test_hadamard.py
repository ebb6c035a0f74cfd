"""Transforms in the place of products with a map: ``sketch_of_rows`` and ``sketch_params`` on a CPU, against fp64."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskgrad.capture.sketch import sketch_map
from taskgrad.ops import _native, sketch_params
from tests.utils.rows import make_rows

module = sys.modules["taskgrad.ops.wgrad_sketch"]  # the attribute of taskgrad.ops is the function
sketch_of_rows = torch.ops.taskgrad.sketch_of_rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# the vectors of a transform have 4 to 16 numbers, a pass 8 or 16 vectors: sizes below, at and above the powers of two
SIZES = [1, 2, 3, 8, 9, 16, 17, 63, 64, 65, 128, 250, 256, 257, 512, 1000, 1025, 2048, 4096, 4100]


def hadamard(d: int, r: int, seed: int = 0) -> Tensor:
    """Columns of a signed Hadamard matrix, by the bits of i & c."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randperm(1 << max(1, (d - 1).bit_length()), generator=generator)[:r]
    both = torch.arange(d)[:, None] & columns
    parity = sum((both >> bit) & 1 for bit in range(14)) % 2
    signs = torch.randint(0, 2, (d, 1), generator=generator) * 2 - 1
    return ((1 - 2 * parity) * signs).float()


def expected(dy: Tensor, x: Tensor, task: Tensor, segments: int, left: Tensor | None, right: Tensor | None) -> Tensor:
    u, v = (rows.double() if m is None else rows.double() @ m.double() for rows, m in ((dy, left), (x, right)))
    return torch.stack([torch.einsum("nri,nrj->ij", u[task == s], v[task == s]) for s in range(segments)])


def check(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    double = dtype == torch.float64
    assert got.dtype == (torch.float64 if double else torch.float32)
    assert got.shape == want.shape and (got - want).norm() <= (1e-13 if double else 2e-6) * want.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_every_size(d, dtype):
    task, order, offsets = make_rows([3, 0, 7], True)
    dy, x = torch.randn(10, 3, d).to(dtype), torch.randn(10, 3, 5).to(dtype)
    for r in (1, 2, 33):
        for one in (hadamard(d, r), hadamard(d, r).to(dtype)):
            check(sketch_of_rows(dy, x, order, offsets, one, None), expected(dy, x, task, 3, one, None), dtype)
            check(sketch_of_rows(x, dy, order, offsets, None, one), expected(x, dy, task, 3, None, one), dtype)
        if d > 1:
            theta, other = torch.randn(37, d).to(dtype), hadamard(37, 5)
            want = other.double().mT @ theta.double() @ one.double()
            torch.testing.assert_close(sketch_params(theta, other, one), want, rtol=1e-12, atol=1e-11)
            torch.testing.assert_close(sketch_params(theta.mT, one, other), want.mT, rtol=1e-12, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.integers(0, 50),
    st.tuples(st.integers(0, 300), st.integers(0, 300)),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.booleans(),
    st.sampled_from(["as they are", "transposed", "every other", "one for all"]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_any_shape_and_strides(counts, rows, size, ranks, shuffled, layout, dtype, seed):
    """A rank of 0 stands for the identity."""
    torch.manual_seed(seed)
    task, order, offsets = make_rows(counts, shuffled)

    def make(d: int) -> Tensor:
        if layout == "transposed":
            return torch.randn(d, rows, len(task)).to(dtype).permute(2, 1, 0)
        if layout == "every other":
            return torch.randn(len(task), 2 * rows, 2 * d).to(dtype)[:, ::2, ::2]
        if layout == "one for all":
            return torch.randn(d).to(dtype).expand(len(task), rows, d)
        return torch.randn(len(task), rows, d).to(dtype)

    dy, x = (make(d) for d in size)
    maps = [hadamard(d, r, seed % 1000) if r and d else None for d, r in zip(size, ranks, strict=True)]
    check(sketch_of_rows(dy, x, order, offsets, *maps), expected(dy, x, task, len(counts), *maps), dtype)


@pytest.mark.parametrize("shape", [(256, 1024), (300, 77), (5000, 3)], ids=str)
def test_the_maps_of_parameters(shape):
    found = sketch_map(shape, 1024, 3, "w")
    dy, x = torch.randn(50, 1, shape[0]), torch.randn(50, 1, shape[1])
    task, order, offsets = make_rows([20, 0, 30], True)
    where = (dy, x, order, offsets, found.left, found.right)
    check(sketch_of_rows(*where), expected(dy, x, task, 3, found.left, found.right), torch.float32)
    check(module.rows_reference(*where), expected(dy, x, task, 3, found.left, found.right), torch.float32)


@pytest.mark.parametrize("value", [0.5, 0.0, -1.0, float("nan"), 1 + 2**-40], ids=str)
@pytest.mark.parametrize("at", [(0, 0), (0, 3), (1, 0), (2, 2), (63, 6), (40, 0), (99, 6)], ids=str)
def test_a_map_with_one_entry_that_is_another(at, value):
    for dtype in (torch.float32, torch.float64):
        other = hadamard(100, 7).to(dtype)
        other[at] = -other[at] if value == -1 else value
        task, order, offsets = make_rows([4, 6], False)
        dy, x = torch.randn(10, 2, 3, dtype=torch.float64), torch.randn(10, 2, 100, dtype=torch.float64)
        want = expected(dy, x, task, 2, None, other)
        torch.testing.assert_close(sketch_of_rows(dy, x, order, offsets, None, other), want, equal_nan=True)
        theta = torch.randn(9, 100)
        want = theta.double() @ other.double()
        torch.testing.assert_close(sketch_params(theta, None, other), want, equal_nan=True)
        torch.testing.assert_close(sketch_params(theta.mT, other, None), want.mT, equal_nan=True)


def test_long_segments_are_added_piece_by_piece():
    task, order, offsets = make_rows([1500, 0, 3, 2600], True)
    dy, x = torch.randn(len(task), 2, 20), torch.randn(len(task), 2, 40)
    maps = hadamard(20, 6), hadamard(40, 9)
    check(sketch_of_rows(dy, x, order, offsets, *maps), expected(dy, x, task, 4, *maps), torch.float32)


def test_every_number_is_written(monkeypatch):
    """New memory is full of NaN: what is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for counts in ([0, 0], [3, 0, 2], [0, 1, 0]):
            task, order, offsets = make_rows(counts, True)
            dy, x = torch.randn(len(task), 2, 10), torch.randn(len(task), 2, 20)
            for maps in ((hadamard(10, 3), hadamard(20, 5)), (None, hadamard(20, 5)), (None, None)):
                got = sketch_of_rows(dy, x, order, offsets, *maps)
                torch.testing.assert_close(
                    got.double(), expected(dy, x, task, len(counts), *maps), rtol=1e-4, atol=1e-4
                )
                dw, parts = module.wgrad_sketch(dy, x, order, offsets, *maps)
                torch.testing.assert_close(parts, got, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(dw, dy.flatten(0, 1).mT @ x.flatten(0, 1), rtol=1e-4, atol=1e-4)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nan_stays_in_its_segment():
    task, order, offsets = make_rows([4, 5, 6], True)
    dy, x = torch.randn(15, 2, 30), torch.randn(15, 2, 70)
    x[task == 1, 0, 3] = float("nan")
    got = sketch_of_rows(dy, x, order, offsets, hadamard(30, 4), hadamard(70, 8))
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


def test_same_bits_for_any_number_of_threads():
    if _native.status().kind == "reference":
        pytest.skip("the reference leaves the order to the BLAS library")
    _, order, offsets = make_rows([700, 0, 30, 2000], True)
    dy, x, theta = torch.randn(2730, 2, 100), torch.randn(2730, 2, 300), torch.randn(1000, 300)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            maps = hadamard(100, 20), hadamard(300, 30)
            sketch = sketch_params(theta, hadamard(1000, 20), maps[1])
            results.append((sketch_of_rows(dy, x, order, offsets, *maps), sketch))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    _, order, offsets = make_rows([3, 0, 4], True)
    dy, x = torch.randn(7, 2, 9).to(dtype), torch.randn(7, 2, 17).to(dtype)
    for maps in ((hadamard(9, 3), hadamard(17, 4)), (None, hadamard(17, 4)), (hadamard(9, 3), None), (None, None)):
        torch.library.opcheck(sketch_of_rows.default, (dy, x, order, offsets, *maps))


def test_the_kernel_refuses_by_itself_what_is_malformed():
    dy, x = torch.zeros(5, 2, 3), torch.zeros(5, 2, 4)
    sketch_of_rows(dy, x, None, torch.tensor([0, 5]), None, None)  # loads the library: checks of its own from here on
    for order, offsets, left in (
        (None, torch.tensor([0, 6]), None),
        (torch.tensor([0, 1, 2, 3, 3]), torch.tensor([0, 5]), None),
        (None, torch.tensor([0, 5]), torch.zeros(4, 2)),
    ):
        with pytest.raises((RuntimeError, ValueError), match="must"):
            sketch_of_rows(dy, x, order, offsets, left, None)
