"""A linear layer's weight gradient with per-task statistics: our kernels and what one would write without them.

    dense              dYᵀ X by cuBLAS: what a step pays anyway, everything is compared with it
    wgrad_gram         one kernel, dW and the exact Gram
    sum_gram           grouped_mm, then our sum_gram over the T gradients
    grouped_mm         grouped_mm, sum and Gram in torch
    panelled           the same by 512 rows of dW at a time
    loop               one torch.mm per task (lengths known to the host), sum and Gram in torch
    ghost_gram         dense and our kernel in token space; ``ghost torch`` the same in plain torch
    wgrad_sketch r     dW and the sketches of rank r x r; ``logra r`` the same in plain torch, in bfloat16

Rows are sorted by task, lengths differ by up to a factor of two, and an empty last segment stands for rows without a
task, as the tracker passes it; baselines do not get that one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from taskgrad import ops

from .gpu_timing import Case, Values, Variant, mm32

# public since torch 2.10 as a thin call of the private one
grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

MATERIALISE_LIMIT = 20e9  # bytes that T gradients may take
PANEL = 512
TRUTH_BYTES = 1 << 30
RANKS = (32, 64)

Shape = tuple[int, int, int, int]  # d_in, d_out, N, T

GOAL: Shape = (4096, 4096, 8192, 8)
# the goal first: whatever time runs out later
DEFAULT: list[Shape] = [
    GOAL,
    (2048, 2048, 8192, 8),
    (1024, 1024, 8192, 8),
    (8192, 8192, 8192, 8),
    (4096, 4096, 2048, 8),
    (4096, 4096, 32768, 8),
    (4096, 4096, 8192, 2),
    (4096, 4096, 8192, 32),
    (4096, 4096, 8192, 128),
    (768, 3072, 8192, 8),
    (1024, 1024, 2048, 8),
    (1024, 1024, 32768, 32),
    (8192, 8192, 2048, 2),
    (8192, 8192, 32768, 8),
]
FULL: list[Shape] = [
    (d, d, n, t) for d, n, t in itertools.product((1024, 2048, 4096, 8192), (2048, 8192, 32768), (2, 8, 32, 128))
]
TINY: list[Shape] = [(24, 40, 70, 3), (16, 16, 33, 2)]


def cases(shapes: list[Shape], device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names, and how to make the cases: they hold tensors."""
    for shape in shapes:
        yield case_name(*shape), partial(wgrad, *shape, device)


def case_name(d_in: int, d_out: int, N: int, T: int) -> str:
    return f"wgrad d={d_in}x{d_out} N={N} T={T}"


def bounds_of(rows: int, tasks: int) -> list[int]:
    """[T + 1]: the first row of each task, lengths between 0.7 and 1.3 of the mean before rounding."""
    weight = torch.rand(tasks, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.6 + 0.7
    ends = (weight.cumsum(0) / weight.sum() * rows).round().long()
    return [0, *ends.tolist()]


def signs(d: int, r: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(d * 1000 + r)
    return (torch.randint(0, 2, (d, r), generator=generator) * 2 - 1).float().to(device)


def wgrad(d_in: int, d_out: int, N: int, T: int, device: torch.device) -> Case:
    bounds = bounds_of(N, T)
    offsets = torch.tensor([*bounds, N], device=device)
    ends = torch.tensor(bounds[1:], dtype=torch.int32, device=device)
    member = torch.zeros(N, T, device=device)
    member[torch.arange(N, device=device), torch.bucketize(torch.arange(N, device=device), ends, right=True)] = 1
    sides = {r: (signs(d_out, r, device), signs(d_in, r, device)) for r in RANKS if r <= min(d_in, d_out)}
    halves = {r: (left.bfloat16(), right.bfloat16()) for r, (left, right) in sides.items()}

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise and a common part, so that tasks' gradients are not orthogonal."""

        def rows(d: int) -> Tensor:
            noise = torch.randn(N, d, generator=generator, device=device)
            return (noise + 0.1 * torch.randn(d, generator=generator, device=device)).bfloat16()

        return rows(d_out), rows(d_in)

    def truth(dy: Tensor, x: Tensor) -> Values:
        dy, x = dy.double(), x.double()
        panel = max(16, TRUTH_BYTES // (8 * (T + 1) * d_in))
        dw, gram = dy.new_empty(d_out, d_in), dy.new_zeros(T + 1, T + 1)
        stats = {r: dy.new_zeros(T + 1, r, r) for r in sides}
        for rows in range(0, d_out, panel):
            parts = dy.new_zeros(T + 1, min(panel, d_out - rows), d_in)
            for t, (start, end) in enumerate(itertools.pairwise(bounds)):
                torch.mm(dy[start:end, rows : rows + panel].mT, x[start:end], out=parts[t])
            dw[rows : rows + panel] = parts.sum(0)
            flat = parts.flatten(1)
            gram += flat @ flat.mT
            for r, (left, right) in sides.items():
                stats[r] += left[rows : rows + panel].double().mT @ (parts @ right.double())
        return {"dw": dw, "gram": gram, **{f"stats{r}": values for r, values in stats.items()}}

    def dense(dy: Tensor, x: Tensor) -> Values:
        return {"dw": dy.mT @ x}

    def fused(dy: Tensor, x: Tensor) -> Values:
        dw, gram = ops.wgrad_gram(dy, x, offsets)
        return {"dw": dw, "gram": gram}

    def summed(parts: Tensor) -> Values:
        flat = parts.flatten(1)
        return {"dw": parts.sum(0), "gram": mm32(flat, flat.mT)}

    def grouped(dy: Tensor, x: Tensor) -> Values:
        return summed(grouped_mm(dy.mT, x, offs=ends))

    def grouped_sum_gram(dy: Tensor, x: Tensor) -> Values:
        dw, gram = ops.sum_gram(grouped_mm(dy.mT, x, offs=ends).flatten(1))
        return {"dw": dw.view(d_out, d_in), "gram": gram}

    def panelled(dy: Tensor, x: Tensor) -> Values:
        dw, gram = dy.new_empty(d_out, d_in), dy.new_zeros(T, T, dtype=torch.float32)
        for rows in range(0, d_out, PANEL):
            part = summed(grouped_mm(dy[:, rows : rows + PANEL].mT, x, offs=ends))
            dw[rows : rows + PANEL] = part["dw"]
            gram += part["gram"]
        return {"dw": dw, "gram": gram}

    def loop(dy: Tensor, x: Tensor) -> Values:
        parts = dy.new_empty(T, d_out, d_in)
        for part, start, end in zip(parts, bounds, bounds[1:], strict=False):
            torch.mm(dy[start:end].mT, x[start:end], out=part)
        return summed(parts)

    def ghost(dy: Tensor, x: Tensor) -> Values:
        return {"dw": dy.mT @ x, "gram": ops.ghost_gram(dy, x, offsets)}

    def ghost_torch(dy: Tensor, x: Tensor) -> Values:
        products = mm32(x, x.mT).mul_(mm32(dy, dy.mT))
        return {"dw": dy.mT @ x, "gram": member.mT @ (products @ member)}

    def sketch(r: int) -> Variant:
        def run(dy: Tensor, x: Tensor) -> Values:
            dw, stats = ops.wgrad_sketch(dy[:, None], x[:, None], None, offsets, *sides[r])
            return {"dw": dw, f"stats{r}": stats}

        return Variant(run, {"dw": 5e-3, f"stats{r}": 1e-3}, ours=True)

    def logra(r: int) -> Variant:
        def run(dy: Tensor, x: Tensor) -> Values:
            left, right = halves[r]
            return {"dw": dy.mT @ x, f"stats{r}": grouped_mm((dy @ left).mT, x @ right, offs=ends)}

        return Variant(run, {"dw": 5e-3, f"stats{r}": 2e-2})

    exact = {"dw": 5e-3, "gram": 2e-3}
    variants = {"dense": Variant(dense, {"dw": 5e-3}), "wgrad_gram": Variant(fused, exact, ours=True)}
    if 2.0 * T * d_in * d_out <= MATERIALISE_LIMIT:
        if T <= 64:
            variants["sum_gram"] = Variant(grouped_sum_gram, exact)
        variants |= {"grouped_mm": Variant(grouped, exact), "loop": Variant(loop, exact)}
    variants["panelled"] = Variant(panelled, exact)
    if (d_in + d_out) / N >= 2:  # beyond that it is slower than everything else
        variants |= {"ghost_gram": Variant(ghost, exact, ours=True), "ghost torch": Variant(ghost_torch, exact)}
    variants |= {f"wgrad_sketch {r}": sketch(r) for r in sides} | {f"logra {r}": logra(r) for r in sides}
    shape = {"d_in": d_in, "d_out": d_out, "N": N, "T": T, "dtype": "bfloat16"}
    traffic = 2.0 * (N * (d_in + d_out) + d_in * d_out)
    return Case(
        case_name(d_in, d_out, N, T), shape, 2.0 * N * d_in * d_out, traffic, "bf16", make, truth, variants, "dense"
    )
