"""What happens around tracked batches: other forwards, copies, removal, and uses that cannot work and raise."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import types
import weakref

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import separate_backwards
from tests.utils.steps import TASKS, Case, Expected, assert_report, make_case, relative_error, run_batch

NAMES = ("mlp", "gpt_row_positions_tied", "residual_conv", "norms")


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(ARCHITECTURES[request.param], "example", weighted=True)


def close(tracker: tg.TaskGradTracker, case: Case, oracle: dict[str, Tensor]) -> None:
    tracker.step()
    assert_report(tracker.report(), Expected.of(oracle, tracker.coverage().attributed, case.ids, case.weight), 1e-9)
    assert set(tracker.coverage().attributed) == set(oracle), tracker.coverage().unattributed


def test_evaluation_between_forward_and_backward(case: Case) -> None:
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    twin = copy.deepcopy(case.model).eval()
    with tracker.batch(case.ids, weight=case.weight):
        with torch.no_grad():
            case.loss()
        loss = case.loss()
        case.model.eval()
        with torch.inference_mode():
            torch.testing.assert_close(case.model(*case.args), twin(*case.args))
        case.model.train()
        loss.backward()
    with torch.no_grad():
        case.loss()
    close(tracker, case, oracle)


def test_forwards_outside_of_a_batch_are_the_plain_ones(case: Case) -> None:
    twin = copy.deepcopy(case.model)
    tracker = tg.track(case.model, tasks=list(TASKS))
    out, want = case.model(*case.args), twin(*case.args)
    assert torch.equal(out, want)

    def nodes(tensor: Tensor) -> list[str]:
        seen, todo = [], [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None:
                seen.append(node.name())
                todo += [following for following, _ in node.next_functions]
        return seen

    assert nodes(out) == nodes(want)
    tracker.remove()


def test_saliency_is_not_counted(case: Case) -> None:
    """``autograd.grad`` to an input or an activation runs the layers' backwards without touching ``param.grad``."""
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    floating = case.args[0].is_floating_point()
    with tracker.batch(case.ids, weight=case.weight):
        if floating:
            case.args = (case.args[0].requires_grad_(),)
        loss = case.loss()
        if floating:
            torch.autograd.grad(loss, case.args[0], retain_graph=True)
            torch.autograd.grad(case.model(*case.args).sum(), case.args[0])
        else:
            torch.autograd.grad(case.model(*case.args).sum(), case.model.norm.weight)  # type: ignore[arg-type, union-attr]
        loss.backward()
    close(tracker, case, oracle)


def test_gradients_reach_inputs_unchanged(case: Case) -> None:
    if not case.args[0].is_floating_point():
        pytest.skip("integer input")
    twin = copy.deepcopy(case.model)
    x, y = (case.args[0].clone().requires_grad_() for _ in range(2))
    case.args = (x,)
    case.loss(twin).backward()
    case.args = (y,)
    tracker = tg.track(case.model, tasks=list(TASKS))
    run_batch(tracker, case)
    assert x.grad is not None and y.grad is not None
    assert relative_error(y.grad, x.grad) <= 1e-12


def test_two_models_at_once() -> None:
    """A generator and a critic: nested batches, other tasks, one backward through both."""
    first, second = (make_case(ARCHITECTURES["mlp"], "example") for _ in range(2))
    second.ids = torch.tensor([0, 1, 1, 0, -1, 1])
    oracles = [separate_backwards(*case.oracle_arguments) for case in (first, second)]
    trackers = [tg.track(case.model, tasks=list(TASKS), mode="exact") for case in (first, second)]
    with trackers[0].batch(first.ids), trackers[1].batch(second.ids):
        (first.loss() + second.loss()).backward()
    for tracker, case, oracle in zip(trackers, (first, second), oracles, strict=True):
        close(tracker, case, oracle)


def test_two_models_in_a_chain() -> None:
    encoder, decoder = nn.Linear(7, 5).double(), nn.Linear(5, 3).double()
    whole = nn.Sequential(encoder, nn.Tanh(), decoder)
    base = make_case(ARCHITECTURES["mlp"], "example")
    case = Case(whole, base.args, {}, base.row_loss, base.ids, None)
    oracle = separate_backwards(*case.oracle_arguments)
    left, right = (tg.track(m, tasks=list(TASKS), mode="exact") for m in (encoder, decoder))
    with left.batch(case.ids):
        hidden = encoder(*case.args).tanh()
    with right.batch(case.ids):
        out = decoder(hidden)
    case.row_loss(out).mean().backward()
    for tracker, prefix in ((left, "0."), (right, "2.")):
        tracker.step()
        for name, parts in tracker.task_gradients().items():
            assert relative_error(parts, oracle[prefix + name]) <= 1e-10, name


def test_a_copy_is_untracked_and_whole(case: Case) -> None:
    plain_keys = list(case.model.state_dict())
    want = case.model(*case.args)
    tracker = tg.track(case.model, tasks=list(TASKS))
    run_batch(tracker, case)
    case.model.zero_grad()
    assert list(case.model.state_dict()) == plain_keys
    copies = [copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))]
    buffer = io.BytesIO()
    torch.save(case.model, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    with tracker.batch(case.ids, weight=case.weight):
        for twin in copies:
            assert list(twin.state_dict()) == plain_keys
            assert torch.equal(twin(*case.args), want)
            case.loss(twin).backward()
    # what ran through the copies is not the tracked model's
    oracle = separate_backwards(*case.oracle_arguments)
    run_batch(tracker, case)
    close(tracker, case, oracle)
    again = tg.track(copies[0], tasks=list(TASKS))
    copies[0].zero_grad()
    twin_case = Case(copies[0], case.args, case.kwargs, case.row_loss, case.ids, case.weight)
    run_batch(again, twin_case)
    close(again, twin_case, oracle)


def test_remove_leaves_no_trace(case: Case) -> None:
    def footprint(model: nn.Module) -> list[object]:
        return [
            (
                name,
                sorted(m.__dict__),
                sorted(m._forward_hooks),
                sorted(m._forward_pre_hooks),
                m._backward_hooks,
                type(m),
            )
            for name, m in model.named_modules()
        ] + [(name, sorted(getattr(p, "__dict__", {})), p._backward_hooks) for name, p in model.named_parameters()]

    before = footprint(case.model)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    optimizer_before = (
        sorted(optimizer.__dict__),
        len(optimizer._optimizer_step_post_hooks),
        len(optimizer._optimizer_step_pre_hooks),
    )
    tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer)
    run_batch(tracker, case)
    optimizer.step()
    tracker.remove()
    tracker.remove()
    assert footprint(case.model) == before
    assert optimizer_before == (
        sorted(optimizer.__dict__),
        len(optimizer._optimizer_step_post_hooks),
        len(optimizer._optimizer_step_pre_hooks),
    )
    alive = weakref.ref(tracker)
    del tracker
    gc.collect()
    assert alive() is None


def test_remove_under_a_wrapper_that_came_later() -> None:
    """Another library patched ``forward`` after us (offloading, adapters): its patch stays, ours is gone or inert."""
    case = make_case(ARCHITECTURES["mlp"], "example")
    twin = copy.deepcopy(case.model)
    tracker = tg.track(case.model, tasks=list(TASKS))
    layer = case.model[0]  # type: ignore[index]
    inner = layer.forward

    def wrapper(self: nn.Module, *args: Tensor) -> Tensor:
        return 2 * inner(*args)

    layer.forward = types.MethodType(wrapper, layer)
    run_batch(tracker, case)
    tracker.step()
    assert tracker.report().valid
    tracker.remove()
    assert layer.forward.__func__ is wrapper
    twin[0].register_forward_hook(lambda module, args, out: 2 * out)  # type: ignore[index]
    assert torch.equal(case.model(*case.args), twin(*case.args))
    case.model.zero_grad()
    case.loss().backward()
    case.loss(twin).backward()
    for p, q in zip(case.model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad)


def test_remove_restores_a_forward_that_was_patched_before() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    layer = case.model[0]  # type: ignore[index]
    plain = type(layer).forward

    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * plain(self, x)

    layer.forward = types.MethodType(wrapper, layer)
    patched = layer.__dict__["forward"]
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    with pytest.warns(UserWarning, match=r"0\.weight"):
        run_batch(tracker, case)
        tracker.step()
    assert set(tracker.coverage().unattributed) == {"0.weight", "0.bias"}
    for name in tracker.coverage().attributed:
        assert relative_error(tracker.task_gradients()[name], oracle[name]) <= 1e-10, name
    tracker.remove()
    assert layer.__dict__["forward"] is patched


def test_tracking_again_after_remove(case: Case) -> None:
    oracle = separate_backwards(*case.oracle_arguments)
    for _ in range(2):
        case.model.zero_grad()
        tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
        run_batch(tracker, case)
        close(tracker, case, oracle)
        tracker.remove()


def test_several_optimizers_close_one_step_together() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    oracle = separate_backwards(*case.oracle_arguments)
    matrices = torch.optim.SGD([p for p in case.model.parameters() if p.ndim == 2], lr=0.0)
    vectors = torch.optim.AdamW([p for p in case.model.parameters() if p.ndim == 1], lr=0.0)
    tracker = tg.track(case.model, tasks=list(TASKS), optimizer=[matrices, vectors], mode="exact")
    for number in (1, 2):
        run_batch(tracker, case)
        matrices.step()
        assert tracker.report() is None or tracker.report().step == number - 1
        vectors.step()
        assert tracker.report().step == number
        case.model.zero_grad()
        assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, case.weight), 1e-9)


def test_gradient_clipping_is_one_scalar_and_no_alarm(case: Case) -> None:
    oracle = separate_backwards(*case.oracle_arguments)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer, mode="exact")
    for _ in range(3):
        run_batch(tracker, case)
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        assert tracker.coverage().unattributed == {}
        assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, case.weight), 1e-9)
