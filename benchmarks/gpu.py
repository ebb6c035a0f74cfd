"""Everything that needs a GPU, in one command for whoever has one: ``python -m benchmarks.gpu``.

    part      what                                                            budget, seconds   timing of a case
    wgrad     weight gradients with per-task statistics (gpu_wgrad.py)              190               5
    streams   the kernels that memory limits (gpu_streams.py)                        90               2
    step      whole training steps (gpu_step.py)                                    190              20
    profile   kernel by kernel, a plain and tracked steps (not by default)           60               -

Each part is a process of its own, so a kernel that breaks the CUDA context ends one part only. A part writes
``results/gpu-<part>-<gpu>.json`` and ``.md`` after every case; when its budget is used up the cases that remain are
listed there as left out. Ceilings are measured at the beginning and at the end of each part, clocks and power are read
(never set). The command's status is 1 if a kernel was wrong or a part did not end.

    python -m benchmarks.gpu                                   # everything in about nine minutes
    python -m benchmarks.gpu --part wgrad --full --seconds 3000
    python -m benchmarks.gpu --part wgrad --only "d=4096x4096 N=8192 T=8" --without loop --without panelled
    python -m benchmarks.gpu --device cpu --tiny --out /tmp/tryout   # the harness itself, without a GPU
    python -m benchmarks.roofline                              # pictures from what was measured
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import gpu_step, gpu_streams, gpu_timing, gpu_wgrad, timing
from .gpu_timing import DeviceLost

BUDGETS = {"wgrad": 190.0, "streams": 90.0, "step": 190.0, "profile": 60.0}
DEFAULT = ("wgrad", "streams", "step")
PER_CASE = {"wgrad": 5.0, "streams": 2.0, "step": 20.0}  # seconds of timing
GRACE = 40.0  # seconds past its budget after which a part is ended


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(BUDGETS), help="default: " + " ".join(DEFAULT))
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--without", action="append", default=[], help="leave out variants whose name contains this")
    parser.add_argument("--full", action="store_true", help="the whole grid of shapes")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: to try the harness")
    parser.add_argument("--seconds", type=float, help="budget of each part chosen")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"benchmarks.gpu needs a CUDA GPU, and torch {torch.__version__} finds none. "
            "The CPU benchmarks run on their own, for example: python -m benchmarks.sum_gram"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    parts = args.part or list(DEFAULT)
    if args.inside:
        return run_part(parts[0], args)
    given = sys.argv[1:] if arguments is None else arguments
    results = {part: start_part(part, given, args.seconds or BUDGETS[part]) for part in parts}
    print("\n".join(f"{part}: {result}" for part, result in results.items()))
    return int(any(result != "ended well" for result in results.values()))


def start_part(part: str, given: list[str], budget: float) -> str:
    """Run one part in a process of its own."""
    # of several --part the process takes the first
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", "--part", part, *given]
    start = time.perf_counter()
    try:
        code = subprocess.run(command, timeout=budget + GRACE, cwd=timing.RESULTS.parents[1]).returncode
    except subprocess.TimeoutExpired:
        return f"ended after {budget + GRACE:.0f} s"
    took = time.perf_counter() - start
    print(f"--- {part}: {took:.0f} s", flush=True)
    return "ended well" if code == 0 else f"status {code}"


class Record:
    """What a part found so far, as JSON and as a table."""

    def __init__(self, part: str, args: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.stem = args.out / f"gpu-{part}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).lower()}"
        size = 64 if args.tiny else 8192
        self.size, self.seconds = size, 0.05 if args.tiny else 2.0
        self.found: dict[str, Any] = {
            "part": part,
            "measured": True,
            "machine": timing.machine(device),
            "gpu before": gpu_timing.gpu_state(),
            "ceilings": gpu_timing.ceilings(device, size, self.seconds),
            "rows": [],
            "left out": [],
            "failed": [],
        }

    @property
    def ceilings(self) -> dict[str, float]:
        return self.found["ceilings"]

    def add(self, row: dict[str, Any]) -> None:
        self.found["rows"].append(row)
        for name, variant in row["variants"].items():
            if "failed" in variant:
                self.found["failed"].append(f"{row['case']}, {name}: {variant['failed']}")
        print("\n".join(table(row)), flush=True)
        self.write()

    def close(self) -> None:
        self.found["gpu after"] = gpu_timing.gpu_state()
        self.found["ceilings after"] = gpu_timing.ceilings(self.device, self.size, self.seconds)
        self.write()
        for line in self.found["failed"]:
            print(f"FAILED {line}")
        for line in self.found["left out"]:
            print(f"left out: {line}")
        print(f"written to {self.stem}.json and .md")

    def write(self) -> None:
        scratch = self.stem.with_suffix(".part")
        scratch.write_text(json.dumps(self.found, indent=1) + "\n")
        scratch.replace(self.stem.with_suffix(".json"))
        self.stem.with_suffix(".md").write_text("\n".join(self.page()) + "\n")

    def page(self) -> Iterator[str]:
        machine = self.found["machine"]
        yield f"# {self.found['part']}: measured on {machine.get('gpu', machine['cpu'])}, {machine['date']}"
        yield ""
        yield f"torch {machine['torch']}, triton {machine.get('triton', '-')}, CUDA {machine.get('cuda', '-')}."
        limits = self.ceilings
        yield (
            f"Ceilings: {limits['bf16']:.0f} TFLOP/s (bf16), {limits['fp32']:.1f} (fp32), {limits['fp64']:.1f} (fp64), "
            f"copy {limits['copy']:.0f} GB/s."
        )
        yield "GPU before: " + (", ".join(f"{k} {v}" for k, v in self.found["gpu before"].items()) or "unknown") + "."
        for row in self.found["rows"]:
            yield ""
            yield from table(row)
        for kind in ("failed", "left out"):
            if self.found[kind]:
                yield f"\n## {kind}\n"
                yield from (f"- {line}" for line in self.found[kind])


def table(row: dict[str, Any]) -> Iterator[str]:
    """One case in Markdown: the variants with their medians."""
    yield f"## {row['case']}"
    yield ""
    columns = ["variant", "ms", "p20-p80", "x baseline", "TFLOP/s", "GB/s", "of ceiling", "host ms", "memory", "error"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for name, found in row["variants"].items():
        if "ms" not in found:
            why = found.get("failed") or found.get("not timed") or "not timed"
            yield f"| {name} | {why} |" + " |" * (len(columns) - 2)
            continue
        low, middle, high = found["ms"]
        size = found.get("extra bytes", found.get("peak bytes"))
        errors = list(found.get("error", {}).values()) + [found[k] for k in ("gram error",) if k in found]
        cells = [
            name,
            f"{middle:.4g}",
            f"{low:.4g}-{high:.4g}",
            f"{found['ratio'][1]:.3f}",
            *(f"{found[key]:.4g}" if key in found else "" for key in ("TFLOP/s", "GB/s")),
            f"{100 * found['of ceiling']:.0f} %" if "of ceiling" in found else "",
            f"{found['host ms']:.3g}",
            "" if size is None else f"{size / 2**20:.0f} MiB",
            f"{max(errors):.0e}" if errors else "",
        ]
        yield "| " + " | ".join(cells) + " |"


def run_part(part: str, args: argparse.Namespace) -> int:
    start = time.perf_counter()
    device = torch.device(args.device)
    budget = args.seconds or BUDGETS[part]
    record = Record(part, args, device)
    lost = False
    for name, measure in work(part, args, device, record):
        if args.only and args.only not in name:
            continue
        if lost or time.perf_counter() - start > budget:
            record.found["left out"].append(name)
            continue
        try:
            record.add(measure())
        except DeviceLost as error:
            lost = True
            record.found["failed"].append(f"{name}: the GPU was lost: {error}")
        except Exception as error:  # a broken case must not cost the others
            record.found["failed"].append(f"{name}: {gpu_timing.describe(error)}")
            record.write()
    if lost:
        record.write()
        print("\n".join(record.found["failed"]))
        return 1
    record.close()
    return int(bool(record.found["failed"]))


def work(part: str, args: argparse.Namespace, device: torch.device, record: Record) -> Iterator[tuple[str, Any]]:
    """Names and measurements of a part, lazily: a case holds tensors."""
    seconds = 0.01 if args.tiny else PER_CASE.get(part, 0.0)
    if part in ("step", "profile"):
        for plan in gpu_step.TINY if args.tiny else gpu_step.PLANS:
            if part == "step":
                yield plan.name, lambda p=plan: gpu_step.measure(p, device, seconds, tuple(args.without))
            else:
                path = record.stem.with_name(f"{record.stem.name}-{plan.name.replace(' ', '-').lower()}.txt")
                yield plan.name, lambda p=plan, f=path: profiled(p, device, f)
        return
    if part == "wgrad":
        shapes = gpu_wgrad.TINY if args.tiny else gpu_wgrad.FULL if args.full else gpu_wgrad.DEFAULT
        makers = gpu_wgrad.cases(shapes, device)
    else:
        sizes = gpu_streams.TINY if args.tiny else gpu_streams.FULL if args.full else gpu_streams.DEFAULT
        makers = gpu_streams.cases(sizes, device)
    for name, make in makers:
        yield name, lambda m=make: gpu_timing.measure(m(), device, record.ceilings, seconds, args.without)


def profiled(plan: gpu_step.Plan, device: torch.device, path: Path) -> dict[str, Any]:
    gpu_step.profile(plan, device, path)
    return {"case": plan.name, "file": path.name, "variants": {}}


if __name__ == "__main__":
    sys.exit(main())
