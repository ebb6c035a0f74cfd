"""How kernels are timed on a GPU: checked first, then called in turn on cold caches, next to what the GPU can do.

- A variant gets a time only if its results agree with float64, from memory that was filled with NaN before. Kernels of
  this package must give the same bits once more after the timing.
- Variants are called in turn, round after round; percentiles are over rounds, ratios are of calls of the same round.
- Every call takes the next of several sets of random inputs, together more than three times the L2 cache, so what one
  call reads is not what an earlier one left there. No CUDA graphs: they replay on warm caches.
- CUDA events around the call, recorded behind a kernel that spins until the host has launched everything. Times are of
  the GPU alone; how long the host took to launch is given beside them.
- Ceilings are measured in the same process: a large matrix product of each precision and a large copy.
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]
Values = dict[str, Tensor]

WARMUP, MIN_ROUNDS, MAX_ROUNDS = 3, 5, 60
SPIN_LIMIT = 0.05  # seconds
SPIN_HZ = 2e9  # no GPU clocks higher: spinning lasts at least as long as asked for


class DeviceLost(RuntimeError):
    """A kernel broke the CUDA context: nothing more can run in this process."""


@dataclass(frozen=True)
class Variant:
    """One way to the results.

    Attributes:
        run: inputs to named results.
        tolerance: largest error allowed, by name of the result.
        ours: a kernel of this package (for the determinism check).
    """

    run: Callable[..., Values]
    tolerance: Mapping[str, float]
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """One shape and all variants of it.

    Attributes:
        name: for selection and for tables.
        shape: sizes, for the record.
        operations, traffic: floating-point operations and bytes that no variant can do without.
        unit: whose ceiling the operations are held against, ``bf16``, ``fp32`` or ``fp64``.
        make: a generator to one set of inputs.
        truth: one set of inputs to the results in float64.
        variants: by name.
        baseline: the variant the others are compared with.
    """

    name: str
    shape: Mapping[str, Any]
    operations: float
    traffic: float
    unit: str
    make: Callable[[torch.Generator], Inputs]
    truth: Callable[..., Values]
    variants: Mapping[str, Variant]
    baseline: str


def error_of(name: str, got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; of a Gram the largest error relative to the norms of its two vectors. ``want`` may have
    more segments than ``got`` (the empty one of rows without task, which no baseline needs)."""
    want = want[tuple(slice(n) for n in got.shape)]
    difference = got.double() - want
    if name == "gram":
        norms = want.diagonal().sqrt()
        return float((difference.abs() / (norms[:, None] * norms[None, :]).clamp(min=1e-300)).max())
    return float(difference.norm() / want.norm())


def measure(
    case: Case, device: torch.device, limits: Mapping[str, float], seconds: float, without: Sequence[str] = ()
) -> dict[str, Any]:
    """Check and time all variants of a case, for about ``seconds``; ``limits`` are the measured ``ceilings``.

    Raises:
        DeviceLost: after it no CUDA call works in this process.
    """
    names = [n for n in case.variants if n == case.baseline or not any(w in n for w in without)]
    sets = input_sets(case, device)
    truth = case.truth(*sets[0])
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, Values] = {}
    for name in names:
        variant = case.variants[name]
        try:
            values, found[name] = _checked(variant, sets[0], truth)
            if variant.ours:
                first[name] = {key: value.cpu() for key, value in values.items()}
            del values
            found[name]["extra bytes"] = extra_bytes(variant, sets[0], device)
        except Exception as error:
            kind = "not timed" if isinstance(error, torch.OutOfMemoryError) else "failed"
            found[name] = {kind: describe(error)}
            still_alive(device)
    del truth
    times: dict[str, list[float]] = {}
    runs = {name: case.variants[name].run for name in names if "error" in found[name]}  # checked, and right
    if runs:
        times, host = interleaved(runs, sets, device, seconds)
        base = times.get(case.baseline)
        for name, values_ms in times.items():
            found[name]["ms"] = percentiles(values_ms)
            if base is not None:
                found[name]["ratio"] = percentiles([a / b for a, b in zip(values_ms, base, strict=True)])
            found[name]["host ms"] = host[name]
            found[name] |= rates(case, found[name]["ms"][1], limits)
        for name, before in first.items():
            if name in runs and not _repeats(case.variants[name], sets[0], before):
                found[name] = {"failed": "not the same bits when called again"}
    rounds = max((len(values) for values in times.values()), default=0)
    return {"case": case.name, **case.shape, "sets": len(sets), "rounds": rounds, "variants": found}


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Sets of inputs that together are more than three times the L2 cache; two at least."""
    generator = torch.Generator(device).manual_seed(0)
    sets = [case.make(generator)]
    size = sum(t.numel() * t.element_size() for t in sets[0])
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = max(2, math.ceil(3 * cache / max(1, size)) + 1)
    return sets + [case.make(generator) for _ in range(count - 1)]


def _checked(variant: Variant, inputs: Inputs, truth: Values) -> tuple[Values, dict[str, Any]]:
    with poisoned_memory():
        values = variant.run(*inputs)
    errors = {}
    for key, value in values.items():
        if variant.ours and value.shape != truth[key].shape:
            raise ArithmeticError(f"{key} has shape {list(value.shape)}, not {list(truth[key].shape)}")
        errors[key] = error_of(key, value, truth[key])
        if not errors[key] <= variant.tolerance[key]:  # NaN fails
            raise ArithmeticError(f"{key} is off by {errors[key]:.1e}, allowed is {variant.tolerance[key]:.0e}")
    return values, {"error": errors}


def _repeats(variant: Variant, inputs: Inputs, before: Values) -> bool:
    again = variant.run(*inputs)
    return all(torch.equal(again[key].cpu(), value) for key, value in before.items())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills what ``torch.empty`` returns with NaN: results that a kernel did not write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def extra_bytes(variant: Variant, inputs: Inputs, device: torch.device) -> int | None:
    """Peak of memory allocated during the call, results included; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    variant.run(*inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def interleaved(
    runs: Mapping[str, Callable[..., Any]], sets: Sequence[Inputs], device: torch.device, seconds: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of every call by variant, and the median of what the host took to launch it."""
    host: dict[str, list[float]] = {name: [] for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    call, index, start = 0, 0, time.perf_counter()
    while index < WARMUP + MIN_ROUNDS or (index < WARMUP + MAX_ROUNDS and time.perf_counter() - start < seconds):
        pairs = {}
        for name, run in runs.items():
            inputs = sets[call % len(sets)]
            call += 1
            wait = 1.5 * max(host[name][-3:], default=0.0) + 2e-5
            pairs[name], took = _call(run, inputs, device, min(wait, SPIN_LIMIT) if index else 0.0)
            host[name].append(took)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= WARMUP:
            for name, (begin, end) in pairs.items():
                times[name].append(begin.elapsed_time(end) if device.type == "cuda" else (end - begin) * 1e3)
        index += 1
    return times, {name: round(statistics.median(values[WARMUP:]) * 1e3, 4) for name, values in host.items()}


def _call(run: Callable[..., Any], inputs: Inputs, device: torch.device, spin: float) -> tuple[tuple[Any, Any], float]:
    """Begin and end of a call, as CUDA events or seconds, and the seconds the host was busy with it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run(*inputs)
        end = time.perf_counter()
        return (begin, end), end - begin
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if spin:
        torch.cuda._sleep(int(spin * SPIN_HZ))
    events[0].record()
    begin = time.perf_counter()
    run(*inputs)
    took = time.perf_counter() - begin
    events[1].record()
    return events, took


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return round(tenths[1], 5), round(tenths[4], 5), round(tenths[7], 5)


def rates(case: Case, ms: float, limits: Mapping[str, float]) -> dict[str, float]:
    """TFLOP/s and GB/s of what cannot be avoided, and the share of the time that the ceilings allow at best."""
    best = max(case.operations / (limits[case.unit] * 1e12), case.traffic / (limits["copy"] * 1e9)) * 1e3
    return {
        "TFLOP/s": round(case.operations / ms / 1e9, 2),
        "GB/s": round(case.traffic / ms / 1e6, 1),
        "of ceiling": round(best / ms, 4),
    }


def ceilings(device: torch.device, size: int = 8192, seconds: float = 2.0) -> dict[str, float]:
    """What this GPU does now: TFLOP/s of a product of [size, size] matrices of random numbers (float32 without TF32),
    GB/s, read and written, of a copy; medians."""
    found = {}
    sizes = {"bf16": (torch.bfloat16, size), "fp32": (torch.float32, size // 2), "fp64": (torch.float64, size // 2)}
    for name, (dtype, n) in sizes.items():
        sets = [(torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype))]
        times, _ = interleaved({name: torch.mm}, sets, device, seconds / 4)
        found[name] = round(2 * n**3 / percentiles(times[name])[1] / 1e9, 3)
    source = torch.empty(size * size * 16, dtype=torch.int8, device=device).fill_(1)
    times, _ = interleaved({"copy": lambda a, b: b.copy_(a)}, [(source, source.clone())], device, seconds / 4)
    found["copy"] = round(2 * source.numel() / percentiles(times["copy"])[1] / 1e6, 3)
    return found


def gpu_state() -> dict[str, str]:
    """Clocks, power and their limits as ``nvidia-smi`` gives them now; empty where there is none. Nothing is set."""
    fields = "driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return {"nvidia-smi": describe(error)}
    first = output.splitlines()[0] if output else ""
    return dict(zip(fields.split(","), (value.strip() for value in first.split(",")), strict=False))


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def still_alive(device: torch.device) -> None:
    """After an exception: raise DeviceLost if it was one that no later call survives; else free what it held."""
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(describe(error)) from error


def mm32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit matrices with a float32 result, as cuBLAS gives it."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
