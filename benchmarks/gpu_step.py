"""A whole training step on a GPU: plain, tracked, and with the tasks' gradients taken one by one.

    plain          forward, backward, AdamW (fused)
    sketch, exact gram, exact  the same inside tracker.batch(), with a report read every step
    T backwards    one backward pass per task into a preallocated [T, P] block, its sum and Gram
    torchjd        the same by torchjd.autojac, where it is installed

Every variant trains a model of its own from the same start. First each runs alone: its Gram is compared with that of T
backwards (a variant that is off gets no time), and its peak of memory is taken. Then all run in turn, ``INNER`` steps
between two looks at the clock, so that the host runs ahead of the GPU as in training; percentiles are over rounds.
"""

from __future__ import annotations

import gc
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taskgrad as tg

from .gpu_timing import describe, mm32, percentiles, still_alive
from .models import Decoder, Setting, losses

SETTLE = 4  # steps before anything is measured: compilation, verification and the guards of the first steps
INNER = 3
MIN_ROUNDS, MAX_ROUNDS = 3, 15
LIMIT = {"exact gram": 0.06, "exact": 0.06, "sketch": 0.25, "torchjd": 0.06}  # error of the Gram, bfloat16


@dataclass(frozen=True)
class Plan:
    """A model and how it is trained: ``autocast`` over float32 parameters, or parameters in ``bfloat16``."""

    name: str
    setting: Setting
    precision: str

    @property
    def title(self) -> str:
        """With the tokens of a step: ``GPT-2 8k``."""
        tokens = self.setting.batch * self.setting.length
        return f"{self.name.removesuffix(' 124M')} {f'{tokens >> 10}k' if tokens >= 1024 else tokens}"


PLANS = [
    Plan("GPT-2 124M", Setting(50304, 768, 12, 8, 1024, 8), "autocast"),
    Plan("1B stack", Setting(8192, 2048, 20, 8, 1024, 8, tied=False), "bfloat16"),
    Plan("GPT 29M", Setting(8192, 512, 8, 8, 1024, 8, tied=False), "autocast"),
]
# once more, at lengths that arithmetic says nothing of
LONGER = [Plan("GPT-2 124M", Setting(50304, 768, 12, 32, 1024, 8), "autocast")]
TINY = [Plan("tiny", Setting(40, 16, 1, 4, 6, 2, tied=False), "autocast")]


class Step:
    """One model in training; calling it is a step, ``gram`` the Gram [T, T] of the latest one (``None``: not taken)."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        s, self.autocast = plan.setting, plan.precision == "autocast"
        self.setting, self.device = s, device
        torch.manual_seed(0)
        with torch.device(device):
            self.model = Decoder(s)
            self.tokens = torch.randint(0, s.vocab, (s.batch, s.length + 1))
        for p in self.model.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.model.to(torch.float32 if self.autocast else torch.bfloat16)
        self.ids = torch.arange(s.batch) * s.tasks // s.batch
        self.bounds = [int((self.ids < t).sum()) for t in range(s.tasks + 1)]
        self.params = list(self.model.parameters())
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=fused)

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def losses(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return losses(self.model, self.tokens)

    def parts(self) -> list[Tensor]:
        """Every task's part of the loss."""
        each = self.losses() / self.setting.batch
        return [each[a:b].sum() for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    def gradients(self) -> None:
        self.losses().mean().backward()

    def gram(self) -> Tensor | None:
        return None


class Tracked(Step):
    def __init__(self, plan: Plan, device: torch.device, **options: Any) -> None:
        super().__init__(plan, device)
        tasks = [str(t) for t in range(plan.setting.tasks)]
        self.tracker = tg.track(self.model, tasks, self.optimizer, **options)

    def gradients(self) -> None:
        with self.tracker.batch(self.ids):
            loss = self.losses().mean()
        loss.backward()

    def __call__(self) -> None:
        super().__call__()
        self.tracker.report()

    def gram(self) -> Tensor | None:
        report = self.tracker.report(wait=True)
        if not report.valid:
            raise ArithmeticError(f"the report of step {report.step} is not valid")
        left_out = self.tracker.coverage().unattributed
        return None if left_out else report.gram


class OneByOne(Step):
    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self.sizes = [p.numel() for p in self.params]
        count = plan.setting.tasks
        self.block = torch.empty(count, sum(self.sizes), dtype=self.params[0].dtype, device=device)
        self.products: Any = None

    def gradients(self) -> None:
        parts = self.parts()
        for t, part in enumerate(parts):
            grads = torch.autograd.grad(part, self.params, retain_graph=t + 1 < len(parts))
            torch.cat([g.flatten() for g in grads], out=self.block[t])
        self.products = sum(mm32(part, part.mT) for part in self.block.split(1 << 26, dim=1))
        for p, g in zip(self.params, self.block.sum(0).split(self.sizes), strict=True):
            p.grad = g.view_as(p)

    def gram(self) -> Tensor | None:
        """Of the latest block in float64, by slices."""
        total = torch.zeros(len(self.block), len(self.block), dtype=torch.float64, device=self.device)
        for part in self.block.split(1 << 22, dim=1):
            wide = part.double()
            total += wide @ wide.mT
        return total.cpu()


class TorchJD(Step):
    def gradients(self) -> None:
        from torchjd.autojac import backward  # type: ignore[import-not-found]

        backward(self.parts(), parallel_chunk_size=1)
        self.products = sum((p.jac.flatten(1) @ p.jac.flatten(1).mT).double() for p in self.params)  # type: ignore[attr-defined]
        for p in self.params:
            p.grad = p.jac.sum(0)  # type: ignore[attr-defined]
            del p.jac  # type: ignore[attr-defined]

    def gram(self) -> Tensor | None:
        return self.products.cpu()


def builders(plan: Plan, device: torch.device) -> dict[str, Callable[[], Step]]:
    """T backwards first: what the others' Gram is compared with."""
    found: dict[str, Callable[[], Step]] = {
        "T backwards": lambda: OneByOne(plan, device),
        "plain": lambda: Step(plan, device),
        "sketch": lambda: Tracked(plan, device, mode="sketch"),
    }
    found["exact gram"] = lambda: Tracked(plan, device, mode="exact_gram")
    found["exact"] = lambda: Tracked(plan, device, mode="exact")
    if importlib.util.find_spec("torchjd"):
        found["torchjd"] = lambda: TorchJD(plan, device)
    return found


def measure(
    plan: Plan,
    device: torch.device,
    seconds: float,
    without: tuple[str, ...] = (),
    told: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Check, memory and times of all variants of a plan, for about ``seconds`` after the checks. ``told`` gets what is
    known after every variant's check."""
    with torch.device("meta"):
        size = sum(p.numel() for p in Decoder(plan.setting).parameters())
    case = {"case": plan.title, **asdict(plan.setting), "precision": plan.precision, "parameters": size}
    makers = {n: m for n, m in builders(plan, device).items() if n == "plain" or not any(w in n for w in without)}
    found: dict[str, dict[str, Any]] = {}
    truth: Tensor | None = None
    for name, make in makers.items():
        try:
            found[name], gram = alone(make, device)
            if name == "T backwards":
                truth = gram
            elif gram is not None and truth is not None:
                found[name]["gram error"] = float((gram.double() - truth).norm() / truth.norm())
                if not found[name]["gram error"] <= LIMIT[name]:
                    raise ArithmeticError(f"Gram is off by {found[name]['gram error']:.3f}")
        except Exception as error:
            # too little memory, exact mode's own limit, or not our code: no time, and no failure either
            excused = isinstance(error, torch.OutOfMemoryError | ValueError) or name == "torchjd"
            found[name] = {"not timed" if excused else "failed": describe(error)}
        print(f"{plan.title}, {name}: {found[name]}", flush=True)
        told({**case, "rounds": 0, "variants": found})
        still_alive(device)
    left = {n: m for n, m in makers.items() if not {"failed", "not timed"} & found[n].keys()}
    times, host = in_turn(left, found, device, seconds)
    for name, values in times.items():
        found[name]["ms"] = percentiles(values)
        found[name]["ratio"] = percentiles([a / b for a, b in zip(values, times["plain"], strict=True)])
        found[name]["host ms"] = host[name]
        if found[name].get("peak bytes") and found["plain"].get("peak bytes"):
            found[name]["memory ratio"] = round(found[name]["peak bytes"] / found["plain"]["peak bytes"], 4)
    return {**case, "rounds": len(times.get("plain", ())), "variants": found}


def alone(make: Callable[[], Step], device: torch.device) -> tuple[dict[str, Any], Tensor | None]:
    """The Gram of a variant's first step and its peak of memory in later ones, with nothing else on the GPU."""
    collect(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = make()
        step()
        gram = step.gram()
        for _ in range(SETTLE):
            step()
    found: dict[str, Any] = {}
    if isinstance(step, Tracked):
        found["left out"] = list(step.tracker.coverage().unattributed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        step()
        torch.cuda.synchronize(device)
        found["peak bytes"] = torch.cuda.max_memory_allocated(device) - before
    del step
    collect(device)
    return found, gram


def in_turn(
    makers: dict[str, Callable[[], Step]], found: dict[str, dict[str, Any]], device: torch.device, seconds: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of a step by variant and round, and of the host in it; what does not fit the GPU beside the others
    is left out."""
    steps: dict[str, Step] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(makers, key=lambda n: (n != "plain", found[n].get("peak bytes", 0))):
            step = _settled(makers[name])
            if step is None:
                found[name]["not timed"] = "does not fit the GPU beside the others"
                still_alive(device)
            else:
                steps[name] = step
    if "plain" not in steps:
        return {}, {}
    times: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while len(times["plain"]) < MAX_ROUNDS:
        if len(times["plain"]) >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            elapsed, launched = timed(step, device)
            times[name].append(elapsed)
            host[name].append(launched)
    steps.clear()
    collect(device)
    return times, {name: round(percentiles(values)[1], 4) for name, values in host.items()}


def _settled(make: Callable[[], Step]) -> Step | None:
    """A step past everything that only the first ones do; ``None`` without the memory for it."""
    try:
        step = make()
        for _ in range(SETTLE):
            step()
    except torch.OutOfMemoryError:
        return None
    return step


def timed(step: Step, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step, the mean over ``INNER`` of them, on the device and on the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(INNER):
        step()
    launched = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3 / INNER, launched * 1e3 / INNER


def profile(plan: Plan, device: torch.device, path: Path) -> None:
    """Where the time of a plain and of a sketched step goes, kernel by kernel, as text."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    text = []
    for name, make in builders(plan, device).items():
        if name not in ("plain", "sketch", "exact gram"):
            continue
        try:
            text.append(f"# {plan.name}, {name}\n{_profiled(make, device, activities, order)}")
        except Exception as error:
            text.append(f"# {plan.name}, {name}: {describe(error)}")
        still_alive(device)
    path.write_text("\n\n".join(text) + "\n")


def _profiled(make: Callable[[], Step], device: torch.device, activities: list[Any], order: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = make()
        for _ in range(SETTLE):
            step()
        with torch.profiler.profile(activities=activities) as found:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return str(found.key_averages().table(sort_by=order, row_limit=30))


def collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
