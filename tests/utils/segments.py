"""Rows sorted by segment with their weight gradients in float64, for the ops that split a product by segment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COUNTS = ([4], [1], [3, 5], [0, 7], [2, 0, 1], [0, 0, 0], [1] * 16, [3, 0, 1, 2] * 4 + [5], [0, 40, 0, 1, 21])


@dataclass(frozen=True)
class Problem:
    """``parts`` [S, d_out, d_in] are G_s = dY_sᵀ X_s and ``gram`` their inner products, in float64."""

    dy: Tensor
    x: Tensor
    offsets: Tensor
    parts: Tensor
    gram: Tensor

    def check_gram(self, gram: Tensor, tolerance: float, *, by_rows: bool = False) -> None:
        """``gram`` is symmetric to the bit, and right relative to the norms of what is multiplied: of the parts, or (as
        rows may cancel) of the rows that they are sums of."""
        assert gram.dtype == torch.float64
        assert torch.equal(gram, gram.mT)
        norm = self.gram.diagonal().sqrt()
        if by_rows:
            rows = self.dy.double().norm(dim=1) * self.x.double().norm(dim=1)
            norm = torch.stack([rows[a:b].sum() for a, b in pairwise(self.offsets.tolist())])
        assert ((gram.cpu() - self.gram).abs() <= tolerance * norm[:, None] * norm[None, :]).all()

    def check_sum(self, dw: Tensor, before: Tensor | None = None) -> None:
        """``dw`` is the sum of the parts (and of what was there before) up to rounding, products in fp32 or fp64."""
        want = self.parts.sum(0) if before is None else before.double() + self.parts.sum(0)
        terms = torch.einsum("no,ni->oi", self.dy.double().abs(), self.x.double().abs())
        terms = terms if before is None else terms + before.double().abs()
        accumulated = torch.float64 if self.dy.dtype == torch.float64 else torch.float32
        rounding = (self.dy.shape[0] + 8) * torch.finfo(accumulated).eps * terms
        error = (dw.cpu().double() - want).abs()
        # below its smallest normal number a float16 has an absolute error
        assert (error <= rounding + torch.finfo(dw.dtype).eps * want.abs() + torch.finfo(dw.dtype).tiny).all()


def make_problem(
    counts: list[int], d_out: int, d_in: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, layout: str = "rows"
) -> Problem:
    """Random rows of ``counts`` segments; ``layout`` says how they lie in memory: "rows", "columns" (transposed),
    "gaps" (rows and columns that do not belong to it in between) or "wide" (a slice of wider rows)."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(counts)

    def random(d: int) -> Tensor:
        if layout == "columns":
            return torch.randn(d, rows, generator=generator, dtype=torch.float64).to(dtype).mT
        if layout == "gaps":
            return torch.randn(2 * rows, 2 * d, generator=generator, dtype=torch.float64).to(dtype)[::2, ::2]
        if layout == "wide":
            return torch.randn(rows, d + 9, generator=generator, dtype=torch.float64).to(dtype)[:, 3 : d + 3]
        return torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype)

    dy, x = random(d_out), random(d_in)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    parts = torch.zeros(len(counts), d_out, d_in, dtype=torch.float64)
    for s, (start, end) in enumerate(pairwise(offsets.tolist())):
        parts[s] = torch.einsum("no,ni->oi", dy[start:end].double(), x[start:end].double())
    return Problem(dy, x, offsets, parts, torch.einsum("soi,toi->st", parts, parts))


LAYOUTS = ("rows", "columns", "gaps", "wide")
problems = st.builds(
    make_problem,
    st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 17]), min_size=1, max_size=19),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
    layout=st.sampled_from(LAYOUTS),
)


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not initialised holds NaN, so that whatever reads it, or fails to write it, shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def nan(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: nan(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: nan(new_empty(*args, **kwargs)))


def exact(problem: Problem) -> float:
    """The tolerance of a Gram whose parts were not rounded."""
    return 1e-13 if problem.dy.dtype == torch.float64 else 1e-5
