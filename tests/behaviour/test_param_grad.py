"""The statistics follow ``param.grad``: a valid report is of exactly what is in it at the step, else it says why."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg

IDS = torch.tensor([0, 1] * 4)
Loop = Callable[[nn.Sequential, torch.optim.Optimizer, tg.TaskGradTracker], None]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What is warned of is not the matter here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="taskgrad:")
        yield


def make(mode: str = "exact", **options: object) -> tuple[nn.Sequential, torch.optim.Optimizer, tg.TaskGradTracker]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, tg.track(model, ["a", "b"], optimizer, mode=mode, **options)  # type: ignore[arg-type]


def loss_of(model: nn.Module, x: Tensor | None = None) -> Tensor:
    x = torch.randn(8, 4, dtype=torch.float64) if x is None else x
    return model(x).square().sum(1).mean()


def passes(model: nn.Module, tracker: tg.TaskGradTracker, ids: Tensor = IDS) -> None:
    with tracker.batch(ids):
        loss_of(model).backward()


def assert_follows(
    model: nn.Module, tracker: tg.TaskGradTracker, grads: dict[str, Tensor], factor: float = 1.0
) -> None:
    """The report is valid and its parts add up to the gradient that the optimizer took."""
    report = tracker.report()
    assert report.valid, report.reason
    parts = tracker.task_gradients()
    assert set(parts) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(parts[name].sum(0) * factor, grad, rtol=1e-9, atol=1e-14, msg=name)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    return grads


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("skipped", [1, 4])
def test_zeroed_between_forward_and_backward_and_a_step_skipped(set_to_none: bool, skipped: int) -> None:
    model, optimizer, tracker = make()
    for k in range(6):
        with tracker.batch(IDS):
            loss = loss_of(model)
            optimizer.zero_grad(set_to_none)
            loss.backward()
        if k == skipped:
            continue
        assert_follows(model, tracker, step(model, optimizer))
        assert tracker.report().examples.tolist() == [4, 4]
    assert tracker.coverage().fraction == 1


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "where", ["before the forward", "between", "after the step", "inside the batch after the step"]
)
def test_zeroed_anywhere(where: str, set_to_none: bool) -> None:
    model, optimizer, tracker = make()
    for _ in range(5):
        if where == "before the forward":
            optimizer.zero_grad(set_to_none)
        with tracker.batch(IDS):
            loss = loss_of(model)
            if where == "between":
                optimizer.zero_grad(set_to_none)
            loss.backward()
            if where == "inside the batch after the step":
                assert_follows(model, tracker, step(model, optimizer))
                optimizer.zero_grad(set_to_none)
        if where != "inside the batch after the step":
            assert_follows(model, tracker, step(model, optimizer))
        if where == "after the step":
            optimizer.zero_grad(set_to_none)
        assert tracker.report().examples.tolist() == [4, 4]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_between_backward_and_step(set_to_none: bool) -> None:
    model, optimizer, tracker = make()
    passes(model, tracker)
    step(model, optimizer)
    optimizer.zero_grad(set_to_none)
    memory = tracker.state_dict()["memory.ema"].clone()
    passes(model, tracker)
    optimizer.zero_grad(set_to_none)
    optimizer.step()
    report = tracker.report()
    assert not report.valid and report.reason is not None and "None or zero" in report.reason
    assert torch.equal(tracker.state_dict()["memory.ema"], memory)
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.report().examples.tolist() == [4, 4]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_some_zeroed_before_the_step(set_to_none: bool) -> None:
    """What is left in ``param.grad`` is reported, no more."""
    model, optimizer, tracker = make()
    twin, _, alone = make("exact_gram", sketch_dim=16)
    for _ in range(3):
        x = torch.randn(8, 4, dtype=torch.float64)
        for m, t in ((model, tracker), (twin, alone)):
            with t.batch(IDS):
                loss_of(m, x).backward()
            m[0].zero_grad(set_to_none)
        alone._hooks.optimizers[0].step()  # type: ignore[union-attr]
        grads = step(model, optimizer)
        torch.testing.assert_close(alone.report().gram, tracker.report().gram, rtol=1e-9, atol=0)
        twin.zero_grad()
        assert not grads["0.weight"].any() and grads["3.weight"].any()
        assert_follows(model, tracker, grads)
        optimizer.zero_grad()
    assert tracker.coverage().fraction == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_some_zeroed_between_micro_batches(set_to_none: bool) -> None:
    """The gradients are then those of different batches: no report, and none is lost for good."""
    model, optimizer, tracker = make()
    passes(model, tracker)
    model[0].zero_grad(set_to_none)
    passes(model, tracker)
    step(model, optimizer)
    report = tracker.report()
    assert not report.valid and report.reason is not None and "more backward passes" in report.reason
    optimizer.zero_grad()
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))


def test_all_zeroed_between_micro_batches() -> None:
    model, optimizer, tracker = make()
    passes(model, tracker, torch.zeros(8, dtype=torch.int64))
    optimizer.zero_grad()
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.report().examples.tolist() == [4, 4]


def test_accumulated_over_micro_batches_of_which_one_runs_backward_twice() -> None:
    model, optimizer, tracker = make()
    passes(model, tracker)
    with tracker.batch(IDS):
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.report().examples.tolist() == [8, 8]


def test_not_zeroed_at_all() -> None:
    """Gradients that pile up over steps: what is in them is not this step's."""
    model, optimizer, tracker = make()
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))
    passes(model, tracker)
    step(model, optimizer)
    report = tracker.report()
    assert not report.valid and report.reason is not None and "not zeroed" in report.reason
    optimizer.zero_grad()
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.coverage().fraction == 1


@pytest.mark.parametrize("inside", [True, False])
def test_backward_of_some_inputs_only(inside: bool) -> None:
    """``backward(inputs=...)`` leaves the statistics out."""
    model, optimizer, tracker = make()
    for _ in range(4):
        with tracker.batch(IDS):
            loss = loss_of(model)
            if inside:
                loss.backward(inputs=list(model.parameters()))
        if not inside:
            loss.backward(inputs=list(model.parameters()))
        step(model, optimizer)
        optimizer.zero_grad()
        report = tracker.report()
        assert not report.valid and report.reason is not None and "inputs=" in report.reason
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.coverage().fraction == 1, tracker.coverage()


def test_filled_by_hand() -> None:
    model, optimizer, tracker = make()
    for _ in range(4):
        with tracker.batch(IDS):
            grads = torch.autograd.grad(loss_of(model), list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        step(model, optimizer)
        optimizer.zero_grad()
        report = tracker.report()
        assert not report.valid and report.reason is not None and "by hand" in report.reason
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.coverage().fraction == 1


@pytest.mark.parametrize("change", ["noise", "replaced", "replaced before", "data", "one"])
def test_written_by_hand_after_the_backward_pass(change: str) -> None:
    model, optimizer, tracker = make()
    for k in range(3):  # what is written through .grad.data shows on the first steps and every 100th only
        if change == "replaced before" and k:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        passes(model, tracker)
        with torch.no_grad():
            for p in model.parameters() if change != "one" else [model[0].weight]:
                assert p.grad is not None
                if change == "noise":
                    p.grad += torch.randn_like(p)
                elif change in ("replaced", "one"):
                    p.grad = torch.randn_like(p)
                elif change == "data":
                    p.grad.data.normal_()
        step(model, optimizer)
        optimizer.zero_grad()
        if k or change != "replaced before":
            assert not tracker.report().valid or set(tracker.coverage().unattributed) == {"0.weight"}
    if change != "one":
        assert tracker.coverage().fraction == 1, tracker.coverage()


def test_replaced_by_a_scaled_copy_is_one_factor() -> None:
    model, optimizer, tracker = make()
    passes(model, tracker)
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad * 0.25
    assert_follows(model, tracker, step(model, optimizer), factor=0.25)


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_clipping_by_norm_is_one_factor_and_by_value_is_none(mode: str) -> None:
    model, optimizer, tracker = make(mode)
    for _ in range(30):
        optimizer.zero_grad()
        passes(model, tracker)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        step(model, optimizer)
        assert tracker.report().valid
    for _ in range(30):
        optimizer.zero_grad()
        passes(model, tracker)
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        step(model, optimizer)
        report = tracker.report()
        assert not report.valid and report.reason is not None and "clipped by value" in report.reason
    for _ in range(3):
        optimizer.zero_grad()
        passes(model, tracker)
        step(model, optimizer)
        assert tracker.report().valid
    assert tracker.coverage().fraction == 1


def test_clipping_by_value_that_changes_nothing() -> None:
    model, optimizer, tracker = make()
    passes(model, tracker)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e9)
    assert_follows(model, tracker, step(model, optimizer))


def test_clipping_on_gradients_not_yet_complete() -> None:
    """Between micro-batches: the first is scaled, the second is not."""
    model, optimizer, tracker = make()
    passes(model, tracker)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    passes(model, tracker)
    step(model, optimizer)
    report = tracker.report()
    assert not report.valid and report.reason is not None and "between backward passes" in report.reason
    optimizer.zero_grad()
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.coverage().fraction == 1


def test_an_interrupt_in_the_backward_pass() -> None:
    model, optimizer, tracker = make()
    passes(model, tracker)
    step(model, optimizer)
    optimizer.zero_grad()

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    handle = model[0].weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        passes(model, tracker)
    handle.remove()
    optimizer.step()  # on what there is
    assert not tracker.report().valid
    passes(model, tracker)  # on top of it
    optimizer.step()
    assert not tracker.report().valid
    optimizer.zero_grad()
    passes(model, tracker)
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.report().examples.tolist() == [4, 4]
    assert tracker.coverage().fraction == 1


def test_an_interrupt_after_which_gradients_are_zeroed() -> None:
    model, optimizer, tracker = make()

    def interrupt(_: Tensor) -> None:
        raise RuntimeError("stop")

    for _ in range(2):
        handle = model[3].bias.register_hook(interrupt)
        with pytest.raises(RuntimeError, match="stop"):
            passes(model, tracker)
        handle.remove()
        optimizer.zero_grad()
        passes(model, tracker)
        assert_follows(model, tracker, step(model, optimizer))
        optimizer.zero_grad()


def test_a_forward_outside_of_batch_adds_to_the_gradients() -> None:
    model, optimizer, tracker = make()
    for k in range(4):
        passes(model, tracker)
        if k == 1:
            loss_of(model).backward()
        step(model, optimizer)
        optimizer.zero_grad()
        report = tracker.report()
        assert report.valid == (k != 1)
        assert k != 1 or (report.reason is not None and "outside of batch()" in report.reason)
    assert tracker.coverage().fraction == 1


def test_a_loss_on_one_weight_alone_leaves_that_weight_out() -> None:
    model, optimizer, tracker = make()
    for _ in range(3):
        passes(model, tracker)
        (0.1 * model[0].weight.square().sum()).backward()
        grads = step(model, optimizer)
        optimizer.zero_grad()
        assert set(tracker.coverage().unattributed) == {"0.weight"}
        report, parts = tracker.report(), tracker.task_gradients()
        assert report.valid and ("0.weight" not in parts or not parts["0.weight"].any())
        torch.testing.assert_close(parts["3.weight"].sum(0), grads["3.weight"], rtol=1e-9, atol=0)


def test_a_weight_that_is_contradicted_once_comes_back() -> None:
    model, optimizer, tracker = make()
    for k in range(4):
        passes(model, tracker)
        if k == 1:
            (0.1 * model[0].weight.square().sum()).backward()
        step(model, optimizer)
        optimizer.zero_grad()
        assert tracker.report().valid
        assert bool(tracker.coverage().unattributed) == (k == 1)


def test_a_hook_that_changes_a_gradient() -> None:
    """Registered after track(): seen by nobody but the comparison with ``param.grad``."""
    model, optimizer, tracker = make()
    model[0].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    for _ in range(3):
        passes(model, tracker)
        step(model, optimizer)
        optimizer.zero_grad()
        assert tracker.report().valid
        assert set(tracker.coverage().unattributed) == {"0.weight"}


@pytest.mark.parametrize("skips", [True, False])
def test_grad_scaler(skips: bool) -> None:
    model, optimizer, tracker = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    tracker.remove()
    tracker = tg.track(model, ["a", "b"], optimizer, mode="exact", loss_scale=scaler)
    for k in range(5):
        with tracker.batch(IDS):
            loss = loss_of(model)
            if skips and k == 2:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        scaler.step(optimizer)
        if not (skips and k == 2):
            assert_follows(model, tracker, grads)
            assert tracker.report().examples.tolist() == [4, 4]
        optimizer.zero_grad()
        scaler.update()
        assert tracker.report().valid != (skips and k == 2)


def two(model: nn.Sequential) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    return torch.optim.SGD(model[:2].parameters(), lr=0.01), torch.optim.AdamW(model[2:].parameters(), lr=0.01)


def test_two_optimizers_one_after_the_other() -> None:
    model, _, tracker = make()
    tracker.remove()
    first, second = two(model)
    tracker = tg.track(model, ["a", "b"], [first, second], mode="exact")
    for k in range(4):
        passes(model, tracker)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        a, b = (first, second) if k % 2 else (second, first)
        a.step()
        if k > 1:
            a.zero_grad()
        b.step()
        assert_follows(model, tracker, grads)
        model.zero_grad()


def test_an_optimizer_that_steps_every_second_time() -> None:
    """The report never holds the other one's old gradient."""
    model, _, tracker = make()
    tracker.remove()
    first, second = two(model)
    tracker = tg.track(model, ["a", "b"], [first, second], mode="exact")
    for k in range(6):
        passes(model, tracker)
        first.step()
        first.zero_grad()
        if k % 2:
            second.step()
            second.zero_grad()
        report = tracker.report()
        assert not report.valid and report.reason is not None
    for _ in range(2):
        passes(model, tracker)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        first.step()
        second.step()
        model.zero_grad()
        assert_follows(model, tracker, grads)


def test_two_optimizers_in_turn_each_on_its_own_batch() -> None:
    """A GAN that is tracked as one model."""
    model, _, tracker = make()
    tracker.remove()
    first, second = two(model)
    tracker = tg.track(model, ["a", "b"], [first, second], mode="exact")
    for k in range(6):
        passes(model, tracker)
        (first if k % 2 else second).step()
        model.zero_grad()
        report = tracker.report()
        assert not report.valid and report.reason is not None
        assert k < 1 or "optimizer" in report.reason


def test_an_optimizer_of_a_part_says_nothing_of_the_rest() -> None:
    """Parameters that no optimizer holds are read with the others."""
    model, _, tracker = make()
    tracker.remove()
    first, _ = two(model)
    tracker = tg.track(model, ["a", "b"], first, mode="exact")
    for _ in range(3):
        passes(model, tracker)
        assert_follows(model, tracker, step(model, first))
        model.zero_grad()


def test_parameters_written_through_data_between_steps() -> None:
    """Weight clipping, a swap of averaged weights, local SGD: part of what others did to the task."""
    model, optimizer, tracker = make()
    passes(model, tracker)
    step(model, optimizer)
    optimizer.zero_grad()
    moved = {n: torch.randn_like(p) * 0.1 for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.data += moved[n]
    x = torch.randn(8, 4, dtype=torch.float64)
    with tracker.batch(IDS):
        loss_of(model, x).backward()
    optimizer.step()
    parts = tracker.task_gradients()
    want = torch.stack([sum((2 * parts[n][t] * moved[n]).sum() for n in moved) for t in range(2)])  # type: ignore[misc]
    torch.testing.assert_close(tracker.report().others_effect, want, rtol=1e-9, atol=0)


def test_random_loops() -> None:
    """Whatever is done to the gradients between forward and step: a valid report adds up to what the optimizer took."""
    seen = {True: 0, False: 0}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)

        def chance(p: float, generator: torch.Generator = generator) -> bool:
            return torch.rand((), generator=generator).item() < p

        model, optimizer, tracker = make()
        for _ in range(12):
            for _ in range(1 + chance(0.3)):
                if chance(0.1):
                    optimizer.zero_grad(chance(0.5))
                with tracker.batch(IDS):
                    loss = loss_of(model)
                    if chance(0.2):
                        optimizer.zero_grad(chance(0.5))
                    if chance(0.9):
                        loss.backward()
                if chance(0.1):
                    model[int(chance(0.5)) * 3].zero_grad(chance(0.5))
            held = [p for p in model.parameters() if p.grad is not None]
            if chance(0.2) and held:
                torch.nn.utils.clip_grad_norm_(held, 1e-2)
            elif chance(0.2):
                for p in held:
                    p.grad *= 0.5
            if chance(0.1) and held:
                torch.nn.utils.clip_grad_value_(held, 1e-3)
            if chance(0.1):
                loss_of(model).backward()
            if chance(0.8):
                had = tracker.report().step
                grads = step(model, optimizer)
                report = tracker.report()
                seen[report.valid] += 1
                if report.valid and report.step > had:
                    parts = tracker.task_gradients()
                    total = {n: parts[n].sum(0) for n in tracker.coverage().attributed}
                    found = max((grads[n].norm() / t.norm() for n, t in total.items() if t.norm() > 0), default=1.0)
                    for n, t in total.items():
                        torch.testing.assert_close(t * found, grads[n], rtol=1e-7, atol=1e-12, msg=f"{seed} {n}")
            if chance(0.8):
                optimizer.zero_grad(chance(0.5))
        assert tracker.coverage().fraction == 1, (seed, tracker.coverage())
    assert min(seen.values()) > 30


@pytest.mark.parametrize("why", ["suspected", "thawed", "frozen"])
def test_the_memory_of_a_parameter_is_over_the_steps_that_it_was_in(why: str) -> None:
    """At fixed parameters and one batch every mean gradient is the memory: the signal is its squared norm."""
    model, optimizer, tracker = make()
    tracker.remove()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(8, 4, dtype=torch.float64)
    model[0].requires_grad_(why != "thawed")
    tracker = tg.track(model, ["a", "b"], optimizer, mode="exact")
    for k in range(9):
        model[0].requires_grad_(not ((why == "thawed" and k < 4) or (why == "frozen" and 2 <= k < 6)))
        with tracker.batch(IDS):
            loss = loss_of(model, x)
        if why == "suspected" and k in (0, 2):
            loss = loss + 0.1 * model[0].weight.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if k == 4:
            state = tracker.state_dict()
            tracker.load_state_dict(state)
    report = tracker.report()
    assert report.valid and tracker.coverage().fraction == 1
    torch.testing.assert_close(report.signal, report.norm.square(), rtol=1e-9, atol=0)
    torch.testing.assert_close(report.memory_dot.diagonal(), report.signal / 2, rtol=1e-9, atol=0)


# -- hooks of others ---------------------------------------------------------------------------------------------------


def clamp(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.clamp_(-1e-3, 1e-3)


@pytest.mark.parametrize("first", [True, False], ids=["before track", "after track"])
@pytest.mark.parametrize("kind", ["tensor", "post accumulate"])
def test_hooks_that_clamp_every_gradient(kind: str, first: bool) -> None:
    model, optimizer, tracker = make()
    if first:
        tracker.remove()
    for p in model.parameters():
        if kind == "tensor":
            p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        else:
            p.register_post_accumulate_grad_hook(clamp)
    if first:
        tracker = tg.track(model, ["a", "b"], optimizer, mode="exact")
    for _ in range(8):
        passes(model, tracker)
        step(model, optimizer)
        optimizer.zero_grad()
        assert not tracker.report().valid
    assert tracker.coverage().fraction == 1


def test_hooks_that_scale_every_gradient_alike() -> None:
    model, optimizer, tracker = make()

    def half(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(half)
    for _ in range(5):
        passes(model, tracker)
        assert_follows(model, tracker, step(model, optimizer), factor=0.5)
        optimizer.zero_grad()


def test_a_hook_of_the_optimizer_that_came_later_is_seen() -> None:
    model, optimizer, tracker = make()

    def clip(*_: object) -> None:
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)

    optimizer.register_step_pre_hook(clip)
    for _ in range(5):
        passes(model, tracker)
        step(model, optimizer)
        optimizer.zero_grad()
        assert not tracker.report().valid


def test_a_step_that_calls_the_step_of_its_base_class() -> None:
    class Mine(torch.optim.AdamW):
        def step(self, closure: object = None) -> object:  # type: ignore[override]
            return super().step(closure)  # type: ignore[arg-type]

    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # torch then calls the hooks of both classes' steps
    model, _, tracker = make()
    tracker.remove()
    optimizer = Mine(model.parameters())
    tracker = tg.track(model, ["a", "b"], optimizer, mode="exact")
    for number in range(1, 4):
        passes(model, tracker)
        assert_follows(model, tracker, step(model, optimizer))
        assert tracker.report().step == number
        optimizer.zero_grad()
    assert tracker._steps.silence._steps == 0  # the inner call is no step without a batch


# -- what is not finite, and what nothing is left of -------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_gradients_that_became_not_finite_after_the_backward_pass(value: float, everywhere: bool) -> None:
    model, optimizer, tracker = make()
    passes(model, tracker)
    for p in model.parameters() if everywhere else [model[0].weight]:
        assert p.grad is not None
        p.grad.mul_(value)
    optimizer.step()
    report = tracker.report()
    assert not report.valid and report.reason is not None and "not finite" in report.reason
    assert tracker.coverage().fraction == 1


def test_an_untracked_forward_in_the_same_backward_pass() -> None:
    model, optimizer, tracker = make()
    for k in range(3):
        other = loss_of(model)  # outside of batch()
        with tracker.batch(IDS):
            loss = loss_of(model)
        (loss + other if k < 2 else loss).backward()
        step(model, optimizer)
        optimizer.zero_grad()
        assert tracker.report().valid == (k == 2)
    assert tracker.coverage().fraction == 1


def test_two_backward_passes_where_single_uses_were_expected() -> None:
    model, optimizer, tracker = make("exact_gram", sketch_dim=16)
    for k in range(4):
        with tracker.batch(IDS):
            loss = loss_of(model)
        twice = k in (1, 3)
        loss.backward(retain_graph=twice)
        if twice:
            loss.backward()
        with pytest.warns(UserWarning, match="had one use") if k == 1 else contextlib.nullcontext():
            grads = step(model, optimizer)
        optimizer.zero_grad()
        report = tracker.report()
        assert report.valid
        if k == 1:
            assert report.gram.isnan().all() and report.norm.isnan().all() and report.signal.isfinite().all()
        else:
            torch.testing.assert_close(report.gram.sum(), sum(g.square().sum() for g in grads.values()))
    assert tracker.coverage().fraction == 1


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_that_was_given_up_runs_backward_again() -> None:
    model, optimizer, tracker = make()
    with tracker.batch(IDS):
        first = loss_of(model)
    first.backward(retain_graph=True)
    optimizer.zero_grad()
    with tracker.batch(IDS[:3]):
        model(torch.randn(3, 4, dtype=torch.float64)).square().sum(1).mean().backward()
    first.backward()
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.report().examples.tolist() == [6, 5]


def test_a_batch_that_was_left_by_an_exception_and_is_used_all_the_same() -> None:
    model, optimizer, tracker = make()
    with pytest.raises(KeyError), tracker.batch(IDS):
        kept = loss_of(model)
        raise KeyError
    passes(model, tracker)
    kept.backward()
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.report().examples.tolist() == [8, 8]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_leaves_nothing_behind(mode: Callable[[], object]) -> None:
    model, optimizer, tracker = make()
    model[3].requires_grad_(False)
    for k in range(4):
        for _ in range(5):
            with mode(), tracker.batch(IDS):  # type: ignore[attr-defined]
                loss_of(model)
            with tracker.batch(IDS), mode():  # type: ignore[attr-defined]
                loss_of(model)
        assert len(tracker._batches.pending) <= 1
        if k == 2:
            model[3].requires_grad_(True)
        passes(model, tracker)
        grads = {n: g for n, g in step(model, optimizer).items() if k > 1 or not n.startswith("3")}
        assert tracker.report().valid, tracker.report().reason
        parts = tracker.task_gradients()
        for name, grad in grads.items():
            torch.testing.assert_close(parts[name].sum(0), grad, rtol=1e-9, atol=1e-14)
        optimizer.zero_grad()


def test_a_graph_from_before_an_interrupt_runs_after_it() -> None:
    model, optimizer, tracker = make()
    losses = []
    for _ in range(2):
        with tracker.batch(IDS):
            losses.append(loss_of(model))

    def stop(_: Tensor) -> None:
        raise ZeroDivisionError

    handle = model[0].weight.register_hook(stop)
    with pytest.raises(ZeroDivisionError):
        losses[0].backward()
    handle.remove()
    optimizer.zero_grad()
    losses[1].backward()
    assert_follows(model, tracker, step(model, optimizer))
    assert tracker.report().examples.tolist() == [4, 4]


def test_a_gradient_filled_by_hand_where_no_pass_came() -> None:
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    tracker = tg.track(model, ["a", "b"], optimizer, mode="exact", verify=False)
    for k in range(3):
        x = torch.randn(8, 4, dtype=torch.float64)
        with tracker.batch(IDS):
            out = model[0](x) + model[1](x) if k == 0 else model[0](x)
            out.square().sum(1).mean().backward()
        if k == 1:
            model[1].weight.grad = torch.randn(3, 4, dtype=torch.float64)
        optimizer.step()
        optimizer.zero_grad()
        assert tracker.report().valid == (k != 1)


def test_evaluation_with_other_weights_is_no_effect_of_others() -> None:
    """A tracker that is closed by hand; averaged weights are swapped in for an evaluation."""
    model, optimizer, tracker = make()
    tracker.remove()
    tracker = tg.track(model, ["a", "b"], mode="exact")
    for k in range(3):
        if k == 2:
            saved = {n: v.clone() for n, v in model.state_dict().items()}
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)
                with tracker.batch(IDS):
                    loss_of(model)
            model.load_state_dict(saved)
        passes(model, tracker)
        optimizer.step()
        tracker.step()
        optimizer.zero_grad()
    assert tracker.report().others_effect.abs().max() < 1e-15


def test_suspects_are_part_of_the_state() -> None:
    runs = []
    for resumed in (False, True):
        model, optimizer, tracker = make()
        for k in range(3):
            if resumed and k == 2:
                state, weights = tracker.state_dict(), model.state_dict()
                model, optimizer, tracker = make()
                model.load_state_dict(weights)
                tracker.load_state_dict(state)
            torch.manual_seed(k)
            with tracker.batch(IDS):
                loss = loss_of(model)
            (loss + model[0].weight.square().sum() if k >= 1 else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((tracker.report().to_dict(), tracker.coverage().unattributed))
    assert runs[0] == runs[1] and set(runs[0][1]) == {"0.weight"}


def test_a_batch_that_is_never_entered_is_freed() -> None:
    _, _, tracker = make()
    batches = [weakref.ref(tracker.batch(IDS)) for _ in range(3)]
    gc.collect()
    assert all(batch() is None for batch in batches)


def test_many_micro_batches_cost_the_same_each() -> None:
    model, optimizer, tracker = make(verify=False)
    for _ in range(400):
        passes(model, tracker)
    assert len(tracker._batches.pending) == 400
    optimizer.step()
    assert tracker.report().valid and tracker.report().examples.tolist() == [1600, 1600]
    assert tracker._batches.pending == []


def test_gradients_clamped_in_the_middle_of_the_backward_pass() -> None:
    """By a hook on a module: those of the layers after it have been added already."""
    model, optimizer, tracker = make()

    def hook(module: nn.Module, grad_input: object, grad_output: object) -> None:
        clamp(model[3].weight)

    model[1].register_full_backward_hook(hook)
    for _ in range(6):
        passes(model, tracker)
        step(model, optimizer)
        optimizer.zero_grad()
        assert not tracker.report().valid
    assert tracker.coverage().fraction == 1
