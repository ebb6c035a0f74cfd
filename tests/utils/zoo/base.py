"""What the zoo says about an architecture, and how a loss per row is read off its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

BATCH = 6
SEQ = 5
VOCAB = 11
WIDTH = 8


@dataclass(frozen=True)
class Architecture:
    """One model family. Sizes are chosen so that no feature size equals ``BATCH``.

    build      a fresh model (float32, training mode)
    inputs     (batch size, dtype) -> (args, kwargs)
    readout    model output -> tensor with the batch first, and tokens second where ``tokens`` is set
    tokens     the output has a row per token, ids of shape (B, S) make sense
    mixes      examples see each other: only the oracle of weight copies applies
    token_wise tokens do not see each other either
    unattributed   name pattern -> why the tracker cannot attribute it
    unattributed_tokens   the same, with ids per token only
    either     name patterns that a tracker may attribute (rightly) or not
    tolerance  normwise, in float64; larger where the model itself computes in float32
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.dtype], Inputs]
    readout: Callable[[Any], Tensor] = lambda out: out
    tokens: bool = False
    mixes: bool = False
    token_wise: bool = False
    unattributed: Mapping[str, str] = field(default_factory=dict)
    unattributed_tokens: Mapping[str, str] = field(default_factory=dict)
    either: tuple[str, ...] = ()
    tolerance: float = 1e-10
    compiles: bool = True

    def expected(self, model: nn.Module, kind: str) -> tuple[set[str], set[str]]:
        """Names that must be attributed and names that must not be, for ids per "example" or per "token"."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        patterns = {**self.unattributed, **(self.unattributed_tokens if kind == "token" else {})}
        must_not = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
        open_names = {name for name in names if any(fnmatchcase(name, pattern) for pattern in self.either)}
        return set(names) - must_not - open_names, must_not

    def row_loss(self, kind: str) -> Callable[[Any], Tensor]:
        """Output -> loss per example [B] (kind "example") or per token [B, S] (kind "token")."""
        return lambda out: squared_error(self.readout(out), 2 if kind == "token" else 1)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("example", "token") if self.tokens else ("example",)


def squared_error(out: Tensor, row_dims: int) -> Tensor:
    """Mean squared distance to a fixed pseudo-random target, per row of the first ``row_dims`` dimensions."""
    index = torch.arange(out.numel(), device=out.device, dtype=torch.float64)
    target = torch.sin(1.7 * index + 0.3).reshape(out.shape).to(out.dtype)
    rows = (out - target).square()
    return rows.flatten(row_dims).mean(row_dims) if rows.ndim > row_dims else rows


def floats(*shape: int) -> Callable[[int, torch.dtype], Inputs]:
    """One positional input of normal numbers [B, *shape]."""
    return lambda batch, dtype: ((torch.randn(batch, *shape, dtype=dtype),), {})


def tokens(seq: int = SEQ) -> Callable[[int, torch.dtype], Inputs]:
    """One positional input of token indices [B, S]."""
    return lambda batch, dtype: ((torch.randint(1, VOCAB, (batch, seq)),), {})
