"""Random arguments for every public op, most of them wrong, against plain NumPy in float64.

    python -m tests.utils.ops_fuzz COUNT SEED PROGRESS_FILE

A call must raise TypeError, ValueError or RuntimeError with a message (MemoryError for what is too large), or give what
the NumPy below gives; arguments that nothing was done to but to their strides must not raise. Each set goes through
``taskgrad.ops`` and ``torch.ops.taskgrad``. Prints one JSON line an op; before each call its number is written to the
file, for the case that it was the last.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import taskgrad.ops

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (*FLOATS, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64)
NUMBERS = (-(2**63), -(2**40), -7, -1, 0, 1, 2, 5, 2**31, 2**40, 2**62, 2**63 - 1)
MANY = 1 << 46  # of any element: more bytes than a process can address
Arguments = dict[str, Any]
Expected = list[tuple[np.ndarray, np.ndarray]]  # results, and the same of absolute values: rounding is relative to it


class Malformed(Exception):
    """No result is right: the call must raise."""


class TooLarge(Exception):
    """Too large to say what is right: anything but a crash will do."""


def need(condition: object) -> None:
    if not condition:
        raise Malformed


# ------------------------------------------------------------------------------------------ well-formed arguments


class Draw:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.dtype = rng.choice(FLOATS)

    def size(self, most: int = 6, large: int = 0) -> int:
        if large and self.rng.random() < 0.02:
            return self.rng.randint(most, large)
        return self.rng.randint(0 if self.rng.random() < 0.2 else 1, most)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape).to(dtype or self.dtype)
        if x.numel() and self.rng.random() < 0.1:
            x.view(-1)[self.rng.randrange(x.numel())] = float("nan")
        return x

    def signs(self, rows: int) -> Tensor | None:
        if self.rng.random() < 0.4:
            return None
        return (torch.randint(0, 2, (rows, self.rng.randint(0, 4))) * 2 - 1).to(self.rng.choice((self.dtype, *FLOATS)))

    def offsets(self, entries: int) -> Tensor:
        inner = sorted(self.rng.randint(0, entries) for _ in range(self.rng.randint(0, 4)))
        if entries == 0 and self.rng.random() < 0.1:
            return torch.tensor([0])
        return torch.tensor([0, *inner, entries]).to(self.rng.choice((torch.int64, torch.int64, torch.int32)))

    def order(self, entries: int) -> Tensor | None:
        return torch.randperm(entries) if self.rng.random() < 0.7 else None


def draw_segment_sum(d: Draw) -> Arguments:
    E = d.size(large=700)
    shape = d.rng.choice(((E,), (E, d.size()), (E, d.size(3), d.size(9, 1100)), (E, d.size(3), d.size(9))))
    return {"values": d.floats(*shape), "order": d.order(E), "offsets": d.offsets(E)}


def draw_norm_segment_sum(d: Draw) -> Arguments:
    E, M, width = d.size(large=300), d.size(3), d.size(9, 1100)
    stat = torch.float64 if d.dtype == torch.float64 else torch.float32
    mean = d.floats(E, M, dtype=stat) if d.rng.random() < 0.6 else None
    out = {"dy": d.floats(E, M, width), "x": d.floats(E, M, width), "mean": mean}
    return out | {"rstd": d.floats(E, M, dtype=stat), "order": d.order(E), "offsets": d.offsets(E)}


def draw_sum_gram(d: Draw) -> Arguments:
    return {"block": d.floats(d.size(9), d.size(20, 3000))}


def draw_memory_read(d: Draw) -> Arguments:
    T, K = d.size(9), d.size(20, 3000)
    doubles = {name: d.floats(T, K, dtype=torch.float64) for name in ("before", "after")}
    out = {"ema": d.floats(T, K, dtype=d.rng.choice(FLOATS[:2]))} | doubles
    out["gradient"] = d.floats(T + 1, K, dtype=d.rng.choice(FLOATS[:2]))
    out |= {"theta": d.floats(K, dtype=torch.float64), "to_mean": d.floats(T, dtype=torch.float64)}
    return out | {"correction": d.floats(T, d.rng.choice((1, K)), dtype=torch.float64)}


def draw_memory_write(d: Draw) -> Arguments:
    a = draw_memory_read(d)
    T, K = a["ema"].shape
    flags = torch.rand(T) < 0.5, torch.rand(K) < 0.3
    out = {name: a[name] for name in ("ema", "before", "after", "gradient", "to_mean")}
    out |= {"seen": flags[0], "left_out": flags[1] if d.rng.random() < 0.5 else None}
    out |= {"theta_before": a["theta"], "theta_after": d.floats(K, dtype=torch.float64)}
    return out | {"correction": a["correction"], "decay": d.rng.choice((0.0, 0.9, 1.0))}


def draw_sketch_all(d: Draw) -> Arguments:
    """Of matrices and of what stays as it is: lists are damaged as wholes."""
    out: Arguments = {"values": [], "left": [], "right": []}
    for _ in range(d.rng.randint(1, 3)):
        a = draw_sketch_params(d)
        for name, key in (("values", "theta"), ("left", "left"), ("right", "right")):
            out[name].append(a[key])
    return out


def draw_sketch_params(d: Draw) -> Arguments:
    d0, d1 = d.size(9, 700), d.size(9, 700)
    return {"theta": d.floats(d0, d1), "left": d.signs(d0), "right": d.signs(d1)}


def draw_rows(d: Draw) -> Arguments:
    N = d.size(9, 300)
    return {"dy": d.floats(N, d.size(9, 200)), "x": d.floats(N, d.size(9, 100)), "offsets": d.offsets(N)}


def draw_wgrad_sketch(d: Draw) -> Arguments:
    E, M, d_out, d_in = d.size(large=60), d.size(3), d.size(9, 100), d.size(9, 100)
    out = {"dy": d.floats(E, M, d_out), "x": d.floats(E, M, d_in), "order": d.order(E), "offsets": d.offsets(E)}
    return out | {"left": d.signs(d_out), "right": d.signs(d_in)}


def draw_wgrad_stats(d: Draw) -> Arguments:
    return draw_wgrad_sketch(d) | {"strategy": d.rng.choice((None, "fused", "ghost", "materialise"))}


def draw_conv_sketch(d: Draw) -> Arguments:
    dims, groups, B = d.rng.choice((1, 2, 2, 3)), d.rng.choice((1, 1, 2)), d.size(4)
    d.dtype = d.rng.choice((torch.float32, torch.float64, torch.bfloat16))
    per_group, C_out = d.rng.randint(1, 2), groups * d.rng.randint(1, 2)
    kernel = [d.rng.randint(1, 3) for _ in range(dims)]
    stride, padding, dilation = ([d.rng.randint(a, 2) for _ in range(dims)] for a in (1, 0, 1))
    size = [(k - 1) * dil + d.rng.randint(1, 4) for k, dil in zip(kernel, dilation, strict=True)]
    out = [(n + 2 * p - dil * (k - 1) - 1) // s + 1
           for n, p, dil, k, s in zip(size, padding, dilation, kernel, stride, strict=True)]  # fmt: skip
    weight = d.floats(C_out, per_group, *kernel)
    arguments = {"dy": d.floats(B, C_out, *out), "x": d.floats(B, per_group * groups, *size), "weight": weight}
    arguments |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    arguments |= {"order": d.order(B), "offsets": d.offsets(B)}
    return arguments | {"left": d.signs(C_out), "right": d.signs(weight[0].numel())}


def draw_embedding(d: Draw) -> Arguments:
    E, M, V, width = d.size(large=60), d.size(3), d.rng.randint(1, 6), d.size(9)
    index = torch.randint(0, V, (E, M), dtype=d.rng.choice((torch.int64, torch.int32)))
    out = {"dy": d.floats(E, M, width), "index": index, "order": d.order(E), "offsets": d.offsets(E)}
    return out | {"num_embeddings": V, "padding_idx": d.rng.choice((-1, -1, 0, V - 1))}


def draw_embedding_stats(d: Draw) -> Arguments:
    out = draw_embedding(d)
    return out | {"left": d.signs(out["num_embeddings"]), "right": d.signs(out["dy"].shape[2])}


# ------------------------------------------------------------------------------------------ what is done to them


def restride(x: Tensor, rng: random.Random) -> Tensor:
    """The same values in another place: gaps, an offset, transposed memory, or broadcast where that is possible."""
    if x.layout != torch.strided or x.device.type != "cpu":
        return x
    how = rng.randrange(4)
    if how == 0 and x.dim():
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        return wide[..., 1::2].copy_(x)
    if how == 1 and x.dim():
        wide = torch.zeros(3 * x.shape[0] + 2, *x.shape[1:], dtype=x.dtype)
        return wide[2::3].copy_(x)
    if how == 2 and x.dim() > 1:
        axes = rng.sample(range(x.dim()), x.dim())
        inverse = [axes.index(axis) for axis in range(x.dim())]
        return x.permute(axes).contiguous().permute(inverse)
    if how == 3 and x.dim() and x.is_floating_point():
        axis = rng.randrange(x.dim())
        if x.shape[axis] > 0:
            return x.narrow(axis, 0, 1).expand(x.shape)  # other values, and as good
    return x


def damage(name: str, value: Any, arguments: Arguments, rng: random.Random) -> Any:
    if isinstance(value, (int, float)):
        return rng.choice((*NUMBERS[:-4], 2**50, value - 1, value + 1, None, 2.5, "3"))
    if isinstance(value, str):
        return rng.choice(("fastest", "", 3, None))
    if isinstance(value, list):
        changed = list(value)
        if any(isinstance(x, Tensor) for x in changed) and rng.random() < 0.7:
            at = rng.randrange(len(changed))
            tensors = {str(i): x for i, x in enumerate(changed) if isinstance(x, Tensor)}
            changed[at] = damage(name, changed[at], tensors, rng)
            return changed
        if changed and rng.random() < 0.6:
            changed[rng.randrange(len(changed))] = rng.choice(NUMBERS)
            return changed
        return rng.choice(([], changed[:-1], [*changed, 1], None, 2, [1.5] * len(changed)))
    if value is None:
        return rng.choice((torch.zeros(3), torch.arange(4), torch.zeros(4, 2), "None", 0, [1, 2]))
    if not value.is_floating_point() and value.numel() and rng.random() < 0.6:
        changed = value.clone()
        flat = changed.view(-1)
        number = rng.choice((*NUMBERS, value.shape[0], value.shape[0] + 1))
        if value.dtype != torch.int64:
            number = max(-(2**31), min(number, 2**31 - 1))
        how = rng.randrange(4)
        if how == 0:
            return changed.flip(0)
        if how == 1:
            return changed[torch.randperm(changed.shape[0])]
        flat[rng.randrange(flat.numel())] = number if how == 2 else flat[rng.randrange(flat.numel())].clone()
        return changed
    if any(size >= MANY for size in value.shape):
        return value
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    # infinite maps are out: nobody says what empty segments are then
    extreme = 3.0 if name in ("left", "right") else float("inf")
    ways: list[Callable[[], Any]] = [
        lambda: value.to(rng.choice(OTHERS)),
        lambda: value[..., :-1] if value.dim() else value,
        lambda: value[:-1] if value.dim() else value,
        lambda: value[:0] if value.dim() else value,
        lambda: value[:1] if value.dim() else value,
        lambda: torch.cat([value, value]) if value.dim() else value,
        lambda: value.unsqueeze(rng.randrange(value.dim() + 1)),
        lambda: value.flatten(),
        lambda: value.mT if value.dim() > 1 else value.reshape(()) if value.numel() == 1 else value,
        lambda: value.sum(),
        lambda: value.to("meta"),
        lambda: value.to_sparse(),
        lambda: value.to_mkldnn() if value.dtype == torch.float32 and value.numel() and value.dim() else None,
        lambda: value.narrow(0, 0, 1).expand(MANY, *value.shape[1:]) if value.dim() and value.shape[0] else value,
        lambda: value.as_strided(value.shape, [1] * value.dim()) if value.numel() else value,
        lambda: value.as_strided(value.shape, [0] * value.dim()) if value.numel() else value,
        lambda: torch.full(value.shape, extreme, dtype=value.dtype) if value.is_floating_point() else value.neg(),
        lambda: value.tolist(),
        lambda: value.detach().numpy() if value.dtype != torch.bfloat16 else 1.5,
        lambda: torch.complex(value.float(), value.float()).conj().imag.to(value.dtype),
        lambda: value.float().requires_grad_(),
        lambda: None,
        lambda: "tensor",
        lambda: rng.choice(tensors),
        lambda: value.to_dense().as_subclass(torch.nn.Buffer) if value.is_floating_point() else None,
    ]
    return rng.choice(ways)()


# ------------------------------------------------------------------------------------------ what is right


def array(x: Any, *dims: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> np.ndarray:
    need(isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu")
    need(x.dtype in dtypes and x.dim() in dims)
    if any(size >= MANY for size in x.shape):
        raise TooLarge
    values: np.ndarray = x.detach().to(torch.float64 if x.is_floating_point() else torch.int64).numpy()
    return values


def parts(order: Any, offsets: Any, entries: int) -> list[np.ndarray]:
    """The entries of every segment."""
    bounds = array(offsets, 1, dtypes=(torch.int64, torch.int32))
    need(
        len(bounds) and bounds[0] == 0 and bounds[-1] == entries and all(a <= b for a, b in itertools.pairwise(bounds))
    )
    sequence = np.arange(entries)
    if order is not None:
        sequence = array(order, 1, dtypes=(torch.int64,))
        need(sorted(sequence.tolist()) == list(range(entries)))
    return [sequence[a:b] for a, b in itertools.pairwise(bounds)]


def stack(matrices: list[np.ndarray], *shape: int) -> np.ndarray:
    return np.stack(matrices) if matrices else np.zeros((0, *shape))


def total(parts: list[np.ndarray], *shape: int) -> np.ndarray:
    return sum(parts, np.zeros(shape))


def grams(found: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrices of parts [S, ...]. NaN times the zeros of another part may be either, so anything goes there."""
    flat, absolute = (x.reshape(len(x), int(np.prod(x.shape[1:]))) for x in (found, size))
    bounds = absolute @ absolute.T
    bounds[~np.isfinite(bounds) & ~np.eye(len(bounds), dtype=bool)] = np.inf
    return flat @ flat.T, bounds


def maps(a: Arguments, d0: int, d1: int) -> tuple[np.ndarray, np.ndarray]:
    sides = []
    for side, size in ((a["left"], d0), (a["right"], d1)):
        if side is not None:
            need(array(side, 2).shape[0] == size)
        sides.append(np.eye(size) if side is None else array(side, 2))
    return sides[0], sides[1]


def of_parts(found: np.ndarray, absolute: np.ndarray, a: Arguments, sizes: tuple[int, int]) -> Expected:
    """The sketches of matrices [S, d0, d1]."""
    left, right = maps(a, *sizes)
    out = []
    for matrices, l, r in ((found, left, right), (absolute, np.abs(left), np.abs(right))):  # noqa: E741
        matrices = matrices.reshape(len(found), *sizes)
        # without a map nothing is mixed, and a NaN stays where it is
        if a["left"] is not None:
            matrices = stack([l.T @ m for m in matrices], l.shape[1], sizes[1])
        if a["right"] is not None:
            matrices = stack([m @ r for m in matrices], matrices.shape[1], r.shape[1])
        out.append(matrices)
    return [(out[0], out[1])]


def same_dtype(*tensors: Any) -> None:
    need(len({x.dtype for x in tensors}) == 1)


def expect_segment_sum(a: Arguments, public: bool) -> Expected:
    values = array(a["values"], *((1, 2, 3) if public else (3,)))
    rows = [values[p] for p in parts(a["order"], a["offsets"], values.shape[0])]
    axes = (0,) if values.ndim < 3 else (0, 1)
    shape = values.shape[len(axes) :]
    return [(stack([r.sum(axes) for r in rows], *shape), stack([np.abs(r).sum(axes) for r in rows], *shape))]


def expect_norm_segment_sum(a: Arguments, public: bool) -> Expected:
    dy, x = array(a["dy"], 3), array(a["x"], 3)
    same_dtype(a["dy"], a["x"])
    stat = (torch.float64 if a["dy"].dtype == torch.float64 else torch.float32,)
    rstd = array(a["rstd"], 2, dtypes=stat)
    mean = np.zeros(rstd.shape) if a["mean"] is None else array(a["mean"], 2, dtypes=stat)
    need(x.shape == dy.shape and rstd.shape == dy.shape[:2] and mean.shape == dy.shape[:2])
    segments, d = parts(a["order"], a["offsets"], dy.shape[0]), dy.shape[2]
    product = dy * ((x - mean[..., None]) * rstd[..., None])
    size = np.abs(dy) * ((np.abs(x) + np.abs(mean[..., None])) * np.abs(rstd[..., None]))
    return [
        (stack([v[p].sum((0, 1)) for p in segments], d), stack([w[p].sum((0, 1)) for p in segments], d))
        for v, w in ((product, size), (dy, np.abs(dy)))
    ]


def expect_sum_gram(a: Arguments, public: bool) -> Expected:
    block = array(a["block"], 2)
    return [(block.sum(0), np.abs(block).sum(0)), grams(block, np.abs(block))]


def memory(a: Arguments, *vectors: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The corrected average, the gradients, and what else there is."""
    ema, gradient = (array(a[name], 2, dtypes=FLOATS[:2]) for name in ("ema", "gradient"))
    T, K = ema.shape
    before, after, correction = (array(a[n], 2, dtypes=FLOATS[1:2]) for n in ("before", "after", "correction"))
    to_mean = array(a["to_mean"], 1, dtypes=FLOATS[1:2])
    need(before.shape == after.shape == (T, K) and gradient.shape == (T + 1, K) and to_mean.shape == (T,))
    need(correction.shape in ((T, 1), (T, K)))
    more = [array(a[name], 1, dtypes=FLOATS[1:2]) for name in vectors]
    need(all(x.shape == (K,) for x in more))
    return ema * correction, gradient, [before, after, to_mean, *more]


def expect_memory_read(a: Arguments, public: bool) -> Expected:
    kept, g, (before, after, to_mean, theta) = memory(a, "theta")
    mean = g[:-1] * to_mean[:, None]
    pairs = [(mean, mean), (kept, mean), (mean, after - before), (mean, theta - after)]
    pairs.append((0.5 * (mean - kept), theta - before))
    size = (0.5 * (np.abs(mean) + np.abs(kept))) * (np.abs(theta) + np.abs(before))
    sizes = [np.abs(x) * np.abs(y) for x, y in pairs[:4]] + [size]
    sums, sizes = (np.stack([x.sum(1) for x in xs]) for xs in ([x * y for x, y in pairs], sizes))
    return [(kept @ g.T, np.abs(kept) @ np.abs(g).T), (sums, sizes)]


def expect_memory_write(a: Arguments, public: bool) -> Expected:
    kept, _, (_, _, _, start, end) = memory(a, "theta_before", "theta_after")
    for name, size in (("seen", kept.shape[0]), ("left_out", kept.shape[1])):
        need((name == "left_out" and a[name] is None) or array(a[name], 1, dtypes=(torch.bool,)).shape == (size,))
    need(isinstance(a["decay"], (int, float)) and 0 <= a["decay"] <= 1)
    for name in ("ema", "before", "after"):
        places = sum(np.arange(n).reshape(-1, *[1] * (1 - i)) * s for i, (n, s) in
                     enumerate(zip(a[name].shape, a[name].stride(), strict=True)))  # fmt: skip
        need(len(np.unique(places)) == np.size(places))
    return [(kept @ (end - start), np.abs(kept) @ (np.abs(end) + np.abs(start)))]


def expect_sketch_all(a: Arguments, public: bool) -> Expected:
    need(all(isinstance(x, list) for x in a.values()) and a["values"])
    need(len(a["values"]) == len(a["left"]) == len(a["right"]))
    found, sizes = [], []
    for theta, left, right in zip(*a.values(), strict=True):
        need(isinstance(theta, Tensor))
        if left is None and right is None:
            sketch = array(theta, *range(9)).ravel()
            size, scale = np.abs(sketch), 1.0
        else:
            array(theta, *range(2, 9))
            ((sketch, size),) = expect_sketch_params({"theta": theta.flatten(1), "left": left, "right": right}, public)
            scale = max(1, np.prod([1 if x is None else x.shape[1] for x in (left, right)])) ** -0.5
        found.append(sketch.ravel() * scale)
        sizes.append(size.ravel() * scale)
    return [(np.concatenate(found), np.concatenate(sizes))]


def expect_sketch_params(a: Arguments, public: bool) -> Expected:
    theta = array(a["theta"], 2)
    ((found, size),) = of_parts(theta[None], np.abs(theta)[None], a, theta.shape)
    return [(found[0], size[0])]


def products(dy: np.ndarray, x: np.ndarray, segments: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """G_s [S, d_out, d_in] of rows [E, M, ·], and of their absolute values."""
    shape = dy.shape[-1], x.shape[-1]
    flat = [(dy[p].reshape(-1, shape[0]) if dy.shape[-1] else np.zeros((0, 0)),
             x[p].reshape(-1, shape[1]) if x.shape[-1] else np.zeros((0, 0))) for p in segments]  # fmt: skip
    if 0 in shape:
        return np.zeros((len(segments), *shape)), np.zeros((len(segments), *shape))
    return stack([u.T @ v for u, v in flat], *shape), stack([np.abs(u).T @ np.abs(v) for u, v in flat], *shape)


def expect_rows(a: Arguments) -> tuple[np.ndarray, np.ndarray]:
    dy, x = array(a["dy"], 2), array(a["x"], 2)
    same_dtype(a["dy"], a["x"])
    need(dy.shape[0] == x.shape[0])
    return products(dy, x, parts(None, a["offsets"], dy.shape[0]))


def expect_wgrad_gram(a: Arguments, public: bool) -> Expected:
    found, size = expect_rows(a)
    return [(found.sum(0), size.sum(0)), grams(found, size)]


def expect_ghost_gram(a: Arguments, public: bool) -> Expected:
    found, size = expect_rows(a)
    return [grams(found, size)]


def expect_wgrad_sketch(a: Arguments, public: bool) -> Expected:
    dy, x = array(a["dy"], 3), array(a["x"], 3)
    same_dtype(a["dy"], a["x"])
    need(dy.shape[:2] == x.shape[:2])
    found, size = products(dy, x, parts(a["order"], a["offsets"], dy.shape[0]))
    return [(found.sum(0), size.sum(0)), *of_parts(found, size, a, (dy.shape[2], x.shape[2]))]


def expect_wgrad_stats(a: Arguments, public: bool) -> Expected:
    need(a["strategy"] in (None, "fused", "ghost", "materialise"))
    dy, x = array(a["dy"], 3), array(a["x"], 3)
    sketched = expect_wgrad_sketch(a, public)
    found, size = products(dy, x, parts(a["order"], a["offsets"], dy.shape[0]))
    return [*sketched, grams(found, size)]


def expect_conv_sketch(a: Arguments, public: bool) -> Expected:
    for name in ("stride", "padding", "dilation"):
        need(isinstance(a[name], list) and all(type(n) is int for n in a[name]))
    need(type(a["groups"]) is int)
    dims = len(a["stride"])
    dy, x, weight = (array(a[name], dims + 2) for name in ("dy", "x", "weight"))
    same_dtype(a["dy"], a["x"], a["weight"])
    stride, padding, dilation, groups = a["stride"], a["padding"], a["dilation"], a["groups"]
    need(dims in (1, 2, 3) and len(padding) == dims and len(dilation) == dims and dy.shape[0] == x.shape[0])
    need(min(stride) > 0 and min(padding) >= 0 and min(dilation) > 0 and groups > 0)
    need(weight.shape[0] % groups == 0 and x.shape[1] == groups * weight.shape[1])
    kernel = weight.shape[2:]
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1
           for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)]  # fmt: skip
    need(min(kernel) > 0 and min(out) > 0 and dy.shape[1:] == (weight.shape[0], *out))
    padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    results = []
    for left, right in ((dy, padded), (np.abs(dy), np.abs(padded))):
        each = np.zeros((dy.shape[0], *weight.shape))
        for b, o, i, *k in np.ndindex(*each.shape):
            channel = o // (weight.shape[0] // groups) * weight.shape[1] + i
            starts = [place * d for place, d in zip(k, dilation, strict=True)]
            where = (slice(at, at + (n - 1) * s + 1, s) for at, n, s in zip(starts, out, stride, strict=True))
            each[(b, o, i, *k)] = (left[b, o] * right[(b, channel, *where)]).sum()
        results.append(each)
    results[1][np.isnan(results[1])] = np.inf  # NaN times the padding may be either: anything goes
    segments = parts(a["order"], a["offsets"], dy.shape[0])
    found, size = (stack([e[p].sum(0) for p in segments], *weight.shape) for e in results)
    matrix = (weight.shape[0], int(np.prod(weight.shape[1:])))
    return [(found.sum(0), size.sum(0)), *of_parts(found, size, a, matrix)]


def expect_embedding(a: Arguments) -> tuple[np.ndarray, np.ndarray]:
    dy, index = array(a["dy"], 3), array(a["index"], 2, dtypes=(torch.int64, torch.int32))
    V, padding = a["num_embeddings"], a["padding_idx"]
    need(type(V) is int and type(padding) is int and V >= 0 and -1 <= padding < max(V, 1))
    need(index.shape == dy.shape[:2] and (index.size == 0 or (index.min() >= 0 and index.max() < V)))
    segments = parts(a["order"], a["offsets"], dy.shape[0])
    if V > 1000:
        raise TooLarge
    found, size = (np.zeros((len(segments), V, dy.shape[2])) for _ in range(2))
    for s, p in enumerate(segments):
        for e in p:
            for m in range(dy.shape[1]):
                if index[e, m] != padding:
                    found[s, index[e, m]] += dy[e, m]
                    size[s, index[e, m]] += np.abs(dy[e, m])
    return found, size


def expect_embedding_stats(a: Arguments, public: bool) -> Expected:
    found, size = expect_embedding(a)
    return [(found.sum(0), size.sum(0)), *of_parts(found, size, a, found.shape[1:])]


def expect_embedding_gram(a: Arguments, public: bool) -> Expected:
    found, size = expect_embedding(a)
    return [grams(found, size)]


OPS: dict[str, tuple[Callable[[Draw], Arguments], Callable[[Arguments, bool], Expected]]] = {
    "conv_sketch": (draw_conv_sketch, expect_conv_sketch),
    "embedding_gram": (draw_embedding, expect_embedding_gram),
    "embedding_stats": (draw_embedding_stats, expect_embedding_stats),
    "ghost_gram": (draw_rows, expect_ghost_gram),
    "memory_read": (draw_memory_read, expect_memory_read),
    "memory_write": (draw_memory_write, expect_memory_write),
    "norm_segment_sum": (draw_norm_segment_sum, expect_norm_segment_sum),
    "segment_sum": (draw_segment_sum, expect_segment_sum),
    "sketch_all": (draw_sketch_all, expect_sketch_all),
    "sketch_params": (draw_sketch_params, expect_sketch_params),
    "sum_gram": (draw_sum_gram, expect_sum_gram),
    "wgrad_gram": (draw_rows, expect_wgrad_gram),
    "wgrad_sketch": (draw_wgrad_sketch, expect_wgrad_sketch),
    "wgrad_stats": (draw_wgrad_stats, expect_wgrad_stats),
}


# ------------------------------------------------------------------------------------------ a call


def call(name: str, a: Arguments, public: bool) -> list[Tensor]:
    out = getattr(taskgrad.ops, name)(**a) if public else getattr(torch.ops.taskgrad, name)(*a.values())
    return [out] if isinstance(out, Tensor) else list(out)


def compare(name: str, out: list[Tensor], want: Expected, terms: int, dtype: torch.dtype) -> str | None:
    """What is wrong with the results; ``terms``: sums have at most as many."""
    if len(out) != len(want):
        return f"{len(out)} results"
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    for i, (got, (right, size)) in enumerate(zip(out, want, strict=True)):
        if tuple(got.shape) != right.shape:
            return f"result {i} has shape {tuple(got.shape)}, not {right.shape}"
        unrounded = stat if got.dtype == torch.float64 and not name.startswith("memory_") else got.dtype
        eps = max(torch.finfo(unrounded).eps, torch.finfo(got.dtype).eps)
        values = got.detach().double().numpy()
        right, values = (np.where(np.isposinf(size), 0, x) for x in (right, values))
        finite = np.isfinite(right)
        if np.isfinite(values[~finite]).any():
            return f"result {i} is finite where {right[~finite][:3]} is right"
        if name == "conv_sketch":
            eps = torch.finfo(dtype).eps  # torch rounds every task's gradient to it
        bound = eps * (8 + terms) * size[finite] + 1e-30
        if dtype == torch.float16 or got.dtype == torch.float16:
            bound = bound + 1e-7 * (8 + terms)  # below its normal numbers
        wrong = ~(np.abs(values[finite] - right[finite]) <= bound)
        if wrong.any():
            return f"result {i}: {values[finite][wrong][:3]}, not {right[finite][wrong][:3]}"
    return None


def one(name: str, seed: int, public: bool) -> tuple[str, str | None]:
    """ "raised" or "agreed", and what is wrong."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    draw = Draw(rng)
    make, expect = OPS[name]
    arguments = make(draw)
    for key, value in arguments.items():
        if isinstance(value, Tensor) and rng.random() < 0.4:
            arguments[key] = restride(value, rng)
    damaged = rng.random() < 0.6
    for _ in range(rng.randint(1, 2) if damaged else 0):
        key = rng.choice(list(arguments))
        try:
            arguments[key] = damage(key, arguments[key], arguments, rng)
        except (RuntimeError, TypeError, IndexError, NotImplementedError, AttributeError):
            continue  # torch has no such tensor
    want: Expected | None = None
    too_large = False
    try:
        want = expect(arguments, public)
    except (TooLarge, MemoryError):
        too_large = True
    except (Malformed, AttributeError, TypeError):
        pass
    try:
        out = call(name, arguments, public)
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        if not str(error).strip() and not isinstance(error, MemoryError):
            return "raised", f"{type(error).__name__} without a message"
        return "raised", None if damaged or want is None else f"raised {type(error).__name__}: {error}"
    if all(x.device.type == "meta" for x in out) and not public:
        first = next(iter(arguments.values()))
        first = first[0] if isinstance(first, list) else first
        return "agreed", None if first.device.type == "meta" else "a result without values"
    if too_large:
        return "agreed", None
    if want is None:
        return "agreed", f"no error for {describe(arguments)}"
    tensors = [y for x in arguments.values() for y in (x if isinstance(x, list) else [x]) if isinstance(y, Tensor)]
    wrong = compare(name, out, want, max((x.numel() for x in tensors), default=0), tensors[0].dtype)
    return "agreed", wrong and f"{wrong} for {describe(arguments)}"


def describe(arguments: Arguments) -> str:
    def of(x: Any) -> str:
        if not isinstance(x, Tensor):
            return repr(x)[:80]
        strides = x.stride() if x.layout == torch.strided else x.layout
        values = x.tolist() if not x.is_floating_point() and x.numel() < 20 and x.device.type == "cpu" else ""
        return f"{x.dtype} {tuple(x.shape)} {strides} {x.device} {values}"

    return ", ".join(f"{name}: {of(x)}" for name, x in arguments.items())


def main() -> None:
    count, seed, progress = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    names = sys.argv[4:] or list(OPS)
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    file = os.open(progress, os.O_WRONLY | os.O_CREAT)
    for name in names:
        found = {"op": name, "raised": 0, "agreed": 0, "wrong": 0, "first": []}
        for i, public in itertools.product(range(count), (True, False)):
            where = f"seed {seed + i} {'taskgrad.ops' if public else 'torch.ops'}"
            os.pwrite(file, f"{name} {where}\n".ljust(80).encode(), 0)
            try:
                kind, wrong = one(name, seed + i, public)
            except Exception as error:  # an exception of a type that none of the ops may raise, or of this test
                kind, wrong = "raised", f"{type(error).__name__}: {error}"
            found[kind] += 1
            if wrong is not None:
                found["wrong"] += 1
                if len(found["first"]) < 5:
                    found["first"].append(f"{where}: {wrong}")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
