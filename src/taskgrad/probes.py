"""The tracked parameters of a model: which are captured, where their sketches lie, and which are left out, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .capture import Probe, find_capture, register_transformers
from .capture.site import Owner, Site, replaced_forward
from .coverage import Coverage
from .ops import sketch_params
from .sketch import scaled, sketch_map

NOT_CALLED = "no tracked forward has called its module (or only through a function that takes the weight itself)"
ADDED = "came to the model after tracking began; tracker.remove() and track() again"
REPLACED = "another tensor took its place in the module; tracker.remove() and track() again"
LEFT_OUT = "left out by include"


class Probes:
    """One probe per trainable parameter of a known layer kind; their sketches side by side are K columns."""

    def __init__(
        self,
        model: nn.Module,
        owner: Owner,
        num_tasks: int,
        sketch_dim: int | None,
        seed: int,
        include: Callable[[str, nn.Module], bool] | None,
        grams: bool = False,
    ) -> None:
        register_transformers()
        self.model, self.num_tasks, self.sketch_dim, self.seed = model, num_tasks, sketch_dim, seed
        self.grams = grams
        self.params = dict(model.named_parameters())
        self.names = {id(p): name for name, p in self.params.items()}
        self.reasons: dict[str, str] = {}
        self.probes: dict[str, Probe] = {}
        self.sites: list[Site] = []
        self.width = 0
        self._warned: set[str] = set()
        claimed: set[str] = set()
        strangers: dict[str, str] = {}
        for path, module in model.named_modules():
            capture = find_capture(module)
            reason = None if capture is None else _refusal(module, path, include) or capture.refuse(module)
            if capture is not None and reason is None:
                self.sites.append(Site(path, module, capture, owner))
            for attr, param in module._parameters.items():
                if param is None:
                    continue
                name = self.names[id(param)]
                place = path or "the model itself"
                if reason is not None:
                    self.reasons.setdefault(name, f"{place}: {reason}")
                elif capture is not None and attr in capture.params:
                    claimed.add(name)
                else:
                    rule = f"{place}: no rule for {type(module).__name__}.{attr}; taskgrad.register_capture adds one"
                    strangers.setdefault(name, rule)
        # a parameter may also hang on a container that never uses it; the sum guard finds out if it does
        self.reasons.update({n: r for n, r in strangers.items() if n not in claimed and n not in self.reasons})
        self._flags: tuple[bool, ...] = ()
        self._stale = True
        self.refresh(between_steps=True)

    def refresh(self, between_steps: bool) -> bool:
        """Follow parameters that were frozen, thawed or moved; True if columns were added.

        What was dropped is taken off its modules only between steps: activation checkpointing must find at the
        recomputation what it saw in the forward.
        """
        flags = tuple(p.requires_grad for p in self.params.values())
        width = self.width
        if flags != self._flags or (self._stale and between_steps):
            self._flags, self._stale = flags, False
            for site in self.sites:
                site.probes = {
                    attr: self._probe(site.module._parameters[attr])
                    for attr in site.capture.params
                    if self._usable(site.module._parameters.get(attr))
                }
        for site in self.sites:
            for attr, probe in site.probes.items():
                if site.module._parameters.get(attr) is not probe.param:
                    self.drop(probe.name, REPLACED)
        for probe in self.probes.values():
            probe.follow()
        return self.width > width

    def _usable(self, param: nn.Parameter | None) -> bool:
        if param is None or id(param) not in self.names:
            return False
        return param.requires_grad and self.names[id(param)] not in self.reasons

    def _probe(self, param: nn.Parameter | None) -> Probe:
        assert param is not None
        name = self.names[id(param)]
        if name not in self.probes:
            sketch = sketch_map(param.shape, self.sketch_dim, self.seed, name).to(param.device)
            self.probes[name] = Probe(name, param, sketch, self.num_tasks, self.width, self.grams)
            self.width += sketch.dim
        return self.probes[name]

    def live(self) -> list[Probe]:
        """The probes that count: not left out, and not frozen."""
        return [p for p in self.probes.values() if p.name not in self.reasons and p.param.requires_grad]

    def drop(self, name: str, reason: str) -> None:
        """Leave parameter ``name`` out of every number from now on, and say so once."""
        if name not in self.reasons:
            self.reasons[name] = reason
            self._stale = True
            self._warn({name: reason})

    def warn_of_gaps(self) -> None:
        """Name, after the first step, the trainable parameters that no number covers and that ``include`` did not
        leave out."""
        missing = self.coverage(None).unattributed
        self._warn({n: r for n, r in missing.items() if n not in self._warned and not r.endswith(LEFT_OUT)})

    def _warn(self, missing: dict[str, str]) -> None:
        self._warned.update(missing)
        if missing:
            names = "; ".join(f"{n} ({r})" for n, r in missing.items())
            warnings.warn(f"taskgrad: left out of every number, see tracker.coverage(): {names}", stacklevel=2)

    def collect_reasons(self) -> list[Probe]:
        """Drop the parameters of modules that saw rows which are not the batch's; the newly dropped."""
        dropped = []
        for site in self.sites:
            if site.reason is not None:
                for probe in site.probes.values():
                    if probe.name not in self.reasons:
                        self.drop(probe.name, f"{site.name}: {site.reason}")
                        dropped.append(probe)
        return dropped

    @property
    def device(self) -> torch.device:
        return next(iter(self.probes.values())).tap.device

    def take(self) -> Tensor:
        """The step's statistics G [T + 1, K], zero where there were none; the taps are emptied."""
        dtype = torch.float64 if any(p.tap.dtype == torch.float64 for p in self.probes.values()) else torch.float32
        out = torch.zeros(self.num_tasks + 1, self.width, dtype=dtype, device=self.device)
        for probe in self.probes.values():
            if probe.tap.grad is not None:
                probe.seen = True
                if probe.name not in self.reasons:
                    out[:, probe.columns] = probe.tap.grad[:, : probe.sketch.dim]
                probe.tap.grad = None
        return out

    @property
    def dirty(self) -> bool:
        """Whether a backward pass, even one that failed, has left statistics."""
        return any(p.tap.grad is not None for p in self.probes.values())

    def discard(self) -> None:
        """Forget what the taps hold."""
        for probe in self.probes.values():
            probe.tap.grad = None

    def scale_taps(self, factor: Tensor) -> None:
        """Multiply what the taps hold."""
        for probe in self.probes.values():
            if probe.tap.grad is not None:
                probe.tap.grad.mul_(factor)

    def theta(self) -> Tensor:
        """Sketch of the parameters themselves, [K] in float64: differences of it are sketches of updates."""
        out = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for probe in self.probes.values():
            out[probe.columns] = _sketch_of_parameter(probe)
        return out

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a parameter was written in place."""
        return tuple(p.param._version for p in self.probes.values())

    def grads_vanished(self) -> Tensor | None:
        """Whether every tracked gradient is zero (a flag on the device), or ``None`` where every one is ``None``."""
        grads = [p.param.grad for p in self.probes.values() if p.param.grad is not None]
        if not grads:
            return None
        return torch.stack([n.double() for n in torch._foreach_norm(grads, float("inf"))]).max() == 0

    def coverage(self, unverified: str | None) -> Coverage:
        """What counts and what does not, over the parameters that train now."""
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        missing = {n: self.reasons[n] for n in trainable if n in self.reasons}
        for name, param in trainable.items():
            probe = self.probes.get(name)
            if id(param) not in self.names:
                missing[name] = ADDED
            elif name not in missing and (probe is None or not probe.seen):
                missing[name] = NOT_CALLED
        attributed = tuple(n for n in trainable if n not in missing)
        total = sum(p.numel() for p in trainable.values())
        covered = sum(trainable[n].numel() for n in attributed)
        return Coverage(attributed, missing, covered / total if total else 0.0, unverified)

    def remove(self) -> None:
        for site in self.sites:
            site.remove()


def _sketch_of_parameter(probe: Probe) -> Tensor:
    param, sketch = probe.param.detach(), probe.sketch
    if param.dim() < 2 or sketch.exact:
        return sketch(param.double()[None])[0]
    stats = sketch_params(param.flatten(1), sketch.left, sketch.right)
    return scaled(stats[None], sketch.left, sketch.right)[0]


def _refusal(module: nn.Module, path: str, include: Callable[[str, nn.Module], bool] | None) -> str | None:
    if include is not None and not include(path, module):
        return LEFT_OUT
    if replaced_forward(module):
        return "its forward was replaced on the instance, by another tracker or wrapper"
    return None
