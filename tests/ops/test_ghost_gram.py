"""``ghost_gram`` against per-segment products in float64, on a CPU and (marked ``gpu``) on a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings

from taskgrad.ops import ghost_gram, wgrad_gram
from tests.utils.segments import COUNTS, DTYPES, LAYOUTS, Problem, make_problem, poison_memory, problems

module = sys.modules["taskgrad.ops.ghost_gram"]  # the attribute of taskgrad.ops is the function


def exact(problem: Problem) -> float:
    """Relative to the rows' norms, which are larger than those of the parts."""
    return 1e-14 if problem.dy.dtype == torch.float64 else 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [*COUNTS, [70, 0, 1, 64, 130]], ids=str)
def test_matches_fp64(counts, dtype, monkeypatch):
    problem = make_problem(counts, 13, 9, dtype)
    poison_memory(monkeypatch)
    problem.check_gram(ghost_gram(problem.dy, problem.x, problem.offsets), exact(problem), by_rows=True)


@settings(max_examples=60, deadline=None)
@given(problems)
def test_any_input(problem: Problem):
    problem.check_gram(ghost_gram(problem.dy, problem.x, problem.offsets.int()), exact(problem), by_rows=True)


def test_several_blocks_of_rows():
    """Blocks are at least 64 rows high, and lower the more rows there are."""
    problem = make_problem([9000, 0, 1, 2999, 3000, 2400], 2, 3)  # 60 rows of 17400 would be 8 MiB
    problem.check_gram(ghost_gram(problem.dy, problem.x, problem.offsets), 1e-6, by_rows=True)


def test_agrees_with_wgrad_gram():
    problem = make_problem([30, 0, 1, 40], 20, 30, torch.bfloat16)
    arguments = (problem.dy, problem.x, problem.offsets)
    torch.testing.assert_close(ghost_gram(*arguments), wgrad_gram(*arguments)[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, 0)], ids=str)
def test_empty_is_zero(sizes):
    rows, d_out, d_in = sizes
    gram = ghost_gram(torch.ones(rows, d_out), torch.ones(rows, d_in), torch.tensor([0, rows, rows]))
    assert torch.equal(gram, torch.zeros(2, 2, dtype=torch.float64))


def test_no_segments():
    assert ghost_gram(torch.empty(0, 3), torch.empty(0, 4), torch.zeros(1, dtype=torch.int64)).shape == (0, 0)


def test_not_finite_stays_in_its_segment():
    problem = make_problem([3, 0, 4, 2], 5, 6)
    problem.x[4, 2] = float("nan")
    gram = ghost_gram(problem.dy, problem.x, problem.offsets)
    broken = ~gram.isfinite()
    assert broken[2, [0, 2, 3]].all() and broken[[0, 2, 3], 2].all()
    assert gram[[0, 1, 3]][:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for layout in LAYOUTS:
        problem = make_problem([3, 0, 2], 6, 5, dtype, layout=layout)
        torch.library.opcheck(torch.ops.taskgrad.ghost_gram.default, (problem.dy, problem.x, problem.offsets.int()))


def test_compiles_with_other_shapes():
    compiled = torch.compile(ghost_gram, backend="aot_eager", fullgraph=True, dynamic=True)
    for counts, d_out, d_in in (([3, 2], 6, 5), ([1, 0, 4], 7, 9)):
        problem = make_problem(counts, d_out, d_in)
        problem.check_gram(compiled(problem.dy, problem.x, problem.offsets), 1e-6, by_rows=True)


def test_wrong_input_says_what_is_needed():
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to 5"):
        ghost_gram(torch.zeros(5, 3), torch.zeros(5, 4), torch.tensor([0, 4]))
    with pytest.raises(TypeError, match=r"x must be float32, got torch\.float16"):
        ghost_gram(torch.zeros(5, 3), torch.zeros(5, 4).half(), torch.tensor([0, 5]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("size", [(768, 768), (1000, 333), (1, 1)], ids=str)
    @pytest.mark.parametrize(
        "counts",
        [[600, 0, 1, 423], [1000], [17, 300] * 9, [1] * 300 + [5, 64] * 16, [3]],
        ids=lambda counts: f"S={len(counts)}",
    )
    @pytest.mark.parametrize(("dtype", "tf32"), [(d, False) for d in DTYPES] + [(torch.float32, True)], ids=str)
    def test_matches_fp64(self, dtype, tf32, counts, size, layout, monkeypatch):
        problem = make_problem(counts, *size, dtype, layout=layout)
        dy, x, offsets = (t.cuda() for t in (problem.dy, problem.x, problem.offsets))
        monkeypatch.setattr(module, "tf32_allowed", lambda: tf32)
        problem.check_gram(ghost_gram(dy, x, offsets), 2**-9 if tf32 else exact(problem), by_rows=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_every_time(self, dtype):
        problem = make_problem([700, 1, 0, 900, 500], 512, 640, dtype)
        dy, x, offsets = (t.cuda() for t in (problem.dy, problem.x, problem.offsets))
        first = ghost_gram(dy, x, offsets)
        for _ in range(20):
            assert torch.equal(first, ghost_gram(dy, x, offsets))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_does_not_wait_for_the_gpu(self, dtype):
        problem = make_problem([70, 0, 90], 256, 192, dtype)
        dy, x, offsets = (t.cuda() for t in (problem.dy, problem.x, problem.offsets))
        ghost_gram(dy, x, offsets)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            gram = ghost_gram(dy, x, offsets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        problem.check_gram(gram, exact(problem), by_rows=True)
