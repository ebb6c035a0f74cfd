"""Command line: one run, one JSON line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskgrad.sampling.policies import OverwriteBoost, Proportional, Shuffled, Uniform

from . import text
from .controls import LossDriven, equal, replay
from .parity import SETTINGS
from .train import train

RESULTS = Path("benchmarks/results/policies.jsonl")
POLICIES = ("natural", "equal", "loss", "uniform", "OverwriteBoost", "replay", "shuffled")


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line, or ``arguments``, asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--setting", choices=("text", *SETTINGS), required=True)
    parser.add_argument("--policy", choices=POLICIES, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=None, help="default: the setting's")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"JSON lines (default {RESULTS})")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.setting == "text":
        natural, budget, steps = text.natural(args.seed), text.DIVERTED, args.steps or text.STEPS
    else:
        setting = SETTINGS[args.setting]
        natural, budget, steps = setting.sizes / setting.sizes.sum(), setting.budget, args.steps or setting.steps
    policy = build(args.policy, args.seed, natural, budget, lambda: _mean_of(args.out, args.setting, args.seed, steps))
    guarded = args.policy not in ("natural", "uniform")
    run: dict[str, Any]
    if args.setting == "text":
        run = text.train(policy, args.seed, steps)
    else:
        run = asdict(train(setting, policy, args.seed, steps, guarded))
    line = {"setting": args.setting, "policy": args.policy, "seed": args.seed, "steps": steps, **run}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    accuracy = {kind: round(value, 3) for kind, value in run["curve"][-1].items()}
    print(f"{args.setting} {args.policy} {args.seed}: {accuracy}, {run['seconds']:.0f} s", flush=True)


def build(name: str, seed: int, natural: Any, budget: float, mean: Callable[[], Any]) -> Any:
    """The policy ``name``; ``mean()`` gives the average weights [T] of the run that ``replay`` is of."""
    policies: dict[str, Callable[[], Any]] = {
        "natural": Proportional,
        "equal": lambda: equal(natural),
        "loss": LossDriven,
        "uniform": Uniform,
        "OverwriteBoost": OverwriteBoost,
        "replay": lambda: replay(mean(), natural, budget),
        "shuffled": lambda: Shuffled(OverwriteBoost(), seed),
    }
    return policies[name]()


def _mean_of(path: Path, setting: str, seed: int, steps: int) -> Any:
    """Average weights [T] of the last run of ``OverwriteBoost`` in the file; raises SystemExit if there is none."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    wanted = {"setting": setting, "policy": "OverwriteBoost", "seed": seed, "steps": steps}
    found = [line["mean"] for line in lines if all(line[key] == value for key, value in wanted.items())]
    if not found:
        raise SystemExit(f"replay needs a run of {wanted} in {path}: run that first")
    return np.array(found[-1])


if __name__ == "__main__":
    main()
