"""One row [1, ...] for all examples: the model's own tensor in every respect, split by task where rows are added."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from tests.utils.oracle import separate_backwards
from tests.utils.steps import relative_error

IDS = torch.tensor([0, 1, 0, 1, -1])
Use = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = use
        self.token, self.position, self.head = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.Linear(8, 11)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        row = self.position(torch.arange(x.shape[1])[None])
        assert row.shape == (1, x.shape[1], 8)
        return self.head(self.use(self, self.token(x), row))


def keep(model: Model, h: Tensor, p: Tensor) -> Tensor:
    model.kept = p
    return h + p


def keep_gradient(model: Model, h: Tensor, p: Tensor) -> Tensor:
    p.retain_grad()
    return keep(model, h, p)


def in_place(model: Model, h: Tensor, p: Tensor) -> Tensor:
    h += p
    return h


def scaled(model: Model, h: Tensor, p: Tensor) -> Tensor:
    p.mul_(2)
    return h + p


def scaled_view(model: Model, h: Tensor, p: Tensor) -> Tensor:
    p[0].mul_(2)
    return h + p


def scaled_data(model: Model, h: Tensor, p: Tensor) -> Tensor:
    p.data = p.data * 2
    return h + p


def hooked(model: Model, h: Tensor, p: Tensor) -> Tensor:
    p.register_hook(lambda g: g * 3)
    return h + p


def logged(model: Model, h: Tensor, p: Tensor) -> Tensor:
    model.kept = p.detach().clone()
    p.register_hook(lambda g: None)
    return p + h


def detached(model: Model, h: Tensor, p: Tensor) -> Tensor:
    p.detach_()
    return h + p


def penalised(model: Model, h: Tensor, p: Tensor) -> Tensor:
    return (h + p) * (1 + p.square().mean())


def tagged(model: Model, h: Tensor, p: Tensor) -> Tensor:
    p.tag = "the model's own"  # type: ignore[attr-defined]
    return keep(model, h, p)


def checkpointed(model: Model, h: Tensor, p: Tensor) -> Tensor:
    return checkpoint(lambda h: torch.tanh(h + p), h, use_reentrant=False)  # type: ignore[no-any-return]


ADDED: dict[str, Use] = {
    "tagged": tagged,
    "checkpointed": checkpointed,
    "checkpointed argument": lambda m, h, p: checkpoint(lambda a, b: (a + b).sin(), h, p, use_reentrant=False),
    "+": lambda m, h, p: h + p,
    "reversed": lambda m, h, p: p + h,
    "+=": in_place,
    "add": lambda m, h, p: torch.add(h, p, alpha=2),
    "add_": lambda m, h, p: h.clone().add_(p, alpha=-1),
    "method": lambda m, h, p: h.add(p),
    "to": lambda m, h, p: h + p.to(h.device).contiguous(),
    "twice": lambda m, h, p: (h + p).tanh() + p,
    "kept": keep,
    "gradient kept": keep_gradient,
    "logged": logged,
    "data": scaled_data,
    "shape": lambda m, h, p: h + p if p.dim() == 3 and p.size(0) == 1 and p.is_contiguous() else h,
    "no grad": lambda m, h, p: h + p + p.detach().mean(),
}
OTHERWISE: dict[str, Use] = {
    "dropout": lambda m, h, p: h + nn.functional.dropout(p, 0.3),
    "times": lambda m, h, p: h + p * 2,
    "cat": lambda m, h, p: h + torch.cat([p[:, :2], p[:, 2:]], 1),
    "cast": lambda m, h, p: h + p.float().double(),
    "expand": lambda m, h, p: h + p.expand(len(h), -1, -1),
    "written": scaled,
    "view written": scaled_view,
    "hooked": hooked,
    "penalty": penalised,
    "minus": lambda m, h, p: h - p,
    "of rows": lambda m, h, p: h + p[0],
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="taskgrad:")
        yield


def run(use: Use, **options: Any) -> tuple[tg.TaskGradTracker, Model, Model, dict[str, Tensor]]:
    """One step, tracked and not; everything but the statistics is the same."""
    torch.manual_seed(0)
    model = Model(use).double()
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.randint(11, (5, 6))
    tracker = tg.track(model, ["a", "b"], mode="exact", **options)
    losses = []
    for m in (model, twin):
        torch.manual_seed(1)
        if m is model:
            with tracker.batch(IDS):
                loss = m(x).square().sum((1, 2)).mean()
        else:
            loss = m(x).square().sum((1, 2)).mean()
        loss.backward()
        losses.append(loss.detach())
    assert losses[0] == losses[1]
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert relative_error(p.grad, q.grad) < 1e-12, name
    tracker.step()
    torch.manual_seed(1)
    return tracker, model, twin, separate_backwards(third, ((x,), {}), lambda out: out.square().sum((1, 2)), IDS, 2)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ADDED)
def test_additions_are_split_by_task(name: str, verify: bool) -> None:
    tracker, model, twin, oracle = run(ADDED[name], verify=verify)
    assert tracker.report().valid and tracker.coverage().fraction == 1, tracker.coverage()
    for parameter, parts in tracker.task_gradients().items():
        assert relative_error(parts, oracle[parameter]) < 1e-10, parameter
    if isinstance(model.kept, Tensor):  # what the model keeps is a plain tensor
        assert type(model.kept) is Tensor and not model.kept.__dict__.keys() - {"tag"}
        assert name != "tagged" or model.kept.tag == "the model's own"
        torch.save(model.kept, io.BytesIO())
        assert model.kept.retains_grad == twin.kept.retains_grad == (name == "gradient kept")
        if model.kept.retains_grad:
            torch.testing.assert_close(model.kept.grad, twin.kept.grad)


@pytest.mark.parametrize("name", OTHERWISE)
def test_any_other_use_leaves_the_weight_out_there_and_then(name: str) -> None:
    tracker, _, _, oracle = run(OTHERWISE[name])
    assert tracker.report().valid and set(tracker.coverage().unattributed) == {"position.weight"}
    for parameter in tracker.coverage().attributed:
        assert relative_error(tracker.task_gradients()[parameter], oracle[parameter]) < 1e-10, parameter


def test_a_row_that_is_detached_has_no_gradient() -> None:
    tracker, model, _, _ = run(detached)
    assert model.position.weight.grad is None and tracker.report().valid


def test_the_gradient_of_the_row_itself_can_be_asked_for() -> None:
    torch.manual_seed(0)
    model = Model(keep)
    x = torch.randint(11, (5, 6))
    want = torch.autograd.grad(model(x).square().sum(), model.kept)
    tracker = tg.track(model, ["a", "b"], verify=False)
    with tracker.batch(IDS):
        out = model(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(out, model.kept), want)


def test_another_kind_of_tensor_takes_over() -> None:
    class Own(Tensor):
        pass

    tracker, _, _, _ = run(lambda m, h, p: (h.as_subclass(Own) + p).as_subclass(Tensor))
    assert tracker.report().valid
    seen = []

    def use(model: Model, h: Tensor, p: Tensor) -> Tensor:
        seen.append(type(h.as_subclass(Own) + p))
        return h + p

    run(use, verify=False)
    assert seen and all(kind is Own for kind in seen)


def test_rows_that_are_not_the_batch_s_are_found_beside_a_shared_row() -> None:
    """The row is added in another order of the examples: its part would belong to others."""
    order = torch.tensor([3, 1, 4, 0, 2])

    def use(model: Model, h: Tensor, p: Tensor) -> Tensor:
        return (h[order] + p)[order.argsort()]

    tracker, _, _, _ = run(use)
    assert "position.weight" in tracker.coverage().unattributed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("name", ["+", "+=", "add", "twice", "to", "times", "dropout", "penalty", "hooked"])
def test_compiled(name: str) -> None:
    use = {**ADDED, **OTHERWISE}[name]
    torch.manual_seed(0)
    model = Model(use).double()
    twin = copy.deepcopy(model)
    x = torch.randint(11, (5, 6))
    tracker = tg.track(model, ["a", "b"], mode="exact", verify=False)
    with tracker.batch(IDS):
        torch.manual_seed(1)
        torch.compile(model, backend="aot_eager")(x).square().sum((1, 2)).mean().backward()
    tracker.step()
    assert tracker.report().valid
    assert ("position.weight" in tracker.coverage().unattributed) == (name in OTHERWISE)
    if name != "dropout":
        twin(x).square().sum((1, 2)).mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and relative_error(p.grad, q.grad) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_second_use_is_seen_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for use, added in (
        (lambda m, h, p: h + p + 0.05 * torch.tanh(p.flip(1)), False),
        (lambda m, h, p: h + p + p, True),
    ):
        model = Model(use).to(dtype)
        tracker = tg.track(model, ["a", "b"])
        for _ in range(3):
            with tracker.batch(IDS):
                model(torch.randint(11, (5, 6))).square().mean().backward()
            tracker.step()
            model.zero_grad()
        assert (tracker.coverage().fraction == 1) == added, tracker.coverage()
