"""The tables of docs/policy-log.md, from the lines that ``python -m benchmarks.policies`` wrote.

python -m benchmarks.policies.tables [benchmarks/results/policies.jsonl]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .__main__ import POLICIES, RESULTS

Floats = npt.NDArray[np.float64]
END = 0.1
"""Part of a run, at its end, that "end" columns are averaged over."""
OURS = "OverwriteBoost"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies.tables", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    print(render(lines))


def render(lines: list[dict[str, Any]]) -> str:
    """Markdown: for each setting a row per policy, and the paired differences to ``OverwriteBoost``."""
    out = []
    for setting in dict.fromkeys(line["setting"] for line in lines):
        runs = {(line["policy"], line["seed"]): line for line in lines if line["setting"] == setting}
        seeds = sorted({seed for _, seed in runs})
        found = list(dict.fromkeys([*POLICIES, *(policy for policy, _ in runs)]))  # some have left the code
        found = [policy for policy in found if any((policy, seed) in runs for seed in seeds)]
        equal = _diverted_noise(runs, "equal", seeds)
        out.append(f"\n### {setting}, seeds {', '.join(map(str, seeds))}\n")
        kinds = [kind for kind in runs[found[0], seeds[0]]["curve"][-1] if kind not in ("step", "noise")]
        heads = [
            "policy",
            "rare, by seed",
            "rare, mean",
            f"{OURS} − it",
            *kinds,
            "noise, mean (end)",
            "budget, mean (end)",
        ]
        out += [_row(heads), _row(["---"] * len(heads))]
        for policy in found:
            ours = [runs[policy, seed] for seed in seeds if (policy, seed) in runs]
            rare = np.array([rare_accuracy(run) for run in ours])
            pairs = [s for s in seeds if (policy, s) in runs and (OURS, s) in runs]
            gain = np.array([rare_accuracy(runs[OURS, s]) - rare_accuracy(runs[policy, s]) for s in pairs])
            cells = [policy, " ".join(f"{x:.3f}" for x in rare), f"{rare.mean():.3f}"]
            cells.append("" if policy == OURS or not len(gain) else f"{gain.mean():+.3f} ± {_spread(gain):.3f}")
            cells += [f"{np.mean([run['curve'][-1][kind] for run in ours]):.3f}" for kind in kinds]
            noise = [_over_natural(run) for run in ours]
            cells.append(_mean_and_end(noise, 1.0 / equal if equal else 0.0))
            cells.append(_mean_and_end([np.array(run["budget"]) for run in ours], 100.0, " %"))
            out.append(_row(cells))
    return "\n".join(out)


def rare_accuracy(run: dict[str, Any]) -> float:
    """Mean accuracy at the end over the rare tasks that can be learned."""
    pairs = zip(run["accuracy"], run["kinds"], strict=True)
    return float(np.mean([value for value, kind in pairs if kind not in ("frequent", "text", "noise")]))


def _over_natural(run: dict[str, Any]) -> Floats:
    """What the noise tasks had above their natural share, mean over them, at the points of the run."""
    noise = np.array(run["kinds"]) == "noise"
    shares = np.array(run["shares"])[:, noise]
    return np.asarray((shares - np.array(run["natural"])[noise]).mean(1))


def _diverted_noise(runs: dict[Any, dict[str, Any]], policy: str, seeds: list[int]) -> float:
    """The same under ``policy``, mean over the run and the seeds; 0 if it was not run."""
    found = [_over_natural(runs[policy, seed]).mean() for seed in seeds if (policy, seed) in runs]
    return float(np.mean(found)) if found else 0.0


def _mean_and_end(curves: list[Floats], scale: float, unit: str = "") -> str:
    last = np.mean([curve[-max(1, round(END * len(curve))) :].mean() for curve in curves])
    return f"{scale * np.mean([curve.mean() for curve in curves]):.2f} ({scale * last:.2f}){unit}"


def _spread(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
