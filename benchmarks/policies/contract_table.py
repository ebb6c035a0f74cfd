"""The contract's table in Markdown, from the lines that ``contract`` wrote.

python -m benchmarks.policies.contract_table [benchmarks/results/contract.jsonl]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .contract import BELOW, ENTRIES, FURTHER, RESULTS, SEEDS, read

Lines = Mapping[Any, dict[str, Any]]
MASTERED = 0.98
"""Score at half the run of every rare task, under the equal split, where nobody needs the budget."""


@dataclass
class Verdict:
    """One policy against the equal split, over the scenarios that it was run on."""

    name: str
    scenarios: int = 0
    mean: float = 0.0
    error: float = 0.0
    lowest: float = 0.0  # of the four-seed means
    below: list[str] = field(default_factory=list)  # scenarios, as the twelve further seeds say
    lowest_further: float = 0.0
    judged: bool = False
    noise: float = np.nan
    noise_end: float = np.nan
    quiet: float = np.nan  # part of the scenarios with noise in which it ends under half an equal part
    back: float = np.nan  # budget in force at the end where nobody needs it
    back_most: float = np.nan
    frequent: float = np.nan  # there, of frequent tasks: score above natural's
    families: dict[str, float] = field(default_factory=dict)


def verdict(lines: Lines, name: str) -> Verdict:
    """What the contract asks of the policy ``name``."""
    keys = [key[:2] for key in lines if key[2:] == (name, SEEDS)]
    ours = {key: lines[(*key, name, SEEDS)] for key in keys}
    base = {key: lines[(*key, "equal", SEEDS)] for key in keys}
    gain = {key: float(np.mean(ours[key]["rare"]) - np.mean(base[key]["rare"])) for key in keys}
    means = np.array(list(gain.values()))
    judged = name != "equal" and any(key[2:] == (name, FURTHER) for key in lines)
    judged = judged or (name in ENTRIES and ENTRIES[name].judged)
    out = Verdict(name, len(keys), float(means.mean()), _error(means), float(means.min()), judged=judged)
    for key in keys:
        if gain[key] <= BELOW and out.judged:
            pair = [np.array(lines[(*key, each, FURTHER)]["rare"]) for each in (name, "equal")]
            further = pair[0] - pair[1]
            out.lowest_further = min(out.lowest_further, float(further.mean()))
            if further.mean() <= BELOW and further.mean() + 2 * _error(further) < 0:
                out.below.append(f"{key[0]} {key[1]} {further.mean():+.3f}")
    noisy = [line for line in ours.values() if "noise" in line]
    if noisy:
        ends = np.array([np.mean(line["noise_end"]) for line in noisy])
        out.noise = float(np.mean([np.mean(line["noise"]) for line in noisy]))
        out.noise_end, out.quiet = float(ends.mean()), float((ends < 0.5).mean())
    needless = needless_scenarios(lines, keys)
    if needless:
        left = [float(np.mean(ours[key]["budget_end"])) for key in needless]
        out.back, out.back_most = float(np.mean(left)), max(left)
        natural = [lines[(*key, "natural", SEEDS)] for key in needless if (*key, "natural", SEEDS) in lines]
        if len(natural) == len(needless):
            pairs = zip(needless, natural, strict=True)
            out.frequent = float(np.mean([np.mean(ours[k]["frequent"]) - np.mean(n["frequent"]) for k, n in pairs]))
    for family in dict.fromkeys(key[0] for key in keys):
        out.families[family] = float(np.mean([gain[key] for key in keys if key[0] == family]))
    return out


def needless_scenarios(lines: Lines, keys: list[Any]) -> list[Any]:
    """Scenarios without noise in which the equal split masters every rare task in half the run."""
    equal = {key: lines[(*key, "equal", SEEDS)] for key in keys}
    return [key for key in keys if "noise" not in equal[key] and equal[key]["half"] >= MASTERED]


def _error(values: Any) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def render(lines: Lines) -> str:
    """The tables: of all policies, and of families."""
    ran = dict.fromkeys(key[2] for key in lines)  # some of it may have left the code: the rule before
    verdicts = [verdict(lines, name) for name in dict.fromkeys([*ENTRIES, *ran]) if name in ran]
    heads = [
        "policy", "scenarios", "to equal, mean ± se", "lowest of 4 seeds", "below after 12 (lowest)",
        "noise, mean / end", "noise ends < .5", "budget at end, nobody needs it (most)", "frequent there, to natural",
    ]  # fmt: skip
    out = [_row(heads), _row(["---"] * len(heads))]
    for v in verdicts:
        below = f"{len(v.below)} ({v.lowest_further:+.3f})" if v.judged else ""
        out.append(_row([
            v.name, str(v.scenarios), f"{v.mean:+.4f} ± {v.error:.4f}", f"{v.lowest:+.3f}", below,
            f"{v.noise:.2f} / {v.noise_end:.2f}", f"{100 * v.quiet:.0f} %", f"{v.back:.2f} ({v.back_most:.2f})",
            f"{v.frequent:+.4f}",
        ]))  # fmt: skip
    keys = [key[:2] for key in lines if key[2:] == ("equal", SEEDS)]
    noisy = sum("noise" in lines[(*key, "equal", SEEDS)] for key in keys)
    out.append(
        f"\n{len(keys)} scenarios; {noisy} with noise; nobody needs it in {len(needless_scenarios(lines, keys))}."
    )
    out += [f"Below: {v.name}: {', '.join(v.below)}." for v in verdicts if v.below]
    families = list(dict.fromkeys(key[0] for key in keys))
    out += ["", _row(["to equal, by family", *families]), _row(["---"] * (1 + len(families)))]
    out += [_row([v.name, *(f"{v.families[f]:+.3f}" if f in v.families else "" for f in families)]) for v in verdicts]
    return "\n".join(out)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies.contract_table", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", default=[RESULTS])
    args = parser.parse_args()
    lines: dict[Any, dict[str, Any]] = {}
    for path in args.results:
        lines |= read(path)
    print(render(lines))


if __name__ == "__main__":
    main()
