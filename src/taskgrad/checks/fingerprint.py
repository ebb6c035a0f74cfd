"""Which rows of a layer's input are the same in two passes, told from a number per row.

A row (all of an example's numbers in one call, or all of a token's) is summed with random weights, where it lies, in
one pass over it; only the sums are kept. Two rows that differ by d, relative to their size, have sums that differ by
about d, whatever the direction, so a tolerance on the sums is one on the rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..capture.accumulation import in_backward
from ..capture.site import Owner, Site
from .traced import traced

FLOAT32 = 3e-5  # what rounding does to a row over a deep model whose sums over the batch change their order
COARSER = 8  # units of rounding of coarser types; a layer's output differs by one


_extra = threading.local()  # the trace of the extra pass that runs in a thread


@contextmanager
def extra_pass(trace: Trace) -> Iterator[None]:
    """What runs inside is a pass that training did not ask for: no other trace is to hear of it."""
    before = getattr(_extra, "trace", None)
    _extra.trace = trace
    try:
        yield
    finally:
        if before is None:
            del _extra.trace
        else:
            _extra.trace = before


class Trace:
    """Observes the sites of ``owner`` during one forward pass.

    Attributes:
        rows: per (site, number of the call) the sums and the norms of the rows of the layer's first tensor, float64,
            [B], or [B, S] with ids per token.
        rounding: how far, relative to its norm, a row may go by rounding alone.
        error: why some rows could not be summed.
    """

    def __init__(self, owner: Owner, shape: tuple[int, ...]) -> None:
        self.owner, self.shape = owner, shape
        self.rows: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.rounding = FLOAT32
        self.error: str | None = None
        self._calls: dict[str, int] = {}

    def __call__(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward() or traced():  # a recomputation: the forward has been seen
            return
        if getattr(_extra, "trace", self) is not self:  # a pass of another tracker's check on the same model
            return
        call = self._calls[site.name] = self._calls.get(site.name, -1) + 1
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if x is None or self.owner.regrouped or x.layout is not torch.strided or x.is_nested or x.is_complex():
            return
        if x.shape[: len(self.shape)] == self.shape and x.numel():
            try:
                self.rounding = max(self.rounding, _rounding(x))
                self.rows[site.name, call] = row_sums(x, len(self.shape))
            except Exception as error:  # no room, or a kind of tensor that has no such op: the forward goes on
                self.error = f"the rows of {site.place} cannot be summed: {type(error).__name__}: {error}"


def _rounding(x: Tensor) -> float:
    kind = x.device.type
    dtypes = [x.dtype] if x.is_floating_point() else []
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    if kind == "cuda":
        eps = max(eps, 2**-10)  # TF32, in convolutions by default
    return COARSER * eps if eps > 1e-6 else FLOAT32


def row_sums(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Weighted sums of the rows of ``x`` [*lead, ...], ``lead`` its first ``dims`` dimensions, and their norms, both
    float64 [*lead]."""
    x = x.detach()
    x = x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x if x.is_floating_point() else x.double()
    width = x.shape[-1] if x.dim() > dims else 1
    rows = x.reshape(*x.shape[:dims], -1, width)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        # along the last dimension first: few terms in float32, and nothing of the size of x in float64
        inner = (rows @ _weights(width, x.dtype, x.device)).double().nan_to_num()
        sums = inner @ _weights(rows.shape[-2], torch.float64, x.device)
        norms = torch.linalg.vector_norm(rows, dim=(-2, -1)).double().nan_to_num()
    return sums, norms


def merge(sums: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """From rows of tokens [B, S] to rows of examples [B]."""
    if sums.dim() == 1:
        return sums, norms
    return sums @ _weights(sums.shape[1], torch.float64, sums.device), norms.norm(dim=1)


@lru_cache(maxsize=256)
def _weights(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(size)
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
