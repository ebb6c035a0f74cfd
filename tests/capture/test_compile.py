"""``torch.compile`` of a tracked model."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import separate_backwards
from tests.utils.steps import TASKS, Expected, assert_report, make_case, plain_grads, relative_error

NAMES = (
    "mlp",
    "residual_inplace",
    "repeated_twice",
    "gpt_row_positions_tied",
    "conv2d",
    "conv_transpose",
    "norms",
    "group_norm_4d",
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize("name", NAMES)
def test_full_graph(name: str, mode: str) -> None:
    case = make_case(ARCHITECTURES[name], "example")
    plain, _ = plain_grads(case)
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode=mode, sketch_dim=4096)
    compiled = torch.compile(case.model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        case.model.zero_grad()
        with tracker.batch(case.ids):
            case.row_loss(compiled(*case.args, **case.kwargs)).mean().backward()
        tracker.step()
        for key, p in case.model.named_parameters():
            assert p.grad is not None
            assert relative_error(p.grad, plain[key], oracle[key]) <= 1e-12, key
        assert set(tracker.coverage().attributed) == set(oracle), tracker.coverage().unattributed
        assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, None), 1e-9)


def test_other_ids_do_not_compile_again() -> None:
    case = make_case(ARCHITECTURES["gpt_row_positions_tied"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS))
    with tracker.batch(case.ids):
        assert tracker.verify(*case.args).verified  # a compiled model is not verified by itself
    compiled = torch.compile(case.model, backend="aot_eager", fullgraph=True)
    for number in range(5):
        ids = case.ids.roll(number) if number else case.ids
        if number == 3:
            ids = torch.tensor([2, 1, 1, 0, -1, -1])
        oracle = separate_backwards(case.model, (case.args, case.kwargs), case.row_loss, ids, len(TASKS))
        stance = "fail_on_recompile" if number >= 2 else "default"
        case.model.zero_grad()
        with torch.compiler.set_stance(stance), tracker.batch(ids):
            case.row_loss(compiled(*case.args)).mean().backward()
        tracker.step()
        assert_report(tracker.report(), Expected.of(oracle, oracle, ids, None), 1e-9)


def test_compiled_before_it_was_tracked_and_after_it_was_released() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    plain, _ = plain_grads(case)
    oracle = separate_backwards(*case.oracle_arguments)
    compiled = torch.compile(case.model, backend="aot_eager")
    compiled(*case.args)
    tracker = tg.track(case.model, tasks=list(TASKS))
    with tracker.batch(case.ids):
        case.row_loss(compiled(*case.args)).mean().backward()
    tracker.step()
    assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, None), 1e-9)
    tracker.remove()
    case.model.zero_grad()
    case.row_loss(compiled(*case.args)).mean().backward()
    for key, p in case.model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, plain[key]) <= 1e-12, key


def test_tracking_the_compiled_wrapper() -> None:
    """``model = torch.compile(model)`` first, ``tg.track(model)`` second: the usual order in training scripts."""
    case = make_case(ARCHITECTURES["mlp"], "example")
    oracle = separate_backwards(*case.oracle_arguments)
    compiled = torch.compile(case.model, backend="aot_eager")
    tracker = tg.track(compiled, tasks=list(TASKS))
    with tracker.batch(case.ids):
        case.row_loss(compiled(*case.args)).mean().backward()
    tracker.step()
    want = Expected.of(oracle, oracle, case.ids, None)
    assert_report(tracker.report(), want, 1e-9)
    assert len(tracker.coverage().attributed) == len(oracle)


@pytest.mark.slow
def test_inductor() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example", dtype=torch.float32)
    plain, _ = plain_grads(case)
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="sketch", sketch_dim=4096)
    compiled = torch.compile(case.model, fullgraph=True)
    with tracker.batch(case.ids):
        case.row_loss(compiled(*case.args)).mean().backward()
    tracker.step()
    for key, p in case.model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, plain[key]) <= 1e-5, key
    assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, None), 1e-4)


def test_an_untracked_forward_of_the_compiled_model_is_its_own() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    twin = copy.deepcopy(case.model)
    tracker = tg.track(case.model, tasks=list(TASKS))
    compiled = torch.compile(case.model, backend="aot_eager", fullgraph=True)
    with tracker.batch(case.ids):
        case.row_loss(compiled(*case.args)).mean().backward()
    tracker.step()
    gram = tracker.report().gram.clone()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*case.args), twin(*case.args))
    case.row_loss(compiled(*case.args)).mean().backward()
    assert torch.equal(tracker.report().gram, gram)
