"""Every kernel once on small odd shapes under NVIDIA's compute-sanitizer: no access out of bounds, no race.

    python -m benchmarks.sanitize                       # memcheck and racecheck; status 1 if one of them finds an error
    python -m benchmarks.sanitize --inside --device cpu  # what runs under it, without it

Out of bounds is what lies outside of an allocation, so torch's caching allocator, which makes few large ones, is turned
off. racecheck looks at shared memory only: races in global memory show as runs that differ, which ``benchmarks.gpu``
and ``pytest -m gpu`` look for. The results are checked against float64 as in ``benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys

import torch

from . import gpu_streams, gpu_timing, gpu_wgrad, timing

TOOLS = ("memcheck", "racecheck")
SECONDS = 600  # for each tool
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")

# one tile and a bit, two tiles, rows that do not fill a step, one row a task; 33 segments are three blocks of a Gram
SHAPES = [(130, 136, 70, 3), (24, 40, 9, 2), (136, 72, 66, 32)]
SIZES = gpu_streams.Sizes(
    blocks=((3, 1030), (33, 77)),
    rows=((130, 66, 3), (3, 5, 2)),
    embeddings=((50, 24, 66, 3),),
    memories=((3, 1030), (33, 70)),
    params=(70,),
)


def inside(device: torch.device) -> int:
    """Run and check this package's kernels; the number that failed."""
    failed = 0
    makers = [*gpu_wgrad.cases(SHAPES, device), *gpu_streams.cases(SIZES, device)]
    for name, make in makers:
        case = make()
        inputs = case.make(torch.Generator(device).manual_seed(0))
        truth = case.truth(*inputs)
        for variant, found in case.variants.items():
            if not found.ours:
                continue
            values = found.run(*inputs)
            errors = {key: gpu_timing.error_of(key, value, truth[key]) for key, value in values.items()}
            good = all(errors[key] <= found.tolerance[key] for key in errors)
            failed += not good
            print(f"{'ok' if good else 'WRONG':6}{name}, {variant}: {errors}", flush=True)
    return failed


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def under(tool: str) -> tuple[int | None, str]:
    """Errors that a tool of compute-sanitizer counted (``None``: it did not come to an end), and its output."""
    command = [sanitizer(), "--tool", tool, "--print-limit", "20", sys.executable, "-m", __spec__.name]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, "--inside"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment,
            cwd=timing.RESULTS.parents[1],
        )
    except subprocess.TimeoutExpired:
        return None, f"ended after {SECONDS} s"
    output = done.stdout + done.stderr
    return (None if done.returncode else errors_in(output)), output


def errors_in(output: str) -> int | None:
    """The count in the summary that ends the output of compute-sanitizer."""
    counts = [int(a or b) for a, b in SUMMARY.findall(output)]
    return max(counts) if counts else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--inside", action="store_true", help="run the kernels, without compute-sanitizer")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: " + " ".join(TOOLS))
    args = parser.parse_args(arguments)
    if args.inside:
        return int(inside(torch.device(args.device)) > 0)
    if sanitizer() is None or not torch.cuda.is_available():
        sys.exit("benchmarks.sanitize needs compute-sanitizer on PATH (it is in the CUDA toolkit) and a CUDA GPU")
    clean = True
    for tool in args.tool or TOOLS:
        count, output = under(tool)
        clean &= count == 0
        if count != 0:
            print(output[-6000:])
        print(f"{tool}: {'did not come to a good end' if count is None else f'{count} errors'}", flush=True)
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())
