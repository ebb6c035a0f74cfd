"""The price of tracking: whole training steps beside the plain one, the peers' in the same run, and peak memory.

A GPT-like decoder trained with AdamW on 2,048 random tokens a step (32 examples of 64, at T = 64 64 of 32), T tasks in
equal parts, on one thread. Every variant trains a decoder of its own from the same start. First its Gram and the
gradients that it leaves are compared with float64 (``truth.py``): what is off is named, and gets no time. A peer that
is off or fails on the decoder as it is is tried on one without a tied weight, with position ids [B, L] and contiguous
token ids, beside that one's plain step. Then blocks of steps are timed in turn, the plain step before and after each: a
ratio is of neighbours in time. Where one step in n is measured a block is whole rounds of n steps. A number is the
median over ``--repeats`` blocks, ± their standard deviation; peers are timed three times, once where they take more
than three plain steps, and where they take more than ten and five seconds the step that was checked is the one that
counts. "plain" beside itself shows what the machine adds. Memory is taken at T = 8, every variant in a process of its
own (``peak.py``).

    python -m benchmarks.step [--only TEXT] [--all] [--resume] [--quick] [--repeats 5] [--out benchmarks/results]

Each case is a process: one that dies loses its own numbers. ``step-cpu.json`` is written after each and ``--resume``
goes on from it; ``step-cpu.md`` has the tables, and ``python -m benchmarks.cost_picture`` draws the picture.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from . import timing
from .apart import apart
from .models import Decoder, Setting
from .peak import measurable, peaks
from .peers import peers
from .step_page import page
from .training import Step, Tracked
from .truth import Truth

LIMIT = {
    "gram": 3e-3,
    "norms": 3e-3,
    "grad": 1e-4,
}  # relative errors; J Jᵀ in float32 over millions of columns has 1e-3
SKETCH_LIMIT = 0.35
SLOW, SLOWEST = 3.0, 10.0  # plain steps; a peer that takes more is timed once, or not again after the check
LONG = 5e3  # milliseconds; a shorter one is
TIMEOUT = 1800.0
MEMORY_TIMEOUT = 300.0
ASIS, ADAPTED = "the decoder as it is", "one untied, with position ids [B, L]"


@dataclass(frozen=True)
class Variant:
    """``memory``: whether it may need other memory than its neighbours in the table."""

    make: Callable[[Setting], Step]
    beside: str = "plain"
    peer: bool = False
    memory: bool = True


@dataclass(frozen=True)
class Case:
    """``whole``: also unsorted ids, micro-batches, clipping, one step in four, a step outside of ``batch()``.

    Short steps are timed several at a time, for ``block`` seconds.
    """

    name: str
    setting: Setting
    whole: bool = False
    peers: bool = True
    memory: bool = False
    block: float = 0.1


def _case(width: int, tasks: int, peers: bool, whole: bool) -> Case:
    batch, length = (32, 64) if tasks <= 32 else (64, 32)
    setting = Setting(256, width, 4, batch, length, tasks)
    return Case(f"width {width}, T = {tasks}", setting, whole, peers, memory=tasks == 8)


def cases(everything: bool) -> list[Case]:
    """``everything``: the peers at width 512, too, which takes as long as all the rest."""
    return [
        Case("width 32, T = 5", Setting(256, 32, 2, 64, 32, 5), whole=True),
        *(_case(256, tasks, True, tasks == 8) for tasks in (2, 8, 64)),
        *(_case(512, tasks, everything, tasks == 8) for tasks in (2, 8, 64)),
    ]


QUICK = [Case("quick", Setting(40, 16, 1, 8, 6, 2), whole=True, memory=True, block=0.0)]


def variants(case: Case) -> dict[str, Variant]:
    def tracked(mode: Literal["sketch", "exact_gram", "exact"], beside: str = "plain", **options: Any) -> Variant:
        memory = not options or "micro" in options
        return Variant(functools.partial(Tracked, mode=mode, **options), beside, memory=memory)

    found = {"plain": Variant(Step), "sketch": tracked("sketch"), "exact_gram": tracked("exact_gram")}
    if case.setting.tasks <= 8:
        found["exact"] = tracked("exact")
    if case.whole:
        found |= {
            "sketch, unsorted": tracked("sketch", shuffled=True),
            "sketch, every=4": tracked("sketch", every=4),
            "exact_gram, every=4": tracked("exact_gram", every=4),
            "outside batch()": tracked("sketch", outside=True),
            "plain, 4 micro-batches": Variant(functools.partial(Step, micro=4), "plain, 4 micro-batches"),
            "exact_gram, 4 micro-batches": tracked("exact_gram", "plain, 4 micro-batches", micro=4),
            "plain, clipped": Variant(functools.partial(Step, clip=True), "plain, clipped", memory=False),
            "sketch, clipped": tracked("sketch", "plain, clipped", clip=True),
        }
    if case.peers:
        found |= {name: Variant(make, peer=True) for name, make in peers().items()}
    return found


class Timer:
    """Steps of one case, timed beside each other."""

    def __init__(self, case: Case, repeats: int) -> None:
        self.case, self.repeats = case, repeats
        self.variants = variants(case)
        adapted = replace(case.setting, tied=False, batched_positions=True)
        self.settings = {ASIS: case.setting, ADAPTED: adapted} if case.peers else {ASIS: case.setting}
        self.truths = {name: Truth(setting) for name, setting in self.settings.items()}
        self.steps: dict[str, Step] = {}
        self.beside: dict[str, str] = {}
        self.found: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, dict[str, Any]]:
        for name, variant in self.variants.items():
            self.found[name] = self._prepare(name, variant)
            print(f"  {name}: {_said(self.found[name])}", flush=True)
        self._time()
        return self.found

    def _prepare(self, name: str, variant: Variant) -> dict[str, Any]:
        """Check a variant on the first decoder that it is right on, and keep it for timing."""
        found: dict[str, Any] = {"peer": variant.peer}
        for model, setting in self.settings.items():
            if model == ADAPTED and not variant.peer:
                break  # it is ours: no other decoder will do
            try:
                step = variant.make(setting)
                found["gives"] = step.gives
                if variant.peer and setting.tasks * sum(p.numel() for p in step.params) > step.largest:
                    return found | {"not run": "too slow to be run at this size"}
                step.settle()
                errors, found["first ms"] = self.truths[model].errors(step)
            except Exception as error:
                found.setdefault("off", {})[model] = f"{type(error).__name__}: {error}"[:200]
                continue
            if wrong := _wrong(errors, step):
                found.setdefault("off", {})[model] = wrong
                continue
            step.train()
            self.steps[name], self.beside[name] = step, variant.beside
            if model == ADAPTED:
                self.beside[name] = f"plain, on {model}"
                if self.beside[name] not in self.steps:
                    self.steps[self.beside[name]] = plain = Step(setting)
                    plain.settle()
                    plain.train()
                    plain()
            return found | {"adapted": model == ADAPTED, "errors": errors}
        return found | {"not run": "wrong or failed on every decoder"}

    def _time(self) -> None:
        plain = statistics.median(self._block(self.steps["plain"], 1) for _ in range(3))
        count = max(1, round(self.case.block * 1e3 / plain))
        ms: dict[str, list[float]] = {name: [] for name in self.variants}
        ratios: dict[str, list[float]] = {name: [] for name in self.variants}
        for name, variant in self.variants.items():
            first = self.found[name].get("first ms", 0.0)
            if variant.peer and name in self.steps and first > max(SLOWEST * plain, LONG):
                ms[name], ratios[name] = [first], [first / plain]
        timed = [name for name in self.variants if name in self.steps and not ratios[name]]
        timed.sort(key=lambda name: self.beside[name])  # neighbours share the plain step between them
        for repeat in range(self.repeats):
            beside, before = "", 0.0
            for name in timed:
                if self.variants[name].peer and repeat and (repeat >= 3 or ratios[name][0] > SLOW):
                    continue
                if self.beside[name] != beside:
                    beside = self.beside[name]
                    before = self._block(self.steps[beside], count)
                own = self._block(self.steps[name], count)
                after = self._block(self.steps[beside], count)
                ms[name].append(own)
                ratios[name].append(own / ((before + after) / 2))
                before = after
            print(f"  repeat {repeat + 1} of {self.repeats}", flush=True)
        for name in filter(ratios.get, ratios):
            spread = statistics.stdev(ratios[name]) if len(ratios[name]) > 1 else None
            self.found[name] |= {
                "beside": self.beside[name],
                "ms": statistics.median(ms[name]),
                "ratio": statistics.median(ratios[name]),
                "spread": spread,
                "ratios": ratios[name],
            }

    @staticmethod
    def _block(step: Step, count: int) -> float:
        """Mean milliseconds of a step over at least ``count``, whole rounds of ``every``."""
        steps = -(-count // step.every) * step.every
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) * 1e3 / steps


def _wrong(errors: dict[str, float], step: Step) -> str:
    """What is off by more than rounding (or, of a sketch, more than sketches are); "" if nothing is."""
    limits = LIMIT | ({"gram": SKETCH_LIMIT} if step.gives.startswith("sketch") else {})
    return ", ".join(f"{name} has a relative error of {e:.2g}" for name, e in errors.items() if not e <= limits[name])


def _said(found: dict[str, Any]) -> str:
    off = "; ".join(f"on {model}: {reason}" for model, reason in found.get("off", {}).items())
    right = ", ".join(f"{name} {e:.1e}" for name, e in found.get("errors", {}).items())
    where = f" on {ADAPTED}" if found.get("adapted") else ""
    return "; ".join(
        text for text in (off, found.get("not run", ""), f"right{where}: {right}" if right else "") if text
    )


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Everything but memory, in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = Timer(case, repeats).run()
    return {
        "setting": asdict(case.setting),
        "repeats": repeats,
        "parameters": sum(p.numel() for p in Decoder(case.setting).parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu seconds": round(time.process_time(), 1),
        "variants": found,
    }


def memory(case: Case, found: dict[str, dict[str, Any]]) -> None:
    """Peak memory of the variants that were timed, each in a process of its own."""
    for name, variant in variants(case).items():
        if "ratio" not in found[name] or not variant.memory:
            continue
        adapted = found[name]["adapted"]
        setting = replace(case.setting, tied=not adapted, batched_positions=adapted)
        try:
            found[name]["peak"] = apart(peaks, variant.make, setting, timeout=MEMORY_TIMEOUT)
        except (RuntimeError, TimeoutError, ChildProcessError) as error:
            found[name]["peak failed"] = f"{type(error).__name__}: {error}"
        print(f"  memory of {name}: {found[name].get('peak', found[name].get('peak failed'))}", flush=True)


def run(chosen: list[Case], repeats: int, out: Path, resume: bool) -> dict[str, Any]:
    """Measure the cases, one process each, and write the files after every one; what failed is in them by name."""
    path = out / "step-cpu.json"
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "machine": timing.machine(torch.device("cpu")) | {"threads": 1},
        "cases": {},
        "failed": {},
    }
    if resume and path.exists():
        earlier = json.loads(path.read_text())
        for fact in ("cpu", "torch"):
            if earlier["machine"][fact] != result["machine"][fact]:
                raise SystemExit(f"{path} is of {fact} {earlier['machine'][fact]}: measure anew, without --resume")
        result["cases"] = earlier["cases"]
    for case in chosen:
        known = result["cases"].get(case.name)
        if known and (known["setting"], known["repeats"]) == (asdict(case.setting), repeats):
            print(f"{case.name}: measured", flush=True)
            continue
        print(f"{case.name}", flush=True)
        try:
            found = apart(measure, case, repeats, timeout=TIMEOUT)
            if case.memory and measurable():
                memory(case, found["variants"])
            result["cases"][case.name] = found
        except (RuntimeError, TimeoutError, ChildProcessError) as error:
            result["failed"][case.name] = f"{type(error).__name__}: {error}"
            print(f"  failed: {result['failed'][case.name]}", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(result))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help='cases whose name has this in it, e.g. "width 256"')
    parser.add_argument("--all", action="store_true", help="peers at width 512, too")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, measure the rest")
    parser.add_argument("--quick", action="store_true", help="a tiny decoder, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    args = parser.parse_args(arguments)
    chosen = [case for case in (QUICK if args.quick else cases(args.all)) if args.only in case.name]
    if args.quick and args.out == timing.RESULTS:
        parser.error("--quick needs --out: its numbers are no results")
    if not chosen:
        parser.error(f"no case has {args.only!r} in its name")
    start = time.perf_counter()
    result = run(chosen, args.repeats, args.out, args.resume)
    print(f"\n{page(result)}\nwritten to {args.out / 'step-cpu.json'} and .md, {time.perf_counter() - start:.0f} s")
    ours = [v for case in result["cases"].values() for v in case["variants"].values() if not v["peer"]]
    return 1 if result["failed"] or any("off" in v for v in ours) else 0


if __name__ == "__main__":
    raise SystemExit(main())
