"""Does row i of every layer belong to example i? Asked by perturbation, before a number is believed.

Shapes cannot tell: ``pe(arange(S))`` looks like a batch where S = B, so do sequence-first activations and windows that were
permuted. So the model runs without gradients on the batch and once more with every second example replaced by its
neighbour. Rows of other examples that change show that the rows are not the batch's, or that examples mix. A layer
whose input does not depend on the examples at all (an embedding of positions) is asked the other way round: its
output is disturbed in the rows of some examples, and nothing of the other examples may change further on.
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
CONSTANT = "its rows do not depend on the example, and its output does not reach that example alone"

Trace = dict[tuple[str, int], tuple[Tensor, Tensor]]
Disturb = Callable[[Site, int, Tensor], Tensor]


def failing_sites(
    model: nn.Module, owner: Owner, rows: Rows, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str] | None:
    """Names of the sites whose rows are not the batch's, with the reason; ``None`` if this batch cannot tell.

    It cannot with one example, or where all examples are alike. RNG, buffers and training mode are restored;
    BatchNorm runs with its running statistics meanwhile (in training mode it mixes examples by design).
    """
    batch = rows.shape[0]
    replaced = _replace_half(args, kwargs, batch)
    if replaced is None:
        return None
    half = torch.arange(batch) % 2 == 1

    def trace(a: Any, k: Any, disturb: Disturb | None = None) -> Trace:
        with undisturbed(model):
            return _trace(model, owner, batch, a, k, disturb)

    base = trace(args, kwargs)
    other = trace(*replaced)
    failing: dict[str, str] = {}
    doubtful: list[str] = []
    for site in {name for name, _ in base if name}:
        calls = [key for key in base if key[0] == site]
        changed = [_changed(base, other, key) for key in calls]
        if any(bool((c & ~half).any()) for c in changed):
            failing[site] = MIXED
        elif not all(bool(c.any()) for c in changed):
            doubtful.append(site)
    for name in doubtful:
        shaken = trace(args, kwargs, _shake(name, half))
        changed = [_changed(base, shaken, key) for key in base if key[0] != name]
        reached = any(bool(c.any()) for c in changed)
        if not reached or any(bool((c & ~half).any()) for c in changed):
            failing[name] = CONSTANT
    return failing


def _replace_half(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> tuple[Any, Any] | None:
    """Every second example replaced by the next one that differs, in all tensors of the batch alike."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.dim() and t.shape[0] == batch]
    for shift in range(1, batch):
        source = torch.arange(batch)
        source[1::2] = (source[1::2] + shift) % batch
        if any(not torch.equal(t[source.to(t.device)], t) for t in tensors):

            def swap(t: Any, source: Tensor = source) -> Any:
                if isinstance(t, Tensor) and t.dim() and t.shape[0] == batch:
                    return t[source.to(t.device)]
                return t

            new: tuple[Any, Any] = tree_map(swap, (args, dict(kwargs)))
            return new
    return None


def _trace(model: nn.Module, owner: Owner, batch: int, args: Any, kwargs: Any, disturb: Disturb | None) -> Trace:
    """Fingerprint of every example, at the input of every call of every site, and at the model's outputs (site "")."""
    trace: Trace = {}
    calls: dict[str, int] = {}

    def observe(site: Site, a: tuple[Any, ...], k: dict[str, Any]) -> Tensor:
        n = calls[site.name] = calls.get(site.name, -1) + 1
        x = next((t for t in (*a, *k.values()) if isinstance(t, Tensor)), None)
        if x is not None and x.dim() and not owner.regrouped:
            if x.shape[0] == batch:
                trace[site.name, n] = _fingerprint(x)
            elif x.shape[0] == 1:
                trace[site.name, n] = _fingerprint(x.expand(batch, *x.shape[1:]))
        out = site.plain(*a, **k)
        return out if disturb is None else disturb(site, batch, out)

    owner.observer = observe
    try:
        out = model(*args, **kwargs)
    finally:
        owner.observer = None
    # a mapping need not be a pytree: transformers' ModelOutput
    leaves = tree_flatten(list(out.values()) if isinstance(out, Mapping) else out)[0]
    for n, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
            trace["", n] = _fingerprint(leaf)
    return trace


def _fingerprint(x: Tensor) -> tuple[Tensor, Tensor]:
    """A number for every example [B], and the scale of its rounding errors."""
    flat = x.detach().double().nan_to_num().flatten(1).cpu() if x.dim() > 1 else x.detach().double().cpu()[:, None]
    weights = torch.linspace(0.5, 1.5, flat.shape[1], dtype=torch.float64).sin()
    return flat @ weights, flat.abs() @ weights.abs()


def _changed(base: Trace, other: Trace, key: tuple[str, int]) -> Tensor:
    """Which examples differ between two traces, [B] bool; all, where the call did not take place."""
    (a, scale) = base[key]
    if key not in other or other[key][0].shape != a.shape:
        return torch.ones_like(a, dtype=torch.bool)
    return (a - other[key][0]).abs() > 1e-6 * torch.maximum(scale, other[key][1])


def _shake(name: str, half: Tensor) -> Disturb:
    def disturb(site: Site, batch: int, out: Tensor) -> Tensor:
        if site.name != name:
            return out
        wide = out.expand(batch, *out.shape[1:]) if out.shape[0] == 1 else out
        if wide.shape[0] != batch:
            return out
        noise = torch.zeros_like(wide)
        noise[half.to(out.device)] = 1 + out.abs().max()
        return wide + noise

    return disturb
