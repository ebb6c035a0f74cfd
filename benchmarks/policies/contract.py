"""The contract's runs: a JSON line per scenario, policy and set of seeds.

    python -m benchmarks.policies.contract --part 1/2
    python -m benchmarks.policies.contract_table

Lines that are in the file are not run again, so it goes on where it was stopped; two processes, parts 1/2 and 2/2, may
write to one file. Every policy is run on four paired seeds. Those of the contract get, in scenarios where their mean
falls .005 below the equal split's, twelve further ones, and so does the equal split: these alone decide.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taskgrad.sampling import policies as shipped
from taskgrad.sampling.policies import OverwriteBoost, Static

from .controls import LossDriven, equal, replay
from .scenarios import FAMILIES, scenario
from .simulate import Data, How, data, run

RESULTS = Path("benchmarks/results/contract.jsonl")
SEEDS, FURTHER = tuple(range(4)), tuple(range(4, 16))
BELOW = -0.005
NUMBERS = range(4000, 4007)
"""Scenarios of the final table, in every family; those below 4000 were for development, or became it."""
SOME, FEW = range(4000, 4003), range(4000, 4001)
"""Those that the ablation and the published policies are run on."""


class Runs:
    """The runs of one scenario, each made once."""

    def __init__(self, family: str, number: int) -> None:
        self.scenario = scenario(family, number)
        self._data: dict[int, Data] = {}
        self._runs: dict[tuple[str, int], dict[str, Any]] = {}

    @property
    def natural(self) -> Any:
        """The natural mix as the sampler has it [T]: whole examples."""
        given = self.data(SEEDS[0])
        return self.scenario.natural if given.drawn is None else given.sizes / given.sizes.sum()

    def data(self, seed: int) -> Data:
        if seed not in self._data:
            self._data[seed] = data(self.scenario, seed)
        return self._data[seed]

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """The run of the policy ``name``; see ``simulate.run``."""
        if (name, seed) not in self._runs:
            entry = ENTRIES[name]
            policy = entry.make(self, seed)
            self._runs[name, seed] = run(self.scenario, self.data(seed), seed, policy, entry.how)
        return self._runs[name, seed]

    def line(self, name: str, seeds: Sequence[int]) -> dict[str, Any]:
        """What the table needs of some runs, JSON-able; lists have one value per seed. ``half``: the lowest score of a
        learnable rare task at half the run, over the seeds' mean; ``noise``: in equal parts."""
        began = time.perf_counter()
        s, runs = self.scenario, [self.run(name, seed) for seed in seeds]
        scores, end, parts, half = (np.array([r[key] for r in runs]) for key in ("scores", "end", "parts", "half"))
        learnable, frequent = s.rare & ~s.noise, ~s.rare
        found = {
            "rare": scores[:, learnable].mean(1),
            "worst": scores[:, learnable].min(1),
            "frequent": scores[:, frequent].mean(1),
            "budget": parts.sum(1),
            "budget_end": end.sum(1),
        }
        if s.noise.any():
            equal_parts = s.rare.sum()
            found |= {
                "noise": parts[:, s.noise].mean(1) * equal_parts,
                "noise_end": end[:, s.noise].mean(1) * equal_parts,
            }
        return {
            "family": s.family,
            "scenario": s.seed,
            "policy": name,
            "tasks": len(s.natural),
            "seeds": list(seeds),
            **{key: np.round(value, 4).tolist() for key, value in found.items()},
            "half": round(float(half[:, learnable].mean(0).min()), 4),
            "seconds": round(time.perf_counter() - began, 2),
        }


def control(runs: Runs, seed: int) -> Static:
    """The equal split, each part times 1 plus or minus .02, renormalised."""
    parts = equal(runs.natural).values * (1 + 0.02 * np.random.default_rng(seed).choice([-1, 1], len(runs.natural)))
    return Static((parts / parts.sum()).tolist())


def replayed(runs: Runs, seed: int) -> Any:
    """The average mix of the run of ``OverwriteBoost`` with the same seed, from the first batch to the last."""
    return replay(np.array(runs.run("OverwriteBoost", seed)["mean"]), runs.natural, runs.scenario.budget)


def sheared(runs: Runs, seed: int) -> Any:
    """With the held-out losses at the end of the equal split as the reference."""
    losses = runs.run("equal", seed)["held_out"]
    return shipped.ShearedLlama({f"task{t}": loss for t, loss in enumerate(losses)})


@dataclass(frozen=True)
class Entry:
    """A policy of the table. ``judged``: by the contract, so with further seeds where it is below."""

    make: Callable[[Runs, int], Any]
    how: How = How()  # noqa: RUF009
    judged: bool = False


OURS: dict[str, Entry] = {
    "equal": Entry(lambda runs, seed: equal(runs.natural)),
    "natural": Entry(lambda runs, seed: shipped.Proportional(), How(guarded=False)),
    "control": Entry(control, judged=True),
    "OverwriteBoost": Entry(lambda runs, seed: OverwriteBoost(), judged=True),
    "OverwriteBoost, gradients": Entry(lambda runs, seed: OverwriteBoost(), How(losses=False), judged=True),
    "OverwriteBoost, held-out": Entry(lambda runs, seed: OverwriteBoost(), How(observed=True), judged=True),
}
"""The policy in its three tiers, and what it is measured against."""
ABLATION: dict[str, Entry] = {
    "without rho": Entry(lambda runs, seed: OverwriteBoost(), How(rho=False), judged=True),
    "shuffled": Entry(lambda runs, seed: shipped.Shuffled(OverwriteBoost(), seed)),
    "replay": Entry(replayed),
    "loss": Entry(lambda runs, seed: LossDriven()),
}
"""The rule with less, and its controls."""

_PUBLISHED: dict[str, tuple[Callable[[Runs, int], Any], How]] = {
    "Uniform": (lambda runs, seed: shipped.Uniform(), How()),
    "Temperature(3)": (lambda runs, seed: shipped.Temperature(3), How()),
    "Cooldown": (lambda runs, seed: shipped.Cooldown(), How()),
    "TwoPhase(Uniform)": (lambda runs, seed: shipped.TwoPhase(shipped.Uniform(), 0.5), How()),
    "Exp3": (lambda runs, seed: shipped.Exp3(), How()),
    "Exp3, released": (lambda runs, seed: shipped.Exp3("released"), How()),
    "ShearedLlama": (sheared, How(observed=True)),
    "DoGE": (lambda runs, seed: shipped.DoGE(), How(gram=True)),
    "PiKE": (lambda runs, seed: shipped.PiKE(0.1, 0.01), How()),
    "ADO": (lambda runs, seed: shipped.ADO(start=200, fit_every=200, skip=100), How()),
}
PUBLISHED = {
    name if guarded else f"{name}, unguarded": Entry(make, How(guarded=guarded, observed=how.observed, gram=how.gram))
    for name, (make, how) in _PUBLISHED.items()
    for guarded in (True, False)
}
"""Published policies, inside the scenario's budget and without any guard. UniMax needs the number of examples, which
most scenarios do not have."""
ENTRIES: Mapping[str, Entry] = {**OURS, **ABLATION, **PUBLISHED}


def missing(
    family: str, number: int, names: Sequence[str], known: dict[Any, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The lines of one scenario that are not ``known`` yet, as they are made."""
    runs = Runs(family, number)
    for name in names:
        for seeds, who in ((SEEDS, (name,)), (FURTHER, ("equal", name))):
            if seeds == FURTHER and not (ENTRIES[name].judged and _difference(known, family, number, name) <= BELOW):
                continue
            for each in who:
                key = (family, number, each, seeds)
                if key not in known:
                    known[key] = runs.line(each, seeds)
                    yield known[key]


def _difference(known: Mapping[Any, dict[str, Any]], family: str, number: int, name: str) -> float:
    ours, base = (known[family, number, each, SEEDS]["rare"] for each in (name, "equal"))
    return float(np.mean(ours) - np.mean(base))


def read(path: Path) -> dict[Any, dict[str, Any]]:
    """Lines by family, number, policy and seeds."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return {(line["family"], line["scenario"], line["policy"], tuple(line["seeds"])): line for line in lines}


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line, or ``arguments``, asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies.contract", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"JSON lines (default {RESULTS})")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th scenario, from the i-th")
    parser.add_argument("--policies", nargs="*", choices=list(ENTRIES), metavar="POLICY", help="default: all")
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--numbers", type=int, nargs="*", default=list(NUMBERS), help="of the scenarios in a family")
    args = parser.parse_args(arguments)
    part, parts = map(int, args.part.split("/"))
    known = read(args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    jobs = [(family, number) for number in args.numbers for family in args.families]
    groups = ((OURS, args.numbers), (ABLATION, SOME), (PUBLISHED, FEW))
    if args.policies is not None:
        groups = ((args.policies, args.numbers),)
    for names, numbers in groups:
        for family, number in jobs[part - 1 :: parts]:
            if number not in numbers:
                continue
            for line in missing(family, number, ["equal", *(name for name in names if name != "equal")], known):
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            print(f"{family} {number}", flush=True)


if __name__ == "__main__":
    main()
