"""What the ops on the memory are called with in their tests."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_arguments(
    T: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    gradient: torch.dtype = torch.float32,
    uneven: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The arguments of ``memory_read``, contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "ema": normal(T, K, dtype=dtype),
        "before": normal(T, K),
        "after": normal(T, K),
        "gradient": normal(T + 1, K, dtype=gradient),
        "theta": normal(K),
        "to_mean": normal(T).abs(),
        "correction": normal(T, K if uneven else 1).abs(),
    }


def write_arguments(
    a: dict[str, Tensor], left_out: bool = False, decay: float = 0.9
) -> dict[str, Tensor | float | None]:
    """The arguments of ``memory_write`` from those of ``memory_read``; every other task is seen, of every three columns
    one is left out."""
    T, K = a["ema"].shape
    return {
        **{name: a[name] for name in ("ema", "before", "after", "gradient", "to_mean")},
        "seen": torch.arange(T) % 2 == 0,
        "left_out": torch.arange(K) % 3 == 1 if left_out else None,
        "theta_before": a["theta"],
        "theta_after": a["theta"].flip(0) + 1,
        "correction": a["correction"],
        "decay": decay,
    }


def restrided(x: Tensor, kind: str) -> Tensor:
    """The same values: "columns" apart, "transposed", or "rows" apart with NaN between them."""
    if x.dim() == 1 or kind == "columns":
        room = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        return room[..., ::2].copy_(x)
    if kind == "transposed":
        return x.mT.contiguous().mT
    room = torch.full((2 * x.shape[0], x.shape[1] + 7), torch.nan, dtype=x.dtype)
    return room[::2, : x.shape[1]].copy_(x)


STRIDES = ("columns", "transposed", "rows")
