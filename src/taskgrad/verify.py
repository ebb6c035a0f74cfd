"""Does row i of every layer belong to example i? Asked by perturbation, before a number is believed.

Shapes cannot tell: ``pe(arange(S))`` looks like a batch where S = B, so do sequence-first activations and permuted
windows. So the model runs without gradients on the batch and again with half of the examples replaced by others, for
as many halves as it takes to tell every example from every other. Rows of other examples that change show that the
rows are not the batch's, or that examples mix. A layer whose input does not depend on the examples at all (an
embedding of positions) is asked the other way round: its output is disturbed in the rows of half of the examples, and
nothing of the others may change further on. With an id per token, the rows of tokens must change with their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .capture.site import Owner, Site
from .isolation import undisturbed
from .rows import Rows

MIXED = "rows of other examples change with an example: its rows are not the batch's, or examples mix"
SHIFTED = "a token's row does not change with the token: its rows are not in the order of the ids"
CONSTANT = "its rows do not depend on the example, and its output does not reach that example alone"

Trace = dict[tuple[str, int], tuple[Tensor, Tensor]]
Disturb = Callable[[Site, Tensor], Tensor]


class FirstCall:
    """The forward pre-hook of the tracked model. Copies and pickles of the model get one that does nothing."""

    def __init__(self, verify: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None) -> None:
        self.verify = verify

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.verify is not None:
            self.verify(args, kwargs)

    def __reduce__(self) -> tuple[type[FirstCall], tuple[()]]:
        return FirstCall, ()


def failing_sites(
    model: nn.Module, owner: Owner, rows: Rows, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str] | None:
    """Names of the sites whose rows are not the batch's, with the reason; ``None`` if this batch cannot tell.

    It cannot with one example, or where all examples are alike. RNG and buffers are restored; BatchNorm runs with its
    running statistics meanwhile. Passes without gradients: 1 + log2 B, and log2 B for every layer that has to be asked
    the other way round; log2 S more with an id per token.
    """

    def trace(a: Any, k: Any, dims: int, disturb: Disturb | None = None) -> Trace:
        # copies: a model may write into its input
        a, k = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (a, dict(k)))
        with undisturbed(model):
            return _trace(model, owner, rows.shape[:dims], a, k, disturb)

    batch = rows.shape[0]
    base = trace(args, kwargs, 1)
    sites = {name for name, _ in base if name}
    failing: dict[str, str] = {}
    moved: set[str] = set()
    told = False
    for half in _halves(batch):
        replaced = _replace(args, kwargs, rows.shape[:1], half)
        if replaced is None:
            continue
        told = True
        for key, changed in _changes(base, trace(*replaced, 1)).items():
            if bool((changed & ~half).any()):
                failing.setdefault(key[0], MIXED)
            if bool(changed.any()):
                moved.add(key[0])
    if not told:
        return None
    for name in sites - moved:
        for half in _halves(batch):
            changes = _changes(base, trace(args, kwargs, 1, _shake(name, half)))
            found = [c for (site, _), c in changes.items() if site != name]
            if not any(bool(c.any()) for c in found) or any(bool((c & ~half).any()) for c in found):
                failing.setdefault(name, CONSTANT)
    if len(rows.shape) == 2:
        base = trace(args, kwargs, 2)
        for half in _halves(rows.shape[1]):
            replaced = _replace(args, kwargs, rows.shape, half)
            if replaced is None:
                continue
            for key, changed in _changes(base, trace(*replaced, 2)).items():
                if bool(changed.any()) and not bool((changed & half).any()):
                    failing.setdefault(key[0], SHIFTED)
    failing.pop("", None)
    return failing


def _halves(n: int) -> list[Tensor]:
    """Masks [n] of the positions with bit k set: only the identity maps every one of them into itself."""
    return [(torch.arange(n) >> bit) & 1 == 1 for bit in range((n - 1).bit_length())]


def _replace(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, ...], half: Tensor
) -> tuple[Any, Any] | None:
    """The inputs with the examples (tokens, for a shape of two dimensions) in ``half`` replaced by others of the batch
    that differ, in all tensors of the batch alike; ``None`` where there are none."""
    dim, n = len(shape) - 1, len(half)

    def belongs(t: Any) -> bool:
        return isinstance(t, Tensor) and t.shape[: dim + 1] == shape

    tensors = [t for t in tree_flatten((args, kwargs))[0] if belongs(t)]
    for shift in range(1, n):
        source = torch.where(half, (torch.arange(n) + shift) % n, torch.arange(n))
        if any(not torch.equal(t.index_select(dim, source.to(t.device)), t) for t in tensors):
            new: tuple[Any, Any] = tree_map(
                lambda t, source=source: t.index_select(dim, source.to(t.device)) if belongs(t) else t,
                (args, dict(kwargs)),
            )
            return new
    return None


def _trace(
    model: nn.Module, owner: Owner, shape: tuple[int, ...], args: Any, kwargs: Any, disturb: Disturb | None
) -> Trace:
    """Fingerprint of every example, or of every token where ``shape`` is (B, S), at the input of every call of every
    site and at the model's outputs (site "")."""
    trace: Trace = {}
    calls: dict[str, int] = {}

    def observe(site: Site, a: tuple[Any, ...], k: dict[str, Any]) -> Tensor:
        n = calls[site.name] = calls.get(site.name, -1) + 1
        x = next((t for t in (*a, *k.values()) if isinstance(t, Tensor)), None)
        if x is not None and x.dim() and not owner.regrouped:
            if x.shape[: len(shape)] == shape:
                trace[site.name, n] = _fingerprint(x, len(shape))
            elif x.shape[0] == 1 and len(shape) == 1:
                trace[site.name, n] = _fingerprint(x.expand(*shape, *x.shape[1:]), 1)
        out = site.plain(*a, **k)
        return out if disturb is None else disturb(site, out)

    owner.observer = observe
    try:
        out = model(*args, **kwargs)
    finally:
        owner.observer = None
    # a mapping need not be a pytree: transformers' ModelOutput
    leaves = tree_flatten(list(out.values()) if isinstance(out, Mapping) else out)[0]
    for n, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.shape[: len(shape)] == shape:
            trace["", n] = _fingerprint(leaf, len(shape))
    return trace


def _fingerprint(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """A number for every example (token), [*x.shape[:dims]], and the scale of its rounding errors."""
    flat = x.detach().double().nan_to_num().cpu().reshape(*x.shape[:dims], -1)
    weights = torch.linspace(0.5, 1.5, flat.shape[-1], dtype=torch.float64).sin()
    return flat @ weights, flat.abs() @ weights.abs()


def _changes(base: Trace, other: Trace) -> dict[tuple[str, int], Tensor]:
    """For every call of ``base``, which examples [B] (positions [S], where traced by token) differ; all, where the
    call did not take place."""
    found = {}
    for key, (a, scale) in base.items():
        if key in other and other[key][0].shape == a.shape:
            b, b_scale = other[key]
            changed = (a - b).abs() > 1e-6 * torch.maximum(scale, b_scale)
        else:
            changed = torch.ones_like(a, dtype=torch.bool)
        found[key] = changed if changed.dim() == 1 else changed.any(0)
    return found


def _shake(name: str, half: Tensor) -> Disturb:
    def disturb(site: Site, out: Tensor) -> Tensor:
        if site.name != name:
            return out
        wide = out.expand(len(half), *out.shape[1:]) if out.shape[0] == 1 else out
        if wide.shape[0] != len(half):
            return out
        noise = torch.zeros_like(wide)
        noise[half.to(out.device)] = 1 + out.abs().max()
        return wide + noise

    return disturb
