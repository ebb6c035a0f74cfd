"""``wgrad_gram`` against per-segment products in float64, on a CPU and (marked ``gpu``) on a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.ops import wgrad_gram
from tests.utils.segments import COUNTS, DTYPES, LAYOUTS, Problem, exact, make_problem, poison_memory, problems

module = sys.modules["taskgrad.ops.wgrad_gram"]  # the attribute of taskgrad.ops is the function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_matches_fp64(counts, dtype, monkeypatch):
    problem = make_problem(counts, 13, 9, dtype)
    poison_memory(monkeypatch)
    dw, gram = wgrad_gram(problem.dy, problem.x, problem.offsets)
    assert dw.dtype == dtype
    problem.check_sum(dw)
    problem.check_gram(gram, exact(problem))


@settings(max_examples=60, deadline=None)
@given(problems, st.sampled_from([1, 1 << 12, 1 << 22]))
def test_any_input(problem: Problem, panel_bytes):
    """Panels of 64 rows at least; ``test_panels_of_rows`` has several."""
    inputs = [t.clone() for t in (problem.dy, problem.x)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PANEL_BYTES", panel_bytes)
        dw, gram = wgrad_gram(problem.dy, problem.x, problem.offsets)
    problem.check_sum(dw)
    problem.check_gram(gram, exact(problem))
    assert torch.equal(problem.dy, inputs[0]) and torch.equal(problem.x, inputs[1])


@settings(max_examples=30, deadline=None)
@given(problems)
def test_reference(problem: Problem):
    dw, gram = module.reference(problem.dy, problem.x, problem.offsets)
    problem.check_sum(dw)
    problem.check_gram(gram, exact(problem))


def test_panels_of_rows(monkeypatch):
    problem = make_problem([3, 0, 8], 150, 7)
    monkeypatch.setattr(module, "PANEL_BYTES", 1)
    poison_memory(monkeypatch)
    dw, gram = wgrad_gram(problem.dy, problem.x, problem.offsets)
    problem.check_sum(dw)
    problem.check_gram(gram, 1e-5)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, 0)], ids=str)
def test_empty_is_zero(sizes):
    rows, d_out, d_in = sizes
    offsets = torch.tensor([0, rows, rows])
    for function in (wgrad_gram, module.reference):
        dw, gram = function(torch.ones(rows, d_out), torch.ones(rows, d_in), offsets)
        assert torch.equal(dw, torch.zeros(d_out, d_in)) and torch.equal(gram, torch.zeros(2, 2, dtype=torch.float64))


def test_no_segments():
    dw, gram = wgrad_gram(torch.empty(0, 3), torch.empty(0, 4), torch.zeros(1, dtype=torch.int64))
    assert torch.equal(dw, torch.zeros(3, 4)) and gram.shape == (0, 0)


@pytest.mark.parametrize("function", [wgrad_gram, module.reference], ids=["in force", "reference"])
def test_not_finite_stays_in_its_segment(function):
    problem = make_problem([3, 0, 4, 2], 5, 6)
    problem.x[4, 2] = float("nan")
    _, gram = function(problem.dy, problem.x, problem.offsets)
    broken = ~gram.isfinite()
    assert broken[2].tolist() == [True] * 4
    assert gram[[0, 1, 3]][:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    problem = make_problem([3, 0, 2], 6, 5, dtype)
    arguments = (problem.dy, problem.x, problem.offsets)
    torch.library.opcheck(torch.ops.taskgrad.wgrad_gram.default, arguments)
    problem = make_problem([3, 0, 2], 6, 5, dtype, layout="columns")
    torch.library.opcheck(torch.ops.taskgrad.wgrad_gram.default, (problem.dy, problem.x, problem.offsets.int()))


def test_compiles_with_other_shapes():
    compiled = torch.compile(wgrad_gram, backend="aot_eager", fullgraph=True, dynamic=True)
    for counts, d_out, d_in in (([3, 2], 6, 5), ([1, 0, 4], 7, 9)):
        problem = make_problem(counts, d_out, d_in)
        dw, gram = compiled(problem.dy, problem.x, problem.offsets)
        problem.check_sum(dw)
        problem.check_gram(gram, 1e-5)


def test_no_gradient_flows_through_it():
    problem = make_problem([3, 2], 6, 5)
    dw, gram = wgrad_gram(problem.dy.requires_grad_(), problem.x, problem.offsets)
    assert not dw.requires_grad and not gram.requires_grad


WRONG = [
    ({"dy": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, r"dy must be float32.*got torch\.int64: convert it"),
    ({"dy": torch.zeros(5, 3, device="meta")}, TypeError, r"x must be on meta as dy is, got cpu"),
    ({"x": torch.zeros(5, 4).half()}, TypeError, r"x must be float32, got torch\.float16"),
    ({"offsets": torch.tensor([0.0, 5.0])}, TypeError, r"offsets must be int64 or int32, got torch\.float32"),
    ({"x": torch.zeros(4, 4)}, ValueError, r"dy and x must have shapes \[N, d_out\].*got \[5, 3\] and \[4, 4\]"),
    ({"x": torch.zeros(1, 5, 4)}, ValueError, r"dy and x must have shapes.*flatten"),
    ({"offsets": torch.tensor([[0, 5]])}, ValueError, r"offsets must have shape \[S \+ 1\], got \[1, 2\]"),
    (
        {"offsets": torch.tensor([0, 4])},
        ValueError,
        r"offsets must rise from 0 to 5, the number of entries, got \[0, 4\]",
    ),
    ({"offsets": torch.tensor([1, 5])}, ValueError, r"offsets must rise from 0"),
    ({"offsets": torch.tensor([0, 4, 3, 5])}, ValueError, r"offsets must rise from 0"),
    ({"offsets": torch.tensor([0, 2**40, 5])}, ValueError, r"offsets must rise from 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_input_says_what_is_needed(change, error, message):
    arguments = {"dy": torch.zeros(5, 3), "x": torch.zeros(5, 4), "offsets": torch.tensor([0, 2, 5])} | change
    with pytest.raises(error, match=message):
        wgrad_gram(**arguments)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU_COUNTS = ([600, 0, 1, 423], [100] * 8 + [13], [1000], [17, 300] * 9, [5, 64] * 16 + [128])


class TestCuda:
    pytestmark = gpu

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("size", [(768, 768), (1000, 333), (2048, 2048), (48, 4096), (1, 1)], ids=str)
    @pytest.mark.parametrize("counts", GPU_COUNTS, ids=lambda counts: f"S={len(counts)}")
    @pytest.mark.parametrize(
        ("dtype", "tf32"), [(d, False) for d in DTYPES] + [(torch.float32, True)], ids=lambda value: str(value)
    )
    def test_matches_fp64(self, dtype, tf32, counts, size, layout, monkeypatch):
        if layout != "rows" and size != (1000, 333):
            pytest.skip("one size is enough for the other layouts")
        problem = make_problem(counts, *size, dtype, layout=layout)
        dy, x, offsets = (t.cuda() for t in (problem.dy, problem.x, problem.offsets))
        tolerance = exact(problem) if dtype in (torch.float32, torch.float64) and not tf32 else 2**-8
        monkeypatch.setattr(module, "tf32_allowed", lambda: tf32)
        dw, gram = wgrad_gram(dy, x, offsets)
        problem.check_gram(gram, tolerance)
        assert torch.equal(gram, wgrad_gram(dy, x, offsets.int())[1])
        if tf32:
            torch.testing.assert_close(dw.cpu().double(), problem.parts.sum(0), rtol=2**-8, atol=0.5)
        else:
            problem.check_sum(dw)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_every_time(self, dtype):
        problem = make_problem([700, 1, 0, 900, 500], 1536, 1024, dtype)
        dy, x, offsets = (t.cuda() for t in (problem.dy, problem.x, problem.offsets))
        first = wgrad_gram(dy, x, offsets)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, wgrad_gram(dy, x, offsets), strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_does_not_wait_for_the_gpu(self, dtype):
        problem = make_problem([70, 0, 90], 256, 192, dtype)
        dy, x, offsets = (t.cuda() for t in (problem.dy, problem.x, problem.offsets))
        wgrad_gram(dy, x, offsets)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            _, gram = wgrad_gram(dy, x, offsets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        problem.check_gram(gram, 1e-5 if dtype in (torch.float32, torch.float64) else 2**-8)
