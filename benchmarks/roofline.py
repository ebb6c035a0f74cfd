"""What arithmetic says of the GPU goals, and a picture of what was measured.

    python -m benchmarks.roofline

writes ``results/gpu-arithmetic.md``: every goal with what bytes and operations predict at the rates stated there.
Nothing in it is measured. Where ``benchmarks.gpu`` left measurements in ``results/``, they are drawn under the ceilings
of the same run, ``results/gpu-roofline-<gpu>.svg`` (needs matplotlib).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .gpu_step import PLANS, Plan
from .gpu_wgrad import GOAL
from .models import Decoder
from .timing import RESULTS

RANK, SKETCH_DIM = 32, 1024


@dataclass(frozen=True)
class Rates:
    """Rates that times are computed from, operations and bytes per second.

    Attributes:
        half: bfloat16 products. Public cuBLAS runs on an H100: 595 at 4096³, 646 at 4096 x 8192 (pytorch#184886).
        double: float64 products on vector units (datasheet of the H100 SXM).
        memory: nine tenths of the 3.35 TB/s of the datasheet.
        cache: L2, as published micro-benchmarks find it for reads; not checked here.
        step: share of the datasheet's 989 TFLOP/s that a well-kept training step reaches over its linear layers.
        fused: share of ``half`` that a Triton main loop on 128 x 128 tiles reaches: the assumption with most in it.
    """

    half: float = 600e12
    double: float = 34e12
    memory: float = 3.0e12
    cache: float = 5.5e12
    step: float = 0.40 * 989e12
    fused: float = 0.85


@dataclass(frozen=True)
class Estimate:
    """One goal: what is added to what, in microseconds, and what that makes."""

    goal: str
    limit: float
    low: float
    high: float
    how: str


def dense(d_in: int, d_out: int, N: int, rates: Rates) -> float:
    """Seconds of dYᵀ X."""
    return max(2.0 * N * d_in * d_out / rates.half, 2.0 * (N * (d_in + d_out) + d_in * d_out) / rates.memory)


def sketch_extra(d_in: int, d_out: int, N: int, S: int, rates: Rates) -> float:
    """Seconds of U = dY L and V = X R (read dY and X, write U and V in float32), and of their products by segment."""
    skinny = max(
        2.0 * N * (d_in + d_out) * RANK / rates.half, (2.0 * N * (d_in + d_out) + 8.0 * N * RANK) / rates.memory
    )
    return skinny + (8.0 * N * RANK + 4.0 * S * RANK * RANK) / rates.memory


def gram_extra(d_in: int, d_out: int, S: int, rates: Rates) -> tuple[float, float]:
    """Seconds that ``wgrad_gram`` adds to its own product: the Gram's products (segments padded to 16), and the parts
    written to L2 and read back, at most all of it in sequence."""
    padded = -(-S // 16) * 16
    return 2.0 * padded**2 * d_in * d_out / rates.half, 2 * 2.0 * S * d_in * d_out / rates.cache


def materialise_extra(d_in: int, d_out: int, T: int, item: int, rates: Rates) -> float:
    """Seconds to write and read T gradients once."""
    return 2.0 * item * T * d_in * d_out / rates.memory


def linears(plan: Plan) -> list[tuple[int, int]]:
    with torch.device("meta"):
        model = Decoder(plan.setting)
    return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]


def shapes(plan: Plan) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in Decoder(plan.setting).parameters()]


def plain_step(plan: Plan, rates: Rates) -> float:
    rows = plan.setting.batch * plan.setting.length
    return sum(6.0 * rows * a * b for a, b in linears(plan)) / rates.step


def theta_extra(plan: Plan, rates: Rates) -> float:
    """Seconds to sketch every parameter in float64, once a step: bytes, or products on the vector units."""
    item = 4 if plan.precision == "autocast" else 2
    total = 0.0
    for shape in shapes(plan):
        if len(shape) == 2:
            d0, d1 = shape
            total += max(item * d0 * d1 / rates.memory, 2.0 * d0 * RANK * (d1 + RANK) / rates.double)
    return total


def step_estimates(plan: Plan, rates: Rates) -> Iterator[Estimate]:
    s = plan.setting
    rows, S = s.batch * s.length, s.tasks + 1
    plain = plain_step(plan, rates)
    layers = sum(sketch_extra(a, b, rows, S, rates) for a, b in linears(plan))
    theta = theta_extra(plan, rates)
    yield Estimate(
        f"whole step, sketch, {plan.name}",
        1.05,
        1 + layers / plain,
        1 + (layers + theta) / plain,
        f"plain {plain * 1e3:.1f} ms; linear layers +{layers * 1e3:.2f} ms; float64 sketch of the parameters "
        f"+{theta * 1e3:.2f} ms, hidden or amortised (low), or not (high)",
    )
    product = sum(dense(a, b, rows, rates) for a, b in linears(plan))
    gram = [gram_extra(a, b, S, rates) for a, b in linears(plan)]
    low = sum(g for g, _ in gram)
    high = product * (1 / rates.fused - 1) + sum(g + c for g, c in gram)
    yield Estimate(
        f"whole step, exact, {plan.name}",
        1.15,
        1 + low / plain,
        1 + (layers + theta + high) / plain,
        f"weight gradients {product * 1e3:.1f} ms of the plain step; Gram only (low), or main loop at "
        f"{rates.fused:.0%}, L2 not overlapped, and the sketch (high)",
    )


def memory_estimate(plan: Plan) -> Estimate:
    """Bytes of sketch mode over those of parameters, gradients and AdamW; activations, which only help, left out."""
    s = plan.setting
    item = 4 if plan.precision == "autocast" else 2
    every = shapes(plan)
    numel = sum(torch.Size(shape).numel() for shape in every)
    columns = sum(min(SKETCH_DIM, torch.Size(shape).numel()) for shape in every)
    maps = sum(4 * RANK * sum(shape) for shape in every if len(shape) == 2)
    # taps, their gradients, the gradient block and its report; the memory; parameters before and after in float64
    state = 4 * columns * (4 * (s.tasks + 1) + 2 * s.tasks) + 4 * 8 * columns
    base = 4 * item * numel
    return Estimate(
        f"extra memory, sketch, {plan.name}",
        1.03,
        1 + (maps + state) / (base * 3),
        1 + (maps + state) / base,
        f"{maps / 2**20:.0f} MiB of sketch matrices, {state / 2**20:.0f} MiB of columns, on {base / 2**30:.1f} GiB of "
        "parameters, gradients and AdamW (high; low: activations twice that)",
    )


def estimates(rates: Rates) -> Iterator[Estimate]:
    d_in, d_out, N, T = GOAL
    base = dense(d_in, d_out, N, rates)
    where = f"d = {d_in}, N = {N}, T = {T}"
    extra = sketch_extra(d_in, d_out, N, T + 1, rates)
    yield Estimate(
        f"wgrad_sketch, {where}",
        1.10,
        1 + extra / base,
        1 + extra / base,
        f"dense {base * 1e6:.0f} µs; U, V and their products +{extra * 1e6:.0f} µs, of which dY and X read once more "
        f"{2e6 * N * (d_in + d_out) / rates.memory:.0f} µs. The share goes as 1 / d: at 2048 it makes "
        f"{ratio_at(2048, N, T, rates):.2f}",
    )
    gram, cache = gram_extra(d_in, d_out, T + 1, rates)
    yield Estimate(
        f"wgrad_gram, {where}",
        1.25,
        1 + gram / base,
        1 / rates.fused + (gram + cache) / base,
        f"Gram products +{gram * 1e6:.0f} µs at the rate of cuBLAS (low); main loop at {rates.fused:.0%} of it and "
        f"{cache * 1e6:.0f} µs of L2 traffic that nothing overlaps (high)",
    )
    for item, name in ((2, "bfloat16"), (4, "float32")):
        ratio = 1 + materialise_extra(d_in, d_out, T, item, rates) / base
        yield Estimate(f"(materialise in {name}, {where})", float("nan"), ratio, ratio, "T gradients written and read")
    for plan in PLANS[:2]:
        yield from step_estimates(plan, rates)
        yield memory_estimate(plan)


def ratio_at(d: int, N: int, T: int, rates: Rates) -> float:
    return 1 + sketch_extra(d, d, N, T + 1, rates) / dense(d, d, N, rates)


def page(rates: Rates) -> str:
    """The table in Markdown."""
    lines = [
        "# The GPU goals by arithmetic: computed, not measured",
        "",
        "Written by `python -m benchmarks.roofline`. Every number below is bytes and operations divided by the rates",
        "stated here; none of it was timed. What was measured, if there is any, is in `gpu-*.json` in this folder.",
        "",
        f"Rates (H100 SXM): bfloat16 products {rates.half / 1e12:.0f} TFLOP/s (public cuBLAS runs), memory "
        f"{rates.memory / 1e12:.1f} TB/s, L2 {rates.cache / 1e12:.1f} TB/s (assumed), float64 "
        f"{rates.double / 1e12:.0f} TFLOP/s, a plain step at {rates.step / 989e12:.0%} of 989 TFLOP/s over its linear "
        f"layers (assumed; a slower one makes the ratios smaller), fused main loop at {rates.fused:.0%} of cuBLAS "
        "(assumed).",
        "",
        "| what | goal, x | computed, x | within the goal | how |",
        "| --- | --- | --- | --- | --- |",
    ]
    for e in estimates(rates):
        spread = f"{e.low:.2f}" if round(e.low, 2) == round(e.high, 2) else f"{e.low:.2f} to {e.high:.2f}"
        verdict = (
            "" if e.limit != e.limit else "yes" if e.high < e.limit + 5e-3 else "no" if e.low > e.limit else "open"
        )
        limit = "" if e.limit != e.limit else f"{e.limit:.2f}"
        lines.append(f"| {e.goal} | {limit} | {spread} | {verdict} | {e.how} |")
    return "\n".join(lines) + "\n"


def measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What ``benchmarks.gpu`` wrote on GPUs, by GPU; runs on a CPU, which only try the harness, do not count."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("gpu-*.json")):
        run = json.loads(path.read_text())
        if run.get("measured") and run["part"] in ("wgrad", "streams") and "gpu" in run["machine"]:
            found.setdefault(run["machine"]["gpu"], []).append(run)
    return found


def draw(gpu: str, runs: list[dict[str, Any]], path: Path) -> None:
    """Operations per byte against TFLOP/s, one point a case and kernel, under the ceilings of the same run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    limits = runs[0]["ceilings"]
    intensity = [10 ** (i / 20 - 1) for i in range(110)]
    for name, style in (("bf16", "-"), ("fp32", "--"), ("fp64", ":")):
        line = [min(limits[name], x * limits["copy"] / 1e3) for x in intensity]
        axes.plot(intensity, line, style, color="black", linewidth=1, label=f"{name}, {limits[name]:.0f} TFLOP/s")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in (row for run in runs for row in run["rows"]):
        stem = row["case"].split()[0]
        for name, found in row["variants"].items():
            if "ms" in found and found["GB/s"]:
                label = name if stem == "wgrad" else f"{stem}, {name}"
                points.setdefault(label, []).append((1e3 * found["TFLOP/s"] / found["GB/s"], found["TFLOP/s"]))
    ours = [label for label in points if not label.endswith(("torch", "index_add"))]
    for number, label in enumerate(ours):
        x, y = zip(*points[label], strict=True)
        axes.plot(x, y, "o^sDvP*X"[number % 8], markersize=5, label=label, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte (of what cannot be avoided)", ylabel="TFLOP/s")
    axes.set_title(f"Measured on {gpu}, {runs[0]['machine']['date']}")
    axes.legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    text = page(Rates())
    (args.out / "gpu-arithmetic.md").write_text(text)
    print(text)
    found = measured(args.out)
    if not found:
        print("no measured run in results/: nothing to draw")
    elif importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: nothing drawn")
    else:
        for gpu, runs in found.items():
            path = args.out / f"gpu-roofline-{'-'.join(gpu.lower().split())}.svg"
            draw(gpu, runs, path)
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
