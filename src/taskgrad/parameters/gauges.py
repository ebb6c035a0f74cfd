"""The tracked parameters of a model: which are captured, where their sketches lie, and which are left out, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from ..capture import Gauge, register_transformers
from ..capture.accumulation import Accumulation, are_zero
from ..capture.route import forget_compiled
from ..capture.site import Owner, Site
from ..capture.sketch import SketchMap, sketch_map
from ..capture.tap import Keeps
from .columns import Columns
from .coverage import Coverage
from .discover import EXCLUDED, Include, discover, refuse
from .left_out import LeftOut

STRAY = (
    "one row [1, ...] shared by all examples is used for more than an addition to their rows, so its gradient cannot "
    "be split"
)
NOT_CALLED = "no tracked forward has called its module (or only through a function that takes the weight itself)"
ADDED = "came to the model after tracking began; tracker.remove() and track() again"
REPLACED = "another tensor took its place in the module; tracker.remove() and track() again"
RESHAPED = "its shape changed since tracking began; tracker.remove() and track() again"
UNSEEN = (
    "the sum over tasks is not its gradient: it is also used where no tracked module sees it (a functional call, a "
    "penalty on the weights, a forward outside of batch()), or a hook changes its gradient"
)
LATE = "its layer was first called after the rows of the layers were checked; it counts once its rows are checked too"


class Gauges(Columns):
    """One gauge per trainable parameter of a known layer kind; their sketches side by side are K columns."""

    def __init__(
        self,
        model: nn.Module,
        owner: Owner,
        num_tasks: int,
        sketch_dim: int | None,
        seed: int,
        include: Include | None,
        exact_gram: bool,
    ) -> None:
        super().__init__(num_tasks)
        register_transformers()
        self.model, self.sketch_dim, self.seed, self.exact_gram = model, sketch_dim, seed, exact_gram
        self.params = dict(model.named_parameters())
        self.names = {id(p): name for name, p in self.params.items()}
        self.accumulation = Accumulation(lambda: self.gauges.values())
        places, unfit = discover(model, include)
        self.left_out = LeftOut(unfit)
        self.sites: list[Site] = []
        self._looked_up: tuple[tuple[bool, ...], int] | None = None  # which require a gradient, how many are left out
        try:
            self.sites.extend(Site(*place, owner) for place in places)
            forget_compiled()
            self.refresh(between_steps=True)
            if not self.gauges:
                refuse(self.left_out.reasons)
        except BaseException:
            self.remove()  # a tracker that was not made leaves nothing behind
            raise

    def refresh(self, between_steps: bool) -> bool:
        """Follow parameters that were frozen, thawed or moved; True if columns were added.

        What was dropped is taken off its modules only between steps: activation checkpointing must find at the
        recomputation what it saw in the forward.
        """
        width = self.width
        for site in self.sites:
            for attr, gauge in site.gauges.items():
                replaced = site.module._parameters.get(attr) is not gauge.param
                if replaced or gauge.param.shape != gauge.shape:
                    self._looked_up = None  # it may now be another one of the model's
                    self.left_out.drop(gauge.name, REPLACED if replaced else RESHAPED)
        now = tuple(p.requires_grad for p in self.params.values()), len(self.left_out.reasons)
        before = self._looked_up
        if before is None or now[0] != before[0] or (now != before and between_steps):
            self._look_up()
            self._looked_up = now
        for gauge in self.gauges.values():
            if gauge.name not in self.left_out.reasons:
                gauge.follow()
        return self.width > width

    def _look_up(self) -> None:
        """Which gauges the sites have."""
        for site in self.sites:
            site.gauges = {
                attr: self._gauge(site.module._parameters[attr])
                for attr in site.capture.params
                if self._usable(site.module._parameters.get(attr))
            }

    def _usable(self, param: nn.Parameter | None) -> bool:
        if param is None or id(param) not in self.names:
            return False
        return param.requires_grad and self.names[id(param)] not in self.left_out.reasons

    def _gauge(self, param: nn.Parameter | None) -> Gauge:
        assert param is not None
        name = self.names[id(param)]
        if name not in self.gauges:
            gauge = self.make(name)
            self.append(gauge)
            gauge.follow()
        return self.gauges[name]

    def make(self, name: str) -> Gauge:
        """A gauge of parameter ``name`` that has no place among the columns yet."""
        param = self.params[name]
        sketch = sketch_map(param.shape, self.sketch_dim, self.seed, name).to(param.device)
        return Gauge(name, param, sketch, self.num_tasks, 0, self.may_keep(sketch)[0], self.accumulation)

    def may_keep(self, sketch: SketchMap) -> tuple[Keeps, ...]:
        """What the tap of a parameter with this map may keep, first what it begins with."""
        if self.exact_gram and not sketch.exact:
            return "counted parts", "gram", "parts"
        return ("sketch",)

    def adopt(
        self,
        gauges: Sequence[Gauge],
        seen: Sequence[bool],
        keeps: Sequence[Keeps],
        left_out: Mapping[str, str],
        suspects: Mapping[str, str],
    ) -> None:
        """Lay the columns out as ``gauges`` are ordered, those of other parameters after them, and leave out what
        ``left_out`` names and what no tracker could take. Statistics under way are dropped."""
        self.lay_out(gauges)
        for gauge, what in zip(gauges, keeps, strict=True):
            gauge.keep(what)
        used = dict(zip((p.name for p in gauges), seen, strict=True))
        self.left_out.resume(left_out, suspects)
        for site in self.sites:
            site.reason = site.unfit = None
        self._looked_up = None  # the sites' gauges are looked up anew before the next batch
        for gauge in self.gauges.values():
            gauge.seen = used.get(gauge.name, False)
            gauge.discard()
            gauge.held.release(self.accumulation.count)
            gauge.follow()

    def live(self) -> list[Gauge]:
        """The gauges that count: not left out, and not frozen."""
        return [p for p in self.gauges.values() if p.name not in self.left_out.reasons and p.param.requires_grad]

    def warn_of_gaps(self) -> None:
        """Name, after the first step, the trainable parameters that no number covers and that ``include`` did not
        leave out."""
        missing = self.coverage(None).unattributed
        named = self.left_out.warned
        self.left_out.warn({n: r for n, r in missing.items() if n not in named and not r.endswith(EXCLUDED)})

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

    def strays(self) -> list[Gauge]:
        """Of shared rows that had a gradient, whose ``stray`` says whether it was all by example."""
        return [p for p in self.gauges.values() if p.stray.grad is not None and p.name not in self.left_out.reasons]

    def collect_reasons(self) -> list[Gauge]:
        """Drop the parameters of modules that saw rows which are not the batch's; the newly dropped."""
        for site in self.sites:
            site.reason, site.unfit = site.reason or site.unfit, None
        found = [
            (p, f"{site.place}: {site.reason}") for site in self.sites if site.reason for p in site.gauges.values()
        ]
        if self.host:
            found += [(p, STRAY) for p in self.strays() if bool(p.stray.grad)]
        dropped = [p for p, reason in found if self.left_out.add(p.name, reason)]
        self.left_out.warn({p.name: self.left_out.reasons[p.name] for p in dropped})
        return dropped

    @property
    def dirty(self) -> bool:
        """Whether a backward pass, even one that failed, has left statistics."""
        return any(p.tap.grad is not None for p in self.gauges.values())

    def discard(self) -> None:
        """Forget what the taps hold."""
        for gauge in self.gauges.values():
            gauge.discard()

    def coverage(self, unverified: str | None, late_sites: Collection[str] = ()) -> Coverage:
        """What counts and what does not, over the parameters that train now; ``late_sites`` wait for their rows to be
        checked."""
        late = {p.name: LATE for site in self.sites if site.name in late_sites for p in site.gauges.values()}
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        out = {**late, **self.left_out.suspects, **self.left_out.reasons}
        missing = {n: out[n] for n in trainable if n in out}
        for name, param in trainable.items():
            gauge = self.gauges.get(name)
            if id(param) not in self.names:
                missing[name] = ADDED
            elif name not in missing and (gauge is None or not gauge.seen):
                missing[name] = NOT_CALLED
        attributed = tuple(n for n in trainable if n not in missing)
        total = sum(p.numel() for p in trainable.values())
        covered = sum(trainable[n].numel() for n in attributed)
        return Coverage(attributed, missing, covered / total if total else 0.0, unverified)

    def vanished(self) -> bool:
        """Whether no parameter has a gradient any more; of those on a GPU only by ``None``, nothing is waited for."""
        left = [p for p in self.live() if p.param.grad is not None]
        if not left:
            return True
        smallest = min(left, key=lambda p: p.param.numel())
        return self.device.type == "cpu" and all(are_zero([smallest])) and all(are_zero(left))

    def rest(self) -> None:
        """Listen to no gradients until ``refresh``."""
        for gauge in self.gauges.values():
            gauge.remove()

    def remove(self) -> None:
        for site in self.sites:
            site.remove()
        forget_compiled()
        self.rest()
