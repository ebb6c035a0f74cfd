"""Everything that needs a GPU, in three calls of under ten minutes each: ``python -m benchmarks.gpu --call 1``.

    call  part        what                                                                   seconds at most
    1     doctor      versions, device, kernels in force                                                  30
          kernels     every kernel on small shapes against float64; compiles them                        100
          tests       pytest -m gpu, but what is compiled by torch or repeated                           140
          gpt2        whole steps of GPT-2, 8 x 1024 tokens (gpu_step.py)                                160
          gpt2-32k    the same at 32 x 1024, without T backwards                                         130
    2     profile     kernel by kernel, with launch counts, a plain and tracked steps of GPT-2            90
          wgrad       weight gradients with per-task statistics, T = 8 (gpu_wgrad.py)                    210
          streams     the kernels that memory limits, sketch_params first (gpu_streams.py)               180
    3     1b          whole steps of a stack of a billion parameters                                     170
          wgrad-more  T = 32 and 128, N = 32768                                                          130
          tests-slow  pytest -m gpu, what is compiled by torch or repeated                               170
          memcheck    the kernels under compute-sanitizer                                                 90

Each part is a process of its own, ended when its time is up, so a kernel that hangs or breaks the CUDA context ends one
part only. Its lines go to ``<out>/<part>.log`` as they come; measurements are in ``<out>/gpu-<part>-<gpu>.json`` and
``.md`` after every case, of a whole step after every variant. A case is checked before it is timed, so a wrong kernel
costs its own times and no others. Called again with the same ``--out``, what ended well is left out, and so are the
cases that are there. Ceilings are measured at the beginning and at the end of each part, clocks and power are read
(never set). The command's status is 1 if a kernel was wrong or a part did not end.

    python -m benchmarks.gpu --call 1 --out /tmp/gpu
    python -m benchmarks.gpu                                   # all three
    python -m benchmarks.gpu --part wgrad --full --seconds 3000
    python -m benchmarks.gpu --part wgrad --only "d=4096x4096 N=8192 T=8" --without loop --without panelled
    python -m benchmarks.gpu --call 2 --device cpu --tiny --out /tmp/tryout   # the harness itself, without a GPU
    python -m benchmarks.roofline                              # pictures from what was measured
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import gpu_step, gpu_streams, gpu_timing, gpu_wgrad, timing
from .gpu_timing import DeviceLost

KINDS = ("wgrad", "streams", "step", "profile")  # that measure, in this module
PER_CASE = {"wgrad": 5.0, "streams": 2.0, "step": 20.0}  # seconds of timing
CALL_SECONDS = 570.0
GRACE = 30.0  # seconds at the end of a part in which no case begins
AT_LENGTH = "compiled or repeat or cuda_graph or sanitizer"  # tests that torch compiles something for, or repeat


@dataclass(frozen=True)
class Part:
    """A process: one of ``KINDS`` with options of this module, or a command of its own.

    Attributes:
        name: of its files.
        kind: what it measures; ``None`` for a command.
        seconds: after which it is ended.
        options: of this module, or the arguments of Python.
    """

    name: str
    kind: str | None
    seconds: float
    options: tuple[str, ...] = ()

    def command(self, given: list[str], device: str) -> list[str]:
        if self.kind is None:
            return [sys.executable, *(device if option == "DEVICE" else option for option in self.options)]
        inside = ["--inside", "--part", self.kind, "--name", self.name, "--seconds", str(self.seconds)]
        # of several --part and --name the process takes the first, of others the last
        return [sys.executable, "-m", "benchmarks.gpu", *inside, *self.options, *given]


PYTEST = ("-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-o", "filterwarnings=default", "-k")
CALLS: dict[int, tuple[Part, ...]] = {
    1: (
        Part("doctor", None, 30, ("-c", "import sys, taskgrad.cli; sys.exit(taskgrad.cli.main(['doctor']))")),
        Part("kernels", None, 100, ("-m", "benchmarks.sanitize", "--inside", "--device", "DEVICE")),
        Part("tests", None, 140, (*PYTEST, f"not ({AT_LENGTH})")),
        Part("gpt2", "step", 160, ("--only", "GPT-2 8k")),
        Part("gpt2-32k", "step", 130, ("--only", "GPT-2 32k", "--without", "T backwards", "--without", "torchjd")),
    ),
    2: (
        Part("profile", "profile", 90, ("--only", "GPT-2 8k")),
        Part("wgrad", "wgrad", 210, ("--only", "N=8192 T=8", "--only", "N=2048 T=8")),
        Part("streams", "streams", 180),
    ),
    3: (
        Part("1b", "step", 170, ("--only", "1B stack", "--without", "torchjd")),
        Part("wgrad-more", "wgrad", 130, ("--only", "T=32", "--only", "T=128", "--only", "N=32768")),
        Part("tests-slow", None, 170, (*PYTEST, AT_LENGTH)),
        Part("memcheck", None, 90, ("-m", "benchmarks.sanitize", "--tool", "memcheck")),
    ),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, action="append", choices=list(CALLS), help="default: all, one by one")
    parser.add_argument("--part", action="append", choices=KINDS, help="one kind of measurement alone, all cases")
    parser.add_argument("--only", action="append", default=[], help="cases whose name contains this")
    parser.add_argument("--without", action="append", default=[], help="leave out variants whose name contains this")
    parser.add_argument("--full", action="store_true", help="the whole grid of shapes")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, all of them: to try the harness")
    parser.add_argument("--seconds", type=float, help="time of each part chosen by --part, default 300")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=timing.RESULTS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--name", action="append", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"benchmarks.gpu needs a CUDA GPU, and torch {torch.__version__} finds none. "
            "The CPU benchmarks run on their own, for example: python -m benchmarks.sum_gram"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    if args.inside:
        return run_part(args.part[0], args)
    if args.part:
        chosen = [tuple(Part(kind, kind, args.seconds or 300.0) for kind in args.part)]
    else:
        chosen = [CALLS[call] for call in args.call or CALLS]
    shared = ["--device", args.device, "--out", str(args.out.resolve())]
    shared += [flag for flag in ("--full", "--tiny") if getattr(args, flag[2:])]
    for kind in ("only", "without"):
        shared += [word for value in getattr(args, kind) for word in (f"--{kind}", value)]
    good = True
    for parts in chosen:
        good &= run_call(parts, shared, args.device, args.out, None if args.part else CALL_SECONDS)
    return int(not good)


def run_call(parts: tuple[Part, ...], shared: list[str], device: str, out: Path, seconds: float | None) -> bool:
    """Run what has not ended well before; whether all has now. ``<out>/parts.json`` keeps how each part ended."""
    kept = out / "parts.json"
    results: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    start = time.perf_counter()
    for part in parts:
        if results.get(part.name) == "ended well":
            print(f"--- {part.name}: ended well before", flush=True)
            continue
        left = part.seconds if seconds is None else min(part.seconds, seconds - (time.perf_counter() - start))
        results[part.name] = run_process(part, shared, device, out, left) if left > 1 else "left out, no time was left"
        scratch = kept.with_suffix(".part")
        scratch.write_text(json.dumps(results, indent=1) + "\n")
        scratch.replace(kept)
    print("\n".join(f"{part.name}: {results[part.name]}" for part in parts), flush=True)
    return all(results[part.name] == "ended well" for part in parts)


def run_process(part: Part, shared: list[str], device: str, out: Path, seconds: float) -> str:
    """Run one part, its lines to the terminal and to its log as they come; how it ended."""
    print(f"--- {part.name}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(
        part.command(shared, device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=timing.RESULTS.parents[1],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started holds its output open

    def end() -> None:
        late.set()
        kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        with process.stdout, (out / f"{part.name}.log").open("w") as log:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
        code = process.wait()
    finally:
        timer.cancel()
        if process.returncode is None:  # interrupted
            kill()
    print(f"--- {part.name}: {time.perf_counter() - start:.0f} s", flush=True)
    if late.is_set():
        return f"ended after {seconds:.0f} s"
    return "ended well" if code == 0 else f"status {code}"


class Record:
    """What a part found so far, as JSON and as a table."""

    def __init__(self, part: str, args: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        name = args.name[0] if args.name else part
        self.stem = args.out / f"gpu-{name}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).lower()}"
        size = 64 if args.tiny else 8192
        self.size, self.seconds = size, 0.05 if args.tiny else 2.0
        self.found: dict[str, Any] = {
            "part": part,
            "measured": True,
            "machine": timing.machine(device),
            "gpu before": gpu_timing.gpu_state(),
            "ceilings": gpu_timing.ceilings(device, size, self.seconds),
            "rows": self.before(),
            "left out": [],
            "failed": [],
        }
        self.write()

    def before(self) -> list[dict[str, Any]]:
        """The cases that an earlier run of the part came to an end with, and with no variant that failed."""
        path = self.stem.with_suffix(".json")
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        return [r for r in rows if not r.get("partial") and not any("failed" in v for v in r["variants"].values())]

    @property
    def ceilings(self) -> dict[str, float]:
        return self.found["ceilings"]

    def has(self, name: str) -> bool:
        return any(row["case"] == name for row in self.found["rows"])

    def partial(self, row: dict[str, Any]) -> None:
        """Keep what is known of a case that is not through."""
        self.found["rows"] = [r for r in self.found["rows"] if r["case"] != row["case"]] + [{**row, "partial": True}]
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        self.found["rows"] = [r for r in self.found["rows"] if r["case"] != row["case"]] + [row]
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
            f"{found['ratio'][1]:.3f}" if "ratio" in found else "",
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
    budget = (args.seconds or 300.0) - GRACE
    record = Record(part, args, device)
    lost = False
    for name, measure in work(part, args, device, record):
        if (args.only and not args.tiny and not any(only in name for only in args.only)) or record.has(name):
            continue
        if lost or time.perf_counter() - start > budget:
            record.found["left out"].append(name)
            record.write()
            continue
        try:
            record.add(measure())
        except DeviceLost as error:
            lost = True
            record.found["failed"].append(f"{name}: the GPU was lost: {error}")
            record.write()
        except Exception as error:  # a broken case must not cost the others
            record.found["failed"].append(f"{name}: {gpu_timing.describe(error)}")
            record.write()
    if lost:
        print("\n".join(record.found["failed"]))
        return 1
    record.close()
    return int(bool(record.found["failed"]))


def work(part: str, args: argparse.Namespace, device: torch.device, record: Record) -> Iterator[tuple[str, Any]]:
    """Names and measurements of a part, lazily: a case holds tensors."""
    seconds = 0.01 if args.tiny else PER_CASE.get(part, 0.0)
    if part in ("step", "profile"):
        for plan in gpu_step.TINY if args.tiny else (*gpu_step.PLANS, *gpu_step.LONGER):
            if part == "step":
                without = tuple(args.without)
                yield plan.title, lambda p=plan, w=without: gpu_step.measure(p, device, seconds, w, record.partial)
            else:
                path = record.stem.with_name(f"{record.stem.name}-{plan.name.replace(' ', '-').lower()}.txt")
                yield plan.title, lambda p=plan, f=path: profiled(p, device, f)
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
    return {"case": plan.title, "file": path.name, "variants": {}}


if __name__ == "__main__":
    sys.exit(main())
