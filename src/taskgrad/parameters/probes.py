"""The tracked parameters of a model: which are captured, where their sketches lie, and which are left out, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._text import printable
from ..capture import Capture, Probe, find_capture, register_transformers
from ..capture.accumulation import Accumulation
from ..capture.route import forget_compiled, site_of
from ..capture.site import Owner, Site
from ..capture.sketch import SketchMap, sketch_map
from ..capture.tap import Keeps
from .coverage import Coverage

STRAY = (
    "one row [1, ...] shared by all examples is used for more than an addition to their rows, so its gradient cannot "
    "be split"
)
NOT_CALLED = "no tracked forward has called its module (or only through a function that takes the weight itself)"
ADDED = "came to the model after tracking began; tracker.remove() and track() again"
REPLACED = "another tensor took its place in the module; tracker.remove() and track() again"
RESHAPED = "its shape changed since tracking began; tracker.remove() and track() again"
TAKEN = "tracked by another tracker; call remove() on that one first"
UNSEEN = (
    "the sum over tasks is not its gradient: it is also used where no tracked module sees it (a functional call, a "
    "penalty on the weights, a forward outside of batch()), or a hook changes its gradient"
)
AGAIN = "; if the next comparison agrees it counts again"
LATE = "its layer was first called after the rows of the layers were checked; it counts once its rows are checked too"
NAMED = 8  # parameters that a warning names of one cause
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
        exact_gram: bool,
    ) -> None:
        register_transformers()
        self.model, self.num_tasks, self.sketch_dim, self.seed = model, num_tasks, sketch_dim, seed
        self.exact_gram = exact_gram
        self.params = dict(model.named_parameters())
        self.names = {id(p): name for name, p in self.params.items()}
        self.reasons: dict[str, str] = {}
        self.probes: dict[str, Probe] = {}
        self.sites: list[Site] = []
        self.suspects: dict[str, str] = {}  # left out of a step's numbers, not yet for good
        self.width = 0
        self._widths: Tensor | None = None
        self.accumulation = Accumulation(lambda: self.probes.values())
        self._warned: set[str] = set()
        claimed: set[str] = set()
        strangers: dict[str, str] = {}
        found: list[tuple[str, nn.Module, Capture]] = []
        for path, module in model.named_modules():
            capture = find_capture(module)
            reason = None if capture is None else _refusal(module, path, include) or capture.refuse(module)
            if capture is not None and reason is None:
                found.append((path, module, capture))
            for attr, param in module._parameters.items():
                if param is None:
                    continue
                name = self.names[id(param)]
                place = path or "the model itself"
                if reason is not None:
                    self.reasons.setdefault(name, f"{place}: {reason}")
                elif capture is not None and is_lazy(param):
                    raise ValueError(
                        f"{place} is a lazy module without parameters yet: run the model once on a batch, then track()"
                    )
                elif param.is_complex():
                    self.reasons[name] = f"{place}: complex parameters are not split by task"
                elif capture is not None and attr in capture.params:
                    claimed.add(name)
                else:
                    rule = f"{place}: no rule for {type(module).__name__}.{attr}; taskgrad.register_capture adds one"
                    strangers.setdefault(name, rule)
        # a parameter may also hang on a container that never uses it; comparing sums finds out if it does
        self.reasons.update({n: r for n, r in strangers.items() if n not in claimed and n not in self.reasons})
        self.unfit = dict(self.reasons)  # what no step can change
        self._flags: tuple[bool, ...] = ()
        self._stale = True
        try:
            self.sites.extend(Site(*place, owner) for place in found)
            forget_compiled()
            self.refresh(between_steps=True)
            if not self.probes:
                self._refuse()
        except BaseException:
            self.remove()  # a tracker that was not made leaves nothing behind
            raise

    def _refuse(self) -> None:
        if any(reason.endswith(TAKEN) for reason in self.reasons.values()):
            raise RuntimeError(
                "the model is tracked already: call remove() on the tracker that track() gave before, and then track()"
            )
        some = "; ".join(f"{name}: {reason}" for name, reason in list(self.reasons.items())[:5])
        raise ValueError(f"no trainable parameter of the model belongs to a layer kind that taskgrad knows: {some}")

    def refresh(self, between_steps: bool) -> bool:
        """Follow parameters that were frozen, thawed or moved; True if columns were added.

        What was dropped is taken off its modules only between steps: activation checkpointing must find at the
        recomputation what it saw in the forward.
        """
        flags = tuple(p.requires_grad for p in self.params.values())
        width = self.width
        for site in self.sites:
            for attr, probe in site.probes.items():
                replaced = site.module._parameters.get(attr) is not probe.param
                if replaced or probe.param.shape != probe.shape:
                    self._flags = ()  # look the sites' probes up anew: it may now be another one of the model's
                    self.drop(probe.name, REPLACED if replaced else RESHAPED)
        if flags != self._flags or (self._stale and between_steps):
            self._flags, self._stale = flags, False
            for site in self.sites:
                site.probes = {
                    attr: self._probe(site.module._parameters[attr])
                    for attr in site.capture.params
                    if self._usable(site.module._parameters.get(attr))
                }
        for probe in self.probes.values():
            if probe.name not in self.reasons:
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
            probe = self.make(name)
            self._append(probe)
            probe.follow()
        return self.probes[name]

    def make(self, name: str) -> Probe:
        """A probe of parameter ``name`` that has no place among the columns yet."""
        param = self.params[name]
        sketch = sketch_map(param.shape, self.sketch_dim, self.seed, name).to(param.device)
        return Probe(name, param, sketch, self.num_tasks, 0, self.may_keep(sketch)[0], self.accumulation)

    def may_keep(self, sketch: SketchMap) -> tuple[Keeps, ...]:
        """What the tap of a parameter with this map may keep, first what it begins with."""
        if self.exact_gram and not sketch.exact:
            return "counted parts", "gram", "parts"
        return ("sketch",)

    def _append(self, probe: Probe) -> None:
        probe.columns = slice(self.width, self.width + probe.sketch.dim)
        self.probes[probe.name] = probe
        self.width += probe.sketch.dim
        self._widths = None

    def adopt(
        self,
        probes: Sequence[Probe],
        seen: Sequence[bool],
        keeps: Sequence[Keeps],
        left_out: Mapping[str, str],
        suspects: Mapping[str, str],
    ) -> None:
        """Lay the columns out as ``probes`` are ordered, those of other parameters after them, and leave out what
        ``left_out`` names and what no tracker could take. Statistics under way are dropped."""
        names = {p.name for p in probes}
        others = [p for name, p in self.probes.items() if name not in names]
        self.probes, self.width = {}, 0
        for probe, used in zip([*probes, *others], [*seen, *(False for _ in others)], strict=True):
            probe.seen = used
            self._append(probe)
        for probe, what in zip(probes, keeps, strict=True):
            probe.keep(what)
        self.reasons = {**left_out, **self.unfit}
        self.suspects = dict(suspects)
        for site in self.sites:
            site.reason = site.unfit = None
        self._flags = ()  # the sites' probes are looked up anew before the next batch
        for probe in self.probes.values():
            probe.discard()
            probe.held.release(self.accumulation.count)
            probe.follow()

    def live(self) -> list[Probe]:
        """The probes that count: not left out, and not frozen."""
        return [p for p in self.probes.values() if p.name not in self.reasons and p.param.requires_grad]

    def drop(self, name: str, reason: str) -> None:
        """Leave parameter ``name`` out of every number from now on, and say so once."""
        if name not in self.reasons:
            self.reasons[name] = reason
            self.suspects.pop(name, None)
            self._stale = True
            self.warn({name: reason} if name not in self._warned else {})

    def suspect(self, probes: Sequence[Probe], reason: str) -> list[Probe]:
        """Parameters that a comparison contradicts: left out of this step, and for good if the last comparison
        contradicted them too. Returns the latter."""
        again = [p for p in probes if p.name in self.suspects]
        for probe in probes:
            if probe.name not in self.suspects:
                self.suspects[probe.name] = reason + AGAIN
        self.warn({p.name: reason for p in probes if p.name not in self._warned})
        for probe in again:
            self.drop(probe.name, reason)
        return again

    def acquit(self, names: Collection[str]) -> None:
        """A comparison confirmed these parameters."""
        for name in names:
            self.suspects.pop(name, None)

    def warn_of_gaps(self) -> None:
        """Name, after the first step, the trainable parameters that no number covers and that ``include`` did not
        leave out."""
        missing = self.coverage(None).unattributed
        self.warn({n: r for n, r in missing.items() if n not in self._warned and not r.endswith(LEFT_OUT)})

    def warn(self, missing: Mapping[str, str]) -> None:
        """Name parameters that no number covers, with the reasons."""
        self._warned.update(missing)
        by_reason: dict[str, list[str]] = {}
        for name, reason in missing.items():
            by_reason.setdefault(_cause(reason), []).append(name)
        if by_reason:
            said = []
            for reason, names in by_reason.items():
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                said.append(f"{', '.join(names[:NAMED])}{more} ({reason})")
            text = printable("; ".join(said))
            warnings.warn(f"taskgrad: left out of every number, see tracker.coverage(): {text}", stacklevel=2)

    def forgive(self) -> str | None:
        """Take back what layers said of ids that fitted none of them: that says something of the ids. The first of
        what they said, or ``None``."""
        said = None
        for site in self.sites:
            if site.unfit is not None:
                said, site.unfit = said or f"{site.place}: {site.unfit}", None
        return said

    @property
    def host(self) -> bool:
        """Whether values may be looked at on the host: there is no device to wait for, or the step is checked."""
        return self.device.type == "cpu" or self.accumulation.checking

    def strays(self) -> list[Probe]:
        """Of shared rows that had a gradient, whose ``stray`` says whether it was all by example."""
        return [p for p in self.probes.values() if p.stray.grad is not None and p.name not in self.reasons]

    def collect_reasons(self) -> list[Probe]:
        """Drop the parameters of modules that saw rows which are not the batch's; the newly dropped."""
        dropped = []
        for site in self.sites:
            site.reason, site.unfit = site.reason or site.unfit, None
        found = [
            (p, f"{site.place}: {site.reason}") for site in self.sites if site.reason for p in site.probes.values()
        ]
        if self.host:
            found += [(p, STRAY) for p in self.strays() if bool(p.stray.grad)]
        missing = {p.name: reason for p, reason in found if p.name not in self.reasons}
        for probe, reason in found:
            if probe.name not in self.reasons:
                self.reasons[probe.name] = reason
                self.suspects.pop(probe.name, None)
                self._stale = True
                dropped.append(probe)
        self.warn(missing)
        return dropped

    @property
    def device(self) -> torch.device:
        return next(iter(self.probes.values())).tap.device

    def block(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Statistics G [T + 1, K] from those of the parameters by name; zero where there are none."""
        dtype = torch.float64 if any(p.tap.dtype == torch.float64 for p in self.probes.values()) else torch.float32
        out = torch.zeros(self.num_tasks + 1, self.width, dtype=dtype, device=self.device)
        for name, tap in taps.items():
            probe = self.probes[name]
            out[:, probe.columns] = probe.layout.sketches(tap)
        return out

    @property
    def dirty(self) -> bool:
        """Whether a backward pass, even one that failed, has left statistics."""
        return any(p.tap.grad is not None for p in self.probes.values())

    def discard(self) -> None:
        """Forget what the taps hold."""
        for probe in self.probes.values():
            probe.discard()

    def theta(self) -> Tensor:
        """Sketch of the parameters themselves, [K] in float64: differences of it are sketches of updates."""
        out = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for probe in self.probes.values():
            if probe.param.shape == probe.shape:
                out[probe.columns] = probe.sketch_of(probe.param)
        return out

    def widths(self) -> Tensor:
        """Columns of every probe, int64 [P]."""
        if self._widths is None or self._widths.device != self.device:
            self._widths = torch.tensor([p.sketch.dim for p in self.probes.values()], device="cpu").to(self.device)
        return self._widths

    def mask(self, flags: Iterable[bool]) -> Tensor:
        """Flags on the device, bool; [P] for one of every probe."""
        return torch.tensor(list(flags), dtype=torch.bool, device="cpu").to(self.device, non_blocking=True)

    def any_column(self, flags: Tensor) -> Tensor:
        """Whether any of a parameter's flags [K] is set: bool [P]."""
        lengths = self.widths()
        return torch.segment_reduce(flags.double(), "max", lengths=lengths, axis=0, unsafe=True, initial=0.0) > 0

    def spread(self, flags: Tensor) -> Tensor:
        """Flags [P] on all columns of their parameters: bool [K]."""
        return torch.repeat_interleave(flags, self.widths(), output_size=self.width)

    def coverage(self, unverified: str | None, late_sites: Collection[str] = ()) -> Coverage:
        """What counts and what does not, over the parameters that train now; ``late_sites`` wait for their rows to be
        checked."""
        late = {p.name: LATE for site in self.sites if site.name in late_sites for p in site.probes.values()}
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        out = {**late, **self.suspects, **self.reasons}
        missing = {n: out[n] for n in trainable if n in out}
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
        forget_compiled()
        for probe in self.probes.values():
            probe.remove()


def _cause(reason: str) -> str:
    """A reason without the place that it names, where the rest says the same of many."""
    place, colon, rest = reason.partition(": ")
    return rest if colon and " " not in place and rest.startswith("no rule for") else reason


def _refusal(module: nn.Module, path: str, include: Callable[[str, nn.Module], bool] | None) -> str | None:
    if include is not None and not include(path, module):
        return LEFT_OUT
    if site_of(module) is not None:
        return TAKEN
    if replaced_forward(module):
        return "its forward was replaced on the instance, by a wrapper"
    return None


def replaced_forward(module: nn.Module) -> bool:
    """Whether the instance has a ``forward`` of somebody's own."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
