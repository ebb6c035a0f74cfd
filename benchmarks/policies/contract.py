"""The contract's runs: scenarios, policies and seeds, one JSON line per scenario, policy and set of seeds.

    python -m benchmarks.policies.contract --out benchmarks/results/contract.jsonl --part 1/2
    python -m benchmarks.policies.contract_table benchmarks/results/contract.jsonl

Lines that are in the file already are not run again, so it goes on where it was stopped; two processes, parts 1/2 and
2/2, may write to the same file. Every policy is run on four paired seeds; where it falls more than .005 below the equal
split there, on twelve further ones, and so is the equal split.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taskgrad.sampling.policies import (
    ADO,
    Cooldown,
    DoGE,
    Exp3,
    OverwriteBoost,
    PiKE,
    Proportional,
    ShearedLlama,
    Shuffled,
    Static,
    Temperature,
    UniMax,
    Uniform,
)

from . import v5
from .controls import LossDriven, equal, replay
from .scenarios import FAMILIES, Scenario, scenario
from .simulate import Data, How, data, run

RESULTS = Path("benchmarks/results/contract.jsonl")
SEEDS, FURTHER = range(4), range(4, 16)
BELOW = -0.005
FINAL = {family: range(1000, 1008) for family in FAMILIES}
"""Scenarios of the final table."""


@dataclass(frozen=True)
class Entry:
    """A policy of the table: made for a scenario, its natural mix and a seed."""

    make: Callable[[Scenario, Any, int], Any]
    how: How = How()  # noqa: RUF009


def jittered(natural: Any, seed: int) -> Static:
    """Control: the equal split, each part times 1 plus or minus .02."""
    parts = equal(natural).values * (1 + 0.02 * np.random.default_rng(seed).choice([-1, 1], len(natural)))
    return Static((parts / parts.sum()).tolist())


NO_LOSSES, HELD_OUT, FREE = How(losses=False), How(observed=True), How(guarded=False)
POLICIES: dict[str, Entry] = {
    "equal": Entry(lambda s, p, seed: equal(p)),
    "control": Entry(lambda s, p, seed: jittered(p, seed)),
    "natural": Entry(lambda s, p, seed: Proportional(), FREE),
    "v5": Entry(lambda s, p, seed: v5.OverwriteBoost()),
    "OverwriteBoost": Entry(lambda s, p, seed: OverwriteBoost()),
    "OverwriteBoost, gradients": Entry(lambda s, p, seed: OverwriteBoost(), NO_LOSSES),
    "OverwriteBoost, held-out": Entry(lambda s, p, seed: OverwriteBoost(), HELD_OUT),
    "loss": Entry(lambda s, p, seed: LossDriven()),
}


def line(s: Scenario, given: Sequence[Data], name: str, entry: Entry, seeds: Sequence[int]) -> dict[str, Any]:
    began = time.perf_counter()
    natural = s.natural if given[0].drawn is None else given[0].sizes / given[0].sizes.sum()
    runs = [run(s, d, seed, entry.make(s, natural, seed), entry.how) for d, seed in zip(given, seeds, strict=True)]
    score, end, parts, half = (np.array([r[key] for r in runs]) for key in ("scores", "end", "parts", "half"))
    learnable, equal_part = s.rare & ~s.noise, 1 / s.rare.sum()
    found: dict[str, Any] = {
        "rare": score[:, learnable].mean(1), "worst": score[:, learnable].min(1), "frequent": score[:, ~s.rare].mean(1),
        "budget": parts.sum(1), "budget_end": end.sum(1),
    }  # fmt: skip
    if s.noise.any():
        found |= {"noise": parts[:, s.noise].mean(1) / equal_part, "noise_end": end[:, s.noise].mean(1) / equal_part}
    return {
        "family": s.family, "scenario": s.seed, "policy": name, "tasks": len(s.natural), "seeds": list(seeds),
        **{key: np.round(value, 5).tolist() for key, value in found.items()},
        "half": round(float(half[:, learnable].mean(0).min()), 4), "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def run_scenario(family: str, number: int, policies: dict[str, Entry], known: set[Any]) -> Any:
    """Yield the lines that are missing."""
    s = scenario(family, number)
    given: dict[int, Data] = {}
    rare: dict[Any, Any] = {}

    def made(name: str, seeds: Sequence[int]) -> dict[str, Any] | None:
        for seed in seeds:
            if seed not in given:
                given[seed] = data(s, seed)
        return line(s, [given[seed] for seed in seeds], name, policies[name], seeds)

    for name in policies:
        key = (family, number, name, tuple(SEEDS))
        if key not in known:
            known[key] = made(name, SEEDS)
            yield known[key]
        rare[name] = np.array(known[key]["rare"])
        if name in ("equal", "natural") or (rare[name] - rare["equal"]).mean() > BELOW:
            continue
        for other in ("equal", name):
            key = (family, number, other, tuple(FURTHER))
            if key not in known:
                known[key] = made(other, FURTHER)
                yield known[key]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies.contract", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--numbers", type=int, nargs="*", default=None)
    args = parser.parse_args(arguments)
    part, parts = map(int, args.part.split("/"))
    jobs = [(f, n) for f in args.families for n in (args.numbers or FINAL[f])]
    known = {(x["family"], x["scenario"], x["policy"], tuple(x["seeds"])): x for x in read(args.out)}
    for family, number in jobs[part - 1 :: parts]:
        for found in run_scenario(family, number, {name: POLICIES[name] for name in args.policies}, known):
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
