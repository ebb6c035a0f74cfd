"""The kernels that memory limits, each against the same in plain torch (named ``torch``, the baseline).

``cuda`` is the kernel in CUDA C++, there where the package was built ahead of time with a CUDA torch
(``TASKGRAD_CUDA=1 pip install --no-build-isolation .``), and then what the op runs; ``triton`` is Triton's. Of
``embedding_stats`` the baseline is the dense embedding gradient, which a step pays anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from taskgrad import ops
from taskgrad.ops._register import OPS, Cpp, Triton
from taskgrad.ops.memory_read import reference

from .gpu_timing import Case, Values, Variant, mm32
from .gpu_wgrad import bounds_of, signs

TOLERANCE = 1e-5  # of sums in float32
RANK = 32
SLICE = 1 << 22
LANGUAGE: dict[type, str] = {Cpp: "cuda", Triton: "triton"}


@dataclass(frozen=True)
class Sizes:
    """What the cases are made of: ``block`` elements of a T x M block, (d, N, T) of rows, (V, d, N, T) of an embedding,
    (T, K) of the memory, d of square parameters."""

    blocks: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int, int], ...]
    embeddings: tuple[tuple[int, int, int, int], ...]
    memories: tuple[tuple[int, int], ...]
    params: tuple[int, ...]


DEFAULT = Sizes(
    blocks=((8, 1 << 24), (2, 1 << 26), (32, 1 << 22)),
    rows=((4096, 8192, 8), (1024, 32768, 8), (1024, 8192, 128)),
    embeddings=((50304, 768, 8192, 8), (50304, 4096, 8192, 8)),
    memories=((8, 1 << 18), (8, 1 << 24), (128, 1 << 18)),
    params=(4096, 1024),
)
FULL = Sizes(
    blocks=tuple((t, d * d) for d in (1024, 2048, 4096, 8192) for t in (2, 8, 32, 64) if t * d < 1 << 17),
    rows=tuple((d, n, t) for d in (1024, 2048, 4096, 8192) for n in (2048, 8192, 32768) for t in (2, 8, 32, 128)),
    embeddings=tuple((50304, d, n, 8) for d in (1024, 4096) for n in (2048, 8192, 32768)),
    memories=tuple((t, k) for t in (2, 8, 32, 128) for k in (1 << 18, 1 << 22, 1 << 24) if t * k < 1 << 30),
    params=(1024, 2048, 4096, 8192),
)
TINY = Sizes(
    blocks=((3, 1030), (5, 33)),
    rows=((24, 66, 3), (3, 5, 2)),
    embeddings=((50, 24, 66, 3),),
    memories=((3, 1030),),
    params=(40,),
)


def cases(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names, and how to make the cases: they hold tensors."""
    found: list[tuple[Any, ...]] = []
    found += [(sketch_params, d, dtype) for d in sizes.params for dtype in (torch.float32, torch.bfloat16)]
    for block in sizes.blocks:
        found += [(sum_gram, *block, dtype) for dtype in (torch.bfloat16, torch.float32)]
    for rows in sizes.rows:
        found += [(segment_sum, *rows, False), (segment_sum, *rows, True), (norm_segment_sum, *rows)]
    found += [(embedding_stats, *size) for size in sizes.embeddings]
    found += [(memory_read, *size) for size in sizes.memories]
    for make, *arguments in found:
        yield case_name(make, *arguments), partial(make, *arguments, device)


def case_name(make: Callable[..., Case], *arguments: Any) -> str:
    """The function's name and what it is called with: ``memory_read T=8 K=1024``."""
    names = inspect.signature(make).parameters
    values = (label(a) if isinstance(a, torch.dtype) else a for a in arguments)
    return " ".join([make.__name__, *(f"{n}={v}" for n, v in zip(names, values, strict=False))])


def noise(*shape: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random numbers with a common part along the first dimension, so that sums and products are not near zero."""
    own = torch.randn(*shape, generator=generator, device=device)
    return (own + 0.3 * torch.randn(shape[1:], generator=generator, device=device)).to(dtype)


def kernels(name: str, *sample: Any) -> dict[str, Callable[..., Any]]:
    """The kernels that an op has for arguments like these, by their language; on a CPU the op."""
    found = {LANGUAGE[type(kernel)]: kernel for kernel in OPS[name].cuda if sample[0].is_cuda and kernel.takes(*sample)}
    return found or {"triton": getattr(ops, name)}


def rows_like(s: Segments, d: int, device: torch.device) -> Tensor:
    return torch.empty(1, dtype=torch.bfloat16, device=device).expand(s.entries, s.rows, d)


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sum_gram(T: int, M: int, dtype: torch.dtype, device: torch.device) -> Case:
    def truth(block: Tensor) -> Values:
        gram, total = torch.zeros(T, T, dtype=torch.float64, device=device), []
        for part in block.split(SLICE, dim=1):
            wide = part.double()
            gram += wide @ wide.mT
            total.append(wide.sum(0))
        return {"sum": torch.cat(total), "gram": gram}

    def of(op: Any, block: Tensor) -> Values:
        total, gram = op(block)
        return {"sum": total, "gram": gram}

    tolerance = {"sum": 1e-6 if dtype == torch.float32 else 4e-3, "gram": TOLERANCE}
    variants = {
        "torch": Variant(
            lambda block: {"sum": block.sum(0), "gram": mm32(block, block.mT)}, {**tolerance, "gram": 1e-3}
        ),
    }
    for language, kernel in kernels("sum_gram", torch.empty(1, dtype=dtype, device=device).expand(T, M)).items():
        variants[language] = Variant(partial(of, kernel), tolerance, ours=True)
    shape = {"T": T, "M": M, "dtype": label(dtype)}
    return Case(
        case_name(sum_gram, T, M, dtype),
        shape,
        2.0 * T * T * M,
        float(dtype.itemsize * (T + 1) * M),
        "bf16" if dtype.itemsize == 2 else "fp32",
        lambda generator: (noise(T, M, generator=generator, device=device, dtype=dtype),),
        truth,
        variants,
        "torch",
    )


@dataclass(frozen=True)
class Segments:
    """Entries with their tasks: ``order`` (None: sorted), ``offsets`` with an empty last segment, the entries' order as
    an index, the segment of each entry, and the rows by task as a matrix of ones [S, N]."""

    entries: int
    rows: int
    order: Tensor | None
    offsets: Tensor
    task: Tensor
    member: Tensor

    @staticmethod
    def make(N: int, T: int, shuffled: bool, device: torch.device) -> Segments:
        rows = max(1, N // max(64, 2 * T))
        entries = N // rows
        bounds = bounds_of(entries, T)
        offsets = torch.tensor([*bounds, entries], device=device)
        task = torch.repeat_interleave(torch.arange(T), torch.tensor(bounds).diff()).to(device)
        order = None
        if shuffled:
            task = task[torch.randperm(entries, generator=torch.Generator().manual_seed(2)).to(device)]
            order = torch.argsort(task, stable=True)
        member = torch.nn.functional.one_hot(task.repeat_interleave(rows), T + 1).mT.to(torch.bfloat16).contiguous()
        return Segments(entries, rows, order, offsets, task, member)


def summed(values: Tensor, s: Segments) -> Tensor:
    """The oracle: [E, M, d] to [S, d] in float64."""
    out = values.new_zeros(s.offsets.shape[0] - 1, values.shape[2], dtype=torch.float64)
    return out.index_add(0, s.task, values.double().sum(1))


def segment_sum(d: int, N: int, T: int, shuffled: bool, device: torch.device) -> Case:
    s = Segments.make(N, T, shuffled, device)

    def product(values: Tensor) -> Values:
        return {"sums": mm32(s.member, values.flatten(0, 1))}

    def of(op: Any, values: Tensor) -> Values:
        return {"sums": op(values, s.order, s.offsets)}

    def added(values: Tensor) -> Values:
        out = torch.zeros(T + 1, d, device=device)
        return {"sums": out.index_add(0, s.task, values.sum(1, dtype=torch.float32))}

    tolerance = {"sums": TOLERANCE}
    variants = {
        "torch": Variant(product, tolerance),
        "index_add": Variant(added, tolerance),
    }
    for language, kernel in kernels("segment_sum", rows_like(s, d, device), s.order, s.offsets).items():
        variants[language] = Variant(partial(of, kernel), tolerance, ours=True)
    kind = "shuffled" if shuffled else "sorted"
    return Case(
        case_name(segment_sum, d, N, T, shuffled),
        {"d": d, "N": s.entries * s.rows, "T": T, "rows": kind, "dtype": "bfloat16"},
        float(s.entries * s.rows * d),
        2.0 * s.entries * s.rows * d + 4.0 * (T + 1) * d,
        "fp32",
        lambda generator: (noise(s.entries, s.rows, d, generator=generator, device=device, dtype=torch.bfloat16),),
        lambda values: {"sums": summed(values, s)},
        variants,
        "torch",
    )


def norm_segment_sum(d: int, N: int, T: int, device: torch.device) -> Case:
    s = Segments.make(N, T, False, device)

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        dy, x = (
            noise(s.entries, s.rows, d, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        wide = x.float()
        return dy, x, wide.mean(-1), (wide.var(-1, unbiased=False) + 1e-5).rsqrt()

    def truth(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Values:
        xhat = (x.double() - mean.double()[..., None]) * rstd.double()[..., None]
        return {"gamma": summed(dy.double() * xhat, s), "beta": summed(dy, s)}

    def plain(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Values:
        xhat = (x - mean[..., None]) * rstd[..., None]
        wide = dy.float()
        member = s.member.float()
        return {"gamma": member @ (wide * xhat).flatten(0, 1), "beta": member @ wide.flatten(0, 1)}

    def of(op: Any, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Values:
        gamma, beta = op(dy, x, mean, rstd, s.order, s.offsets)
        return {"gamma": gamma, "beta": beta}

    tolerance = {"gamma": TOLERANCE, "beta": TOLERANCE}
    variants = {
        "torch": Variant(plain, tolerance),
    }
    like = rows_like(s, d, device)
    for language, kernel in kernels("norm_segment_sum", like, like, None, like, s.order, s.offsets).items():
        variants[language] = Variant(partial(of, kernel), tolerance, ours=True)
    count = float(s.entries * s.rows * d)
    return Case(
        case_name(norm_segment_sum, d, N, T),
        {"d": d, "N": s.entries * s.rows, "T": T, "rows": "sorted", "dtype": "bfloat16"},
        5 * count,
        4 * count + 8.0 * s.entries * s.rows + 8.0 * (T + 1) * d,
        "fp32",
        make,
        truth,
        variants,
        "torch",
    )


def embedding_stats(V: int, d: int, N: int, T: int, device: torch.device) -> Case:
    s = Segments.make(N, T, False, device)
    left, right = signs(V, min(RANK, V), device), signs(d, min(RANK, d), device)

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        """Few tokens are frequent, as in text."""
        index = (torch.rand(s.entries, s.rows, generator=generator, device=device) ** 3 * V).long().clamp_(max=V - 1)
        return noise(s.entries, s.rows, d, generator=generator, device=device, dtype=torch.bfloat16), index

    def truth(dy: Tensor, index: Tensor) -> Values:
        wide = dy.double()
        dw = wide.new_zeros(V, d).index_add(0, index.flatten(), wide.flatten(0, 1))
        projected = wide @ right.double()
        stats = wide.new_zeros(T + 1, left.shape[1], right.shape[1])
        for t in range(T):
            of_task = s.task == t
            stats[t] = left.double()[index[of_task].flatten()].mT @ projected[of_task].flatten(0, 1)
        return {"dw": dw, "stats": stats}

    def dense(dy: Tensor, index: Tensor) -> Values:
        return {"dw": torch.ops.aten.embedding_dense_backward(dy, index, V, -1, False)}

    def ours(dy: Tensor, index: Tensor) -> Values:
        dw, stats = torch.ops.taskgrad.embedding_stats(dy, index, s.order, s.offsets, V, -1, left, right)
        return {"dw": dw, "stats": stats}

    count = s.entries * s.rows
    # sums of thousands of 16-bit rows of frequent tokens: torch adds them up in blocks
    variants = {
        "dense": Variant(dense, {"dw": 1e-2}),
        "embedding_stats": Variant(ours, {"dw": 1e-2, "stats": 1e-3}, ours=True),
    }
    return Case(
        case_name(embedding_stats, V, d, N, T),
        {"V": V, "d": d, "N": count, "T": T, "dtype": "bfloat16"},
        2.0 * count * RANK * (d + RANK),
        2.0 * (count * d + V * d) + 8.0 * count,
        "bf16",
        make,
        truth,
        variants,
        "dense",
    )


def memory_read(T: int, K: int, device: torch.device) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        both = noise(2 * T + 1, K, generator=generator, device=device, dtype=torch.float32)
        paths = torch.randn(2 * T + 1, K, generator=generator, device=device, dtype=torch.float64)
        ones = torch.ones(T, 1, dtype=torch.float64, device=device)
        return (both[:T], paths[:T], paths[T:-1], both[T:], paths[-1], ones[:, 0], ones)

    def plain(*a: Tensor) -> Values:
        dots, sums = reference(*a)
        return {"dots": dots, "sums": sums}

    def fused(*a: Tensor) -> Values:
        dots, sums = ops.memory_read(*a)
        return {"dots": dots, "sums": sums}

    tolerances = {"dots": TOLERANCE, "sums": TOLERANCE}
    variants = {"torch": Variant(plain, tolerances), "triton": Variant(fused, tolerances, ours=True)}
    return Case(
        case_name(memory_read, T, K),
        {"T": T, "K": K, "dtype": "float32"},
        2.0 * T * (T + 6) * K,
        4.0 * (2 * T + 1) * K + 8.0 * (2 * T + 1) * K,
        "fp32",
        make,
        plain,
        variants,
        "torch",
    )


def sketch_params(d: int, dtype: torch.dtype, device: torch.device) -> Case:
    left, right = signs(d, RANK, device), signs(d, RANK, device)

    def plain(theta: Tensor) -> Values:
        return {"sketch": left.double().mT @ (theta.double() @ right.double())}

    variants = {
        "torch": Variant(plain, {"sketch": 1e-12}),
        "triton": Variant(
            lambda theta: {"sketch": ops.sketch_params(theta, left, right)}, {"sketch": 1e-12}, ours=True
        ),
    }
    return Case(
        case_name(sketch_params, d, dtype),
        {"d": d, "rank": RANK, "dtype": label(dtype)},
        2.0 * d * RANK * (d + RANK),
        float(dtype.itemsize * d * d),
        "fp64",
        lambda generator: (noise(d, d, generator=generator, device=device, dtype=dtype),),
        lambda theta: {"sketch": left.double().mT @ theta.double() @ right.double()},
        variants,
        "torch",
    )
