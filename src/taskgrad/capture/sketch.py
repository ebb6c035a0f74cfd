"""Linear sketches of parameters and their gradients.

One fixed linear map per parameter. Because it is linear it commutes with everything training does to gradients: sums
over uses of a shared weight, over micro-batches and ranks, averages over time, differences of parameters.

A matrix G of shape [d0, d1] is sketched on both sides, S = Lᵀ G R / sqrt(r0 r1) with L [d0, r0] and R [d1, r1]. For a
linear layer G = dYᵀ X, hence Lᵀ G R = (dY L)ᵀ (X R): the gradient itself is never formed (LoGra, arXiv 2405.13954).
L and R are subsampled randomised Hadamard matrices, entries ±1: ``E[L Lᵀ] = r0 I`` gives ``E⟨S(G), S(H)⟩ = ⟨G, H⟩``,
±1 is exact in every floating dtype, and the same seed gives the same map on every machine. A vector is sketched by a
balanced count sketch: entries get a random sign and are summed in ``k`` buckets of equal size.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SketchMap:
    """The linear map of one parameter, ``shape`` to ``dim`` numbers.

    A matrix (any parameter of two or more dimensions, seen as [d0, d1] with d0 its first dimension) has ``left`` [d0,
    r0] and ``right`` [d1, r1] of ±1. A vector has the buckets as ``left``, int64 [dim, m] positions with the value d0
    for padding, and its signs as ``right`` [d0]. ``None`` stands for the identity.
    """

    shape: tuple[int, ...]
    dim: int
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def exact(self) -> bool:
        return self.left is None and self.right is None

    def to(self, device: torch.device) -> SketchMap:
        left, right = (None if t is None else t.to(device) for t in (self.left, self.right))
        return SketchMap(self.shape, self.dim, left, right)

    def __call__(self, values: Tensor) -> Tensor:
        """Sketch ``values`` [n, *shape] to [n, dim], in the dtype of ``values``."""
        return project(values, self.left, self.right)


def project(values: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The sketch of every entry of ``values`` [n, *shape] under the map (left, right): [n, dim]."""
    n = values.shape[0]
    if left is None and right is None:
        return values.reshape(n, -1)
    if left is not None and right is not None and left.dtype == torch.int64:
        padded = torch.nn.functional.pad(values.reshape(n, -1) * right.to(values.dtype), (0, 1))
        return padded[:, left].sum(-1)
    matrix = values.reshape(n, values.shape[1], -1)
    if left is not None:
        matrix = left.to(values.dtype).mT @ matrix
    if right is not None:
        matrix = matrix @ right.to(values.dtype)
    return scaled(matrix, left, right)


def scaled(stats: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``leftᵀ G right`` [n, r0, r1] divided by sqrt(r0 r1), the sides that are the identity left out: [n, r0 r1]."""
    rank = (1 if left is None else left.shape[1]) * (1 if right is None else right.shape[1])
    flat = stats.reshape(stats.shape[0], -1)
    return flat if rank == 1 else flat * rank**-0.5


def sketch_map(shape: torch.Size | tuple[int, ...], sketch_dim: int | None, seed: int, name: str) -> SketchMap:
    """The map of parameter ``name``: at most ``sketch_dim`` numbers, exact where they suffice (or ``None``: always)."""
    shape = tuple(shape)
    numel = math.prod(shape)
    if sketch_dim is None or numel <= sketch_dim:
        return SketchMap(shape, numel)
    generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if len(shape) == 1:
        width = -(-numel // sketch_dim)
        order = torch.randperm(sketch_dim * width, generator=generator, device="cpu")
        buckets = order.clamp_(max=numel).view(sketch_dim, width)
        return SketchMap(shape, sketch_dim, buckets, _random_signs(numel, generator))
    d0, d1 = shape[0], numel // shape[0]
    r0 = min(d0, max(math.isqrt(sketch_dim), sketch_dim // d1))
    r1 = min(d1, sketch_dim // r0)
    left = _hadamard(d0, r0, generator) if r0 < d0 else None
    right = _hadamard(d1, r1, generator) if r1 < d1 else None
    return SketchMap(shape, r0 * r1, left, right)


def _random_signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator, device="cpu").mul_(2).sub_(1).float()


def _hadamard(d: int, r: int, generator: torch.Generator) -> Tensor:
    """r columns, drawn without replacement, of a Hadamard matrix with d randomly signed rows: [d, r], ±1."""
    bits = max(1, (d - 1).bit_length())
    columns = torch.randperm(1 << bits, generator=generator, device="cpu")[:r]
    both = torch.arange(d, device="cpu")[:, None] & columns[None, :]
    parity = torch.zeros_like(both)
    for bit in range(bits):
        parity ^= (both >> bit) & 1
    return (1 - 2 * parity).float() * _random_signs(d, generator)[:, None]
