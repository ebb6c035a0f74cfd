"""One batch of an architecture, one tracked step over it, and the numbers a report of it must show."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import taskgrad as tg

from .architectures import ARCHITECTURES, BATCH, SEQ, Architecture
from .oracle import Gradients, mean_loss

TASKS = ("a", "b", "c")
CASES = [(architecture, kind) for architecture in ARCHITECTURES.values() for kind in architecture.kinds]


def case_id(value: Any) -> str:
    return value.name if isinstance(value, Architecture) else str(value)


@dataclass
class Case:
    """A model and one batch for it, with ids that hold every task, unsorted, and rows of no task."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    row_loss: Callable[[Any], Tensor]
    ids: Tensor
    weight: Tensor | None

    @property
    def oracle_arguments(self) -> tuple[Any, ...]:
        return self.model, (self.args, self.kwargs), self.row_loss, self.ids, len(TASKS), self.weight

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """The loss of the batch under ``model`` (the case's own by default)."""
        return mean_loss(self.row_loss((model or self.model)(*self.args, **self.kwargs)), self.weight)


def mixed_ids(kind: str, batch: int = BATCH) -> Tensor:
    """Unsorted ids of all three tasks and of none, one per example or per token."""
    ids = torch.tensor([2, 0, -1, 1, 0, 2, 1, 1])[torch.arange(batch) % 8]
    if kind == "token":
        ids = (ids[:, None] + torch.arange(SEQ) * 2 + 1) % 4 - 1
    return ids


def make_case(
    architecture: Architecture,
    kind: str,
    *,
    dtype: torch.dtype = torch.float64,
    weighted: bool = False,
    batch: int = BATCH,
) -> Case:
    model = architecture.build().to(dtype)
    args, kwargs = architecture.inputs(batch, dtype)
    ids = mixed_ids(kind, batch)
    if hasattr(model, "row_ids"):
        model.row_ids = ids
    weight = torch.rand(ids.shape, dtype=torch.float64) + 0.5 if weighted else None
    return Case(model, args, kwargs, architecture.row_loss(kind), ids, weight)


def relative_error(got: Tensor, want: Tensor, scale: Tensor | None = None, floor: float = 1e-290) -> float:
    """Norm of the difference over the norm of ``scale`` (``want`` by default; of the parts, where a sum cancels), or
    over a million times ``floor`` where that norm is below ``floor``."""
    size = (want if scale is None else scale).double().norm().item()
    return ((got.double() - want.double()).norm() / (size if size > floor else 1e6 * floor)).item()


def negligible(gradient: Mapping[str, Tensor]) -> float:
    """The size below which a parameter's gradient is rounding noise (the bias of attention keys, of a convolution
    before a batch norm): a millionth of the whole gradient's norm."""
    return 1e-6 * torch.stack([grad.double().norm() for grad in gradient.values()]).norm().item()


@dataclass
class Tracked:
    """What one tracked step left behind."""

    tracker: tg.TaskGradTracker
    report: tg.StepReport
    attributed: tuple[str, ...]
    unattributed: dict[str, str]
    grads: dict[str, Tensor]
    warnings: list[str]

    @property
    def task_gradients(self) -> dict[str, Tensor]:
        return self.tracker.task_gradients()


def tracked_step(case: Case, mode: str = "exact", **options: Any) -> Tracked:
    """Track the case's model, take one step over its batch without an optimizer, collect what can be seen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = tg.track(case.model, tasks=list(TASKS), mode=mode, **options)
        run_batch(tracker, case)
        tracker.step()
        report = tracker.report()
    coverage = tracker.coverage()
    grads = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    messages = [str(w.message) for w in caught]
    return Tracked(tracker, report, coverage.attributed, dict(coverage.unattributed), grads, messages)


def run_batch(tracker: tg.TaskGradTracker, case: Case) -> Tensor:
    """Forward and backward of the case inside ``tracker.batch``; the loss."""
    if hasattr(case.model, "row_context"):
        case.model.row_context = tracker.rows
    with tracker.batch(case.ids, weight=case.weight):
        loss = case.loss()
        loss.backward()
    return loss


def plain_grads(case: Case) -> tuple[dict[str, Tensor], nn.Module]:
    """``param.grad`` of an untracked copy of the model on the same batch with the same random numbers, and the copy."""
    twin = copy.deepcopy(case.model)
    twin.zero_grad(set_to_none=True)
    state = torch.random.get_rng_state()
    case.loss(twin).backward()
    torch.random.set_rng_state(state)
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}, twin


@dataclass
class Expected:
    """The numbers of a report, from the oracle's gradients over the attributed parameters."""

    gram: Tensor
    cosine: Tensor
    others_cosine: Tensor
    norm: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, gradients: Gradients, names: Iterable[str], ids: Tensor, weight: Tensor | None) -> Expected:
        flat = torch.cat([gradients[name].flatten(1) for name in names], dim=1)
        tasks = len(flat) - 1
        size = flat[:tasks].norm(dim=1)
        weight = torch.ones(ids.shape, dtype=torch.float64) if weight is None else weight.double()
        tokens = torch.stack([weight[ids == task].sum() for task in range(tasks)])
        others = torch.stack([torch.cat([flat[:task], flat[task + 1 :]]).sum(0) for task in range(tasks)])
        present = torch.stack([(ids == task).any() for task in range(tasks)])
        gram = flat[:tasks] @ flat[:tasks].T
        return cls(
            gram=gram,
            cosine=gram / (size[:, None] * size),
            others_cosine=(others * flat[:tasks]).sum(1) / (size * others.norm(dim=1)),
            norm=torch.where(present, size * weight.sum() / tokens, torch.nan),
            tokens=tokens,
        )


def assert_report(report: tg.StepReport, expected: Expected, tolerance: float) -> None:
    """Gram normwise, the rest elementwise; NaN exactly where the task has no gradient."""
    assert report.valid
    assert relative_error(report.gram, expected.gram) <= tolerance, (report.gram, expected.gram)
    for name in ("cosine", "others_cosine", "norm", "tokens"):
        got, want = getattr(report, name), getattr(expected, name)
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
