"""Several forwards and backwards in one step, in every order."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import Gradients, separate_backwards
from tests.utils.steps import TASKS, Case, Expected, assert_report, make_case, relative_error

NAMES = ("mlp", "tied_linears", "gpt_row_positions_tied", "repeated_twice")
COUNT = 3


@pytest.fixture(params=NAMES)
def cases(request: pytest.FixtureRequest) -> list[Case]:
    """Three micro-batches of one model, with different ids and weights."""
    first = make_case(ARCHITECTURES[request.param], "example", weighted=True)
    out = [first]
    for number in range(1, COUNT):
        args, kwargs = ARCHITECTURES[request.param].inputs(6, torch.float64)
        out.append(Case(first.model, args, kwargs, first.row_loss, first.ids.roll(number), torch.rand(6)))
    return out


def summed(cases: list[Case]) -> Gradients:
    parts = [separate_backwards(*case.oracle_arguments) for case in cases]
    return {name: sum(part[name] for part in parts) / COUNT for name in parts[0]}  # type: ignore[misc]


def check(tracker: tg.TaskGradTracker, model: nn.Module, oracle: Gradients, exact: bool = True) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, oracle[name].sum(0), oracle[name]) <= 1e-12, name
    tracker.step()
    report = tracker.report()
    assert set(tracker.coverage().attributed) == set(oracle)
    expected = Expected.of(oracle, oracle, torch.tensor([0, 1, 2]), None)
    assert report.valid
    assert relative_error(report.gram, expected.gram) <= 1e-10
    if exact:
        for name, parts in tracker.task_gradients().items():
            assert relative_error(parts, oracle[name]) <= 1e-10, name


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_micro_batches_are_one_step(cases: list[Case], mode: str) -> None:
    model, oracle = cases[0].model, summed(cases)
    tracker = tg.track(model, tasks=list(TASKS), mode=mode, sketch_dim=4096)
    for case in cases:
        with tracker.batch(case.ids, weight=case.weight):
            (case.loss() / COUNT).backward()
    check(tracker, model, oracle, mode == "exact")
    weights = torch.stack([sum(c.weight[c.ids == t].sum().double() for c in cases) for t in range(3)])  # type: ignore[misc, index]
    torch.testing.assert_close(tracker.report().tokens, weights)
    assert tracker.report().examples.tolist() == [sum(int((c.ids == t).sum()) for c in cases) for t in range(3)]


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_backwards_after_all_forwards_in_reverse_order(cases: list[Case], mode: str) -> None:
    model, oracle = cases[0].model, summed(cases)
    tracker = tg.track(model, tasks=list(TASKS), mode=mode, sketch_dim=4096)
    losses = []
    for case in cases:
        with tracker.batch(case.ids, weight=case.weight):
            losses.append(case.loss() / COUNT)
    for loss in reversed(losses):
        loss.backward()
    check(tracker, model, oracle, mode == "exact")


def test_one_backward_over_the_sum_of_three_forwards(cases: list[Case]) -> None:
    model, oracle = cases[0].model, summed(cases)
    tracker = tg.track(model, tasks=list(TASKS), mode="exact")
    total: torch.Tensor | float = 0.0
    for case in cases:
        with tracker.batch(case.ids, weight=case.weight):
            total = total + case.loss() / COUNT
    total.backward()  # type: ignore[union-attr]
    check(tracker, model, oracle)


def test_two_backwards_through_one_forward(cases: list[Case]) -> None:
    """``retain_graph=True``: a loss of two terms, each with a backward of its own."""
    case = cases[0]
    oracle = {name: 3 * parts for name, parts in separate_backwards(*case.oracle_arguments).items()}
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    with tracker.batch(case.ids, weight=case.weight):
        loss = case.loss()
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    check(tracker, case.model, oracle)


def test_two_forwards_in_one_batch(cases: list[Case]) -> None:
    """A contrastive or consistency loss calls the model twice with the same ids."""
    first, second = cases[0], cases[1]
    second.ids, second.weight = first.ids, first.weight
    parts = [separate_backwards(*case.oracle_arguments) for case in (first, second)]
    oracle = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    tracker = tg.track(first.model, tasks=list(TASKS), mode="exact")
    with tracker.batch(first.ids, weight=first.weight):
        (first.loss() + second.loss()).backward()
    check(tracker, first.model, oracle)


def test_steps_do_not_leak_into_each_other(cases: list[Case]) -> None:
    model = cases[0].model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    tracker = tg.track(model, tasks=list(TASKS), optimizer=optimizer, mode="exact")
    for number, case in enumerate(cases, start=1):
        oracle = separate_backwards(*case.oracle_arguments)
        with tracker.batch(case.ids, weight=case.weight):
            case.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert tracker.report().step == number
        for name, parts in tracker.task_gradients().items():
            assert relative_error(parts, oracle[name]) <= 1e-10, name
        assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, case.weight), 1e-9)


def test_gradients_that_are_never_zeroed_keep_the_parts_they_had(cases: list[Case]) -> None:
    """Some loops zero gradients by hand, set them to zero or skip it: parts follow what zero_grad did at most."""
    model = cases[0].model
    tracker = tg.track(model, tasks=list(TASKS), mode="exact")
    for case in cases:
        oracle = separate_backwards(*case.oracle_arguments)
        with tracker.batch(case.ids, weight=case.weight):
            case.loss().backward()
        tracker.step()
        model.zero_grad(set_to_none=False)
        assert tracker.report().valid
        for name, parts in tracker.task_gradients().items():
            assert relative_error(parts, oracle[name]) <= 1e-10, name


@pytest.fixture
def optimised() -> Iterator[tuple[nn.Module, nn.Module]]:
    model = ARCHITECTURES["gpt_row_positions_tied"].build().double()
    yield model, copy.deepcopy(model)


def test_training_is_bit_for_bit_reproducible_and_close_to_untracked(optimised: tuple[nn.Module, nn.Module]) -> None:
    model, twin = optimised
    batches = [ARCHITECTURES["gpt"].inputs(6, torch.float64)[0][0] for _ in range(6)]
    loss = ARCHITECTURES["gpt"].row_loss("example")
    ids = torch.tensor([1, 0, 2, -1, 0, 0])
    results = []
    for net, tracked in ((model, True), (copy.deepcopy(twin), True), (twin, False)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        tracker = tg.track(net, tasks=list(TASKS), optimizer=optimizer) if tracked else None
        for x in batches:
            if tracker is None:
                loss(net(x)).mean().backward()
            else:
                with tracker.batch(ids):
                    loss(net(x)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in net.parameters()])
    for first, second, plain in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, plain, rtol=1e-9, atol=1e-9)
