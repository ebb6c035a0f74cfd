"""The contract's table from the lines that ``contract`` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from .contract import BELOW, FURTHER, RESULTS, SEEDS, read


def summary(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    by = {(x["family"], x["scenario"], x["policy"], tuple(x["seeds"])): x for x in lines}
    keys = [(f, n) for f, n, p, s in by if p == name and s == tuple(SEEDS)]
    get = lambda key, policy, seeds=SEEDS: by[(*key, policy, tuple(seeds))]
    diff = {key: np.subtract(get(key, name)["rare"], get(key, "equal")["rare"]) for key in keys}
    below, lowest = [], 0.0
    for key in keys:
        if diff[key].mean() <= BELOW and (*key, name, tuple(FURTHER)) in by:
            d = np.subtract(get(key, name, FURTHER)["rare"], get(key, "equal", FURTHER)["rare"])
            mean, se = d.mean(), d.std(ddof=1) / len(d) ** 0.5
            lowest = min(lowest, mean)
            if mean <= BELOW and mean + 2 * se < 0:
                below.append((key, round(float(mean), 3)))
    means = np.array([diff[key].mean() for key in keys])
    noisy = [get(key, name) for key in keys if "noise" in get(key, name)]
    needless = [key for key in keys if "noise" not in get(key, "equal") and get(key, "equal")["half"] >= 0.98]
    out = {
        "n": len(keys),
        "mean": means.mean(),
        "se": means.std(ddof=1) / len(means) ** 0.5,
        "below": below,
        "lowest": lowest,
        "worst4": means.min(),
        "noise": np.mean([np.mean(x["noise"]) for x in noisy]) if noisy else np.nan,
        "noise_end": np.mean([np.mean(x["noise_end"]) for x in noisy]) if noisy else np.nan,
        "noise_ok": np.mean([np.mean(x["noise_end"]) < 0.5 for x in noisy]) if noisy else np.nan,
        "needless": len(needless),
        "give_back": np.mean([np.mean(get(k, name)["budget_end"]) for k in needless]) if needless else np.nan,
        "worst_back": np.max([np.mean(get(k, name)["budget_end"]) for k in needless]) if needless else np.nan,
        "families": {
            f: np.mean([diff[k].mean() for k in keys if k[0] == f]) for f in dict.fromkeys(k[0] for k in keys)
        },
    }
    if needless and (*needless[0], "natural", tuple(SEEDS)) in by:
        out["frequent"] = np.mean(
            [np.mean(get(k, name)["frequent"]) - np.mean(get(k, "natural")["frequent"]) for k in needless]
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies.contract_table", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", default=[RESULTS])
    args = parser.parse_args()
    lines = [x for path in args.results for x in read(path)]
    for name in dict.fromkeys(x["policy"] for x in lines):
        o = summary(lines, name)
        print(
            f"{name:28s} n {o['n']} {o['mean']:+.4f} ± {o['se']:.4f} below {len(o['below'])} low12 {o['lowest']:+.3f} worst4 {o['worst4']:+.3f} | noise {o['noise']:.2f} end {o['noise_end']:.2f} ok {o['noise_ok']:.2f} | back({o['needless']}) {o['give_back']:.2f} max {o['worst_back']:.2f} freq {o.get('frequent', np.nan):+.4f} | "
            + " ".join(f"{f} {v:+.3f}" for f, v in o["families"].items())
            + f" {o['below']}"
        )


if __name__ == "__main__":
    main()
