"""``every=n``: one step in n is measured, the others are the plain step; ``max_unmeasured=k`` measures more."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from tests.utils.ranks import on_two_ranks

TASKS = ["a", "b", "c"]
IDS = torch.tensor([0, 1, 2, 0, 1, -1])


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4)).double()


class Loop:
    """A model, its tracker, and every step's data as a function of its number."""

    def __init__(self, track: bool = True, model: nn.Module | None = None, **options: Any) -> None:
        self.model = make_model() if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.tracker = tg.track(self.model, TASKS, self.optimizer, **options) if track else None
        self.number = 0
        self.call: Callable[[Tensor], Tensor] = self.model

    def forward(self, ids: Tensor = IDS, part: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(100 * self.number + part)
        x = torch.randn(len(ids), 6, generator=generator, dtype=torch.float64)
        return self.call(x).square().mean(1)

    def step(self, ids: Tensor = IDS, passes: int = 1) -> tg.StepReport | None:
        for part in range(passes):
            if self.tracker is None:
                (self.forward(ids, part).mean() / passes).backward()
            else:
                with self.tracker.batch(ids) as b:
                    losses = self.forward(ids, part)
                    b.losses(losses)
                    (losses.mean() / passes).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1
        return None if self.tracker is None else self.tracker.report()


def same_numbers(a: tg.StepReport, b: tg.StepReport, *but: str) -> None:
    for name, value in vars(a).items():
        if isinstance(value, Tensor) and name not in but:
            assert torch.equal(value.nan_to_num(7.0), getattr(b, name).nan_to_num(7.0)), name


@pytest.mark.parametrize("mode", ["sketch", "exact_gram", "exact"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_training_is_the_same_and_reports_are_of_every_nth_step(mode: str, passes: int, every: int) -> None:
    plain, tracked = Loop(track=False), Loop(mode=mode, every=every)
    for number in range(11):
        plain.step(passes=passes)
        report = tracked.step(passes=passes)
        assert report is not None and report.valid
        assert report.step == number // every * every + 1
        for p, q in zip(plain.model.parameters(), tracked.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_step_between_is_the_plain_one_to_the_bit() -> None:
    loop = Loop(every=3)
    assert loop.tracker is not None
    for number in range(7):
        twin = copy.deepcopy(loop.model)
        with loop.tracker.batch(IDS):
            loss = loop.forward().mean()
            loss.backward()
        if number % 3:
            loop.call = twin
            want = loop.forward().mean()
            want.backward()
            loop.call = loop.model
            assert torch.equal(loss, want)
            for p, q in zip(loop.model.parameters(), twin.parameters(), strict=True):
                assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.number += 1


@pytest.mark.parametrize("mode", ["sketch", "exact_gram", "exact"])
def test_a_measured_step_says_of_its_gradients_what_a_tracker_of_every_step_says(mode: str) -> None:
    all_steps, some = Loop(mode=mode), Loop(mode=mode, every=3)
    for number in range(10):
        full, part = all_steps.step(), some.step()
        assert full is not None and part is not None
        if number % 3 == 0:
            for name in ("gram", "cosine", "others_cosine", "norm", "examples", "tokens"):
                torch.testing.assert_close(getattr(part, name), getattr(full, name), equal_nan=True, msg=name)


def test_effects_are_those_since_the_last_measured_appearance() -> None:
    """By the definition, in exact mode: ⟨ḡ_t(k), θ_k − θ_j⟩, and no split into own and others."""
    loop = Loop(mode="exact", every=3)
    assert loop.tracker is not None
    before: dict[str, Tensor] = {}
    for number in range(9):
        here = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
        report = loop.step()
        assert report is not None
        if number % 3:
            continue
        parts = loop.tracker.task_gradients()
        if before:
            scale = len(IDS) / torch.stack([(t == IDS).sum() for t in range(3)])
            want = sum((parts[n][:3] * (here[n] - before[n])).flatten(1).sum(1) for n in here) * scale
            torch.testing.assert_close(report.update_effect, want)
            assert report.own_effect.isnan().all() and report.others_effect.isnan().all()
            assert report.retention.isnan().all()
            assert report.signal.isfinite().all() and report.curvature.isfinite().all()
        before = here


def test_the_split_is_there_between_two_measured_steps_in_a_row() -> None:
    loop = Loop(mode="exact", every=4, max_unmeasured=1)
    rare, common = torch.tensor([2, 0, 0]), torch.tensor([0, 0, 1])
    reports = [loop.step(ids) for ids in (common, common, common, rare, rare, rare, common, rare)]
    last = reports[-1]
    assert last is not None
    # 1 and 5 by every, 3 for tasks 0 and 1, 7 for 0, 8 for 2
    assert [r.step for r in reports if r is not None] == [1, 1, 3, 3, 5, 5, 7, 8]
    assert last.own_effect[0].isfinite() and last.others_effect[0].isfinite()
    assert last.own_effect[2].isnan() and last.update_effect[2].isfinite()


def test_max_unmeasured_measures_a_task_that_every_nth_step_misses() -> None:
    """Task 2 appears in steps 2, 6, 10, …, which every=4 never measures."""
    common, rare = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 0, 2])
    alone, more = Loop(every=4), Loop(every=4, max_unmeasured=2)
    for number in range(24):
        ids = rare if number % 4 == 1 else common
        first, second = alone.step(ids), more.step(ids)
    assert first is not None and second is not None
    assert first.steps_since_seen[2] == -1
    assert 0 <= second.steps_since_seen[2] <= 12


def test_losses_of_unmeasured_steps_are_in_the_next_report() -> None:
    loop = Loop(every=3)
    seen: list[Tensor] = []
    for number in range(7):
        with torch.no_grad():
            losses = loop.forward()
        seen.append(torch.stack([losses[t == IDS].mean() for t in range(3)]))
        report = loop.step()
        assert report is not None
        if number % 3 == 0:
            torch.testing.assert_close(report.loss, torch.stack(seen).mean(0))
            seen.clear()


def test_a_task_that_was_only_in_unmeasured_steps_has_a_loss_and_no_gradient() -> None:
    loop = Loop(every=2)
    loop.step(torch.tensor([0, 1, 0]))
    with torch.no_grad():
        want = loop.forward(torch.tensor([2, 2, 2])).mean()
    loop.step(torch.tensor([2, 2, 2]))
    report = loop.step(torch.tensor([0, 1, 0]))
    assert report is not None and report.loss is not None
    torch.testing.assert_close(report.loss[2], want)
    assert report.examples[2] == 0 and report.norm[2].isnan()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What tracking is asked during a step."""
    from taskgrad.capture.linear import LinearCapture
    from taskgrad.parameters.columns import Columns

    seen: list[str] = []
    for owner, name in ((LinearCapture, "forward"), (Columns, "theta"), (Columns, "block")):
        plain = getattr(owner, name)

        def spy(*args: Any, _plain: Any = plain, _name: str = name, **kwargs: Any) -> Any:
            seen.append(_name)
            return _plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    yield seen


def test_a_step_between_does_nothing(calls: list[str]) -> None:
    loop = Loop(every=3)
    assert loop.tracker is not None
    for number in range(7):
        calls.clear()
        loop.step()
        assert bool(calls) == (number % 3 == 0)
        hooks = [p._backward_hooks for p in loop.model.parameters()]
        assert not any(hooks), "nobody listens to gradients between"


def test_gradients_of_an_unmeasured_step_that_were_not_zeroed_are_told() -> None:
    loop = Loop(every=2)
    assert loop.tracker is not None
    for number in range(4):
        with loop.tracker.batch(IDS):
            loop.forward().mean().backward()
        loop.optimizer.step()
        if number != 1:
            loop.optimizer.zero_grad()
        report = loop.tracker.report()
        assert report.valid == (number < 2)
    assert report.reason is not None and "not zeroed" in report.reason


def test_evaluation_between_and_gradients_given_up() -> None:
    one, two = Loop(every=2), Loop(every=2)
    assert two.tracker is not None
    for _ in range(6):
        with two.tracker.batch(IDS), torch.no_grad():
            two.forward()
        with two.tracker.batch(IDS):
            two.forward().mean().backward()
        two.optimizer.zero_grad()
        a, b = one.step(), two.step()
        assert a is not None and b is not None
        same_numbers(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    plain, tracked = Loop(every=2), Loop(every=2)
    tracked.call = lambda x: checkpoint(tracked.model, x.requires_grad_(), use_reentrant=reentrant)
    for _ in range(6):
        a, b = plain.step(), tracked.step()
        assert a is not None and b is not None
        torch.testing.assert_close(a.gram, b.gram)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_once_for_either_kind_of_step() -> None:
    plain, tracked = Loop(every=2, verify=False), Loop(every=2, verify=False)
    compiled = torch.compile(tracked.model, backend="aot_eager", fullgraph=True)
    tracked.call = compiled
    for _ in range(4):
        plain.step(), tracked.step()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(4):
            a, b = plain.step(), tracked.step()
    assert a is not None and b is not None
    torch.testing.assert_close(a.gram, b.gram)


def test_two_optimizers_close_one_step() -> None:
    model = make_model()
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[3].parameters(), 0.1)]
    tracker = tg.track(model, TASKS, optimizers, every=2)
    for number in range(5):
        with tracker.batch(IDS):
            model(torch.randn(6, 6, dtype=torch.float64)).mean().backward()
        for o in optimizers:
            o.step()
        model.zero_grad()
        assert tracker.report().step == number // 2 * 2 + 1 and tracker.report().valid


def test_by_hand() -> None:
    model = make_model()
    tracker, optimizer = tg.track(model, TASKS, every=3), torch.optim.SGD(model.parameters(), 0.1)
    for number in range(7):
        with tracker.batch(IDS):
            model(torch.randn(6, 6, dtype=torch.float64)).mean().backward()
        optimizer.step()
        tracker.step()
        optimizer.zero_grad()
        assert tracker.report().step == number // 3 * 3 + 1 and tracker.report().valid


@pytest.mark.parametrize("options", [{"every": 3}, {"every": 3, "max_unmeasured": 1}])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_resumed_to_the_bit(options: dict[str, int], cut: int) -> None:
    batches = [
        torch.tensor(ids) for ids in ([0, 1, 0], [0, 2, 1], [1, 1, 0], [0, 1, 0], [2, 0, 1], [0, 1, 1], [2, 2, 0])
    ]
    whole = Loop(mode="sketch", **options)
    reports = [whole.step(ids) for ids in batches]
    first = Loop(mode="sketch", **options)
    for ids in batches[:cut]:
        first.step(ids)
    second = Loop(**options)
    assert first.tracker is not None and second.tracker is not None
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.tracker.load_state_dict(copy.deepcopy(first.tracker.state_dict()))
    second.number = first.number
    for number, ids in enumerate(batches[cut:], cut):
        again, want = second.step(ids), reports[number]
        assert again is not None and want is not None
        if want.step > cut:
            assert again.step == want.step
            same_numbers(again, want)


def test_a_sampler_that_follows_counts_every_batch() -> None:
    sizes = {"a": 40, "b": 20, "c": 4}
    sampler = tg.AdaptiveBatchSampler(sizes, batch_size=8, seed=0, num_batches=40)
    loop = Loop(every=4)
    assert loop.tracker is not None
    sampler.follow(loop.tracker)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(list(sizes.values())))
    for batch in sampler:
        loop.step(ids[torch.tensor(batch)])
    assert sampler.consumed == 40


def test_bad_arguments() -> None:
    model = make_model()
    for every in (0, -1):
        with pytest.raises(ValueError, match="every must be at least 1"):
            tg.track(model, TASKS, every=every)
    for every in (2.0, True, "2"):
        with pytest.raises(TypeError, match="every must be an int"):
            tg.track(model, TASKS, every=every)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_unmeasured must be at least 1"):
        tg.track(model, TASKS, every=2, max_unmeasured=0)
    with pytest.raises(TypeError, match="max_unmeasured must be an int"):
        tg.track(model, TASKS, every=2, max_unmeasured=1.5)  # type: ignore[arg-type]
    loop = Loop(every=2)
    assert loop.tracker is not None
    loop.step()
    with pytest.raises(ValueError, match="ids"):  # checked in steps between as well
        loop.tracker.batch(torch.tensor([0, 5]))
    with loop.tracker.batch(IDS) as b:
        with pytest.raises(ValueError, match="per_row"):
            b.losses(torch.zeros(3))
        with pytest.raises(RuntimeError, match="open already"), loop.tracker.batch(IDS):
            pass
        with pytest.raises(RuntimeError, match="load_state_dict"):
            loop.tracker.load_state_dict(loop.tracker.state_dict())
        coverage = loop.tracker.verify(torch.randn(6, 6, dtype=torch.float64))
        assert coverage.fraction == 1


def test_steps_without_any_batch_are_told_between_too() -> None:
    loop = Loop(every=50)
    loop.step()
    with pytest.warns(UserWarning, match="3 optimizer steps without a tracked batch"):
        for _ in range(3):
            loop.forward().mean().backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()


def test_a_checkpoint_in_the_middle_of_an_unmeasured_step_is_told(tmp_path: Any) -> None:
    loop = Loop(every=2)
    assert loop.tracker is not None
    loop.step()
    with loop.tracker.batch(IDS):
        loop.forward().mean().backward()
    assert loop.tracker.under_way == 1
    loop.optimizer.step()
    assert loop.tracker.under_way == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.optimizer.zero_grad()
        loop.step()


@pytest.mark.slow
def test_a_rank_without_a_batch_in_a_step_between_measures_the_same_steps_as_the_others() -> None:
    """Else one is in the packet's reduction while the other is in that of the gradients."""
    on_two_ranks(_rank_without_a_batch)


def _rank_without_a_batch(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = tg.track(model, TASKS, optimizer, every=2)
    for step in range(8):
        with tracker.batch(IDS) if rank or step != 3 else contextlib.nullcontext():
            model(torch.randn(6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert tracker.report().step == step // 2 * 2 + 1 and tracker.report().valid


def test_an_optimizer_that_took_the_place_of_the_tracked_one_is_told_between_too() -> None:
    loop = Loop(every=2)
    loop.step()
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="no step closed in the last 10 batches"):
        for _ in range(13):
            loop.step()


@pytest.mark.parametrize("number", [0, 1])
def test_an_exception_after_the_step_inside_of_the_batch_stays_the_user_s(number: int) -> None:
    loop = Loop(every=2)
    assert loop.tracker is not None
    for _ in range(number):
        loop.step()
    with pytest.raises(KeyError, match="mine"), loop.tracker.batch(IDS):
        loop.forward().mean().backward()
        loop.optimizer.step()
        raise KeyError("mine")


def test_losses_of_a_step_that_is_taken_inside_of_the_batch() -> None:
    loop = Loop(every=2)
    assert loop.tracker is not None
    seen = []
    for number in range(5):
        with loop.tracker.batch(IDS) as b:
            losses = loop.forward()
            b.losses(losses)
            losses.mean().backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.number += 1
        seen.append(torch.stack([losses.detach()[t == IDS].mean() for t in range(3)]))
        if number % 2 == 0:
            report = loop.tracker.report()
            torch.testing.assert_close(report.loss, torch.stack(seen).mean(0))
            seen.clear()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("how", ["given up", "not finite", "no backward"])
def test_losses_of_what_became_no_step_are_in_no_report(how: str, set_to_none: bool) -> None:
    plain, loop = Loop(every=2), Loop(every=2)
    assert loop.tracker is not None
    for _ in range(2):  # between the two measured steps
        plain.step(), loop.step()
        with loop.tracker.batch(IDS) as b:
            losses = loop.forward() * (torch.nan if how == "not finite" else 1e3)
            b.losses(losses)
            if how != "no backward":
                losses.mean().backward()
        loop.optimizer.zero_grad(set_to_none)
    a, b = plain.step(), loop.step()
    assert a is not None and b is not None
    same_numbers(a, b)
    assert loop.tracker.under_way == 0


def test_a_step_between_whose_losses_are_not_finite_leaves_the_others() -> None:
    loop = Loop(every=3)
    assert loop.tracker is not None
    loop.step()
    with loop.tracker.batch(IDS) as b:
        b.losses(torch.full((6,), torch.nan))
        loop.forward().mean().backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    loop.step()
    report = loop.step()
    assert report is not None and report.loss is not None and report.loss.isfinite().all()


@pytest.mark.parametrize("inside", [True, False])
def test_evaluations_do_not_decide_what_is_measured(inside: bool) -> None:
    loop = Loop(every=100, max_unmeasured=3)
    assert loop.tracker is not None
    numbers = []
    for _ in range(12):
        ids = torch.full((6,), -1)
        outer = contextlib.nullcontext() if inside else torch.no_grad()
        with outer, loop.tracker.batch(ids), torch.no_grad():
            loop.forward()
        report = loop.step()
        assert report is not None
        numbers.append(report.step)
    assert sorted(set(numbers)) == [1, 5, 9]


def test_what_was_given_up_does_not_decide_either() -> None:
    """An overdue task's step is given up; the next step, without it, does not count as one that measured it."""
    loop = Loop(every=100, max_unmeasured=2)
    assert loop.tracker is not None
    rare, others = torch.tensor([2, 0]), torch.tensor([1, 1])
    for ids in (rare, rare, rare):
        loop.step(ids)
    assert loop.tracker._steps.schedule.unmeasured.tolist() == [2, 0, 2]
    with loop.tracker.batch(rare):
        loop.forward(rare).mean().backward()
    loop.optimizer.zero_grad()
    loop.step(others)
    assert loop.tracker._steps.schedule.unmeasured.tolist() == [2, 1, 2]
    report = loop.step(rare)
    assert report is not None and report.step == 5


def test_two_forwards_before_their_backward_passes_are_not_given_up() -> None:
    loop, plain = Loop(every=20), Loop(every=20)
    assert loop.tracker is not None
    for _ in range(21):
        plain.step(passes=2)
        losses = []
        for part in range(2):
            with loop.tracker.batch(IDS) as b:
                losses.append(loop.forward(part=part))
                b.losses(losses[-1])
        for part in losses:
            (part.mean() / 2).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.number += 1
    a, b_ = plain.tracker.report(), loop.tracker.report()  # type: ignore[union-attr]
    assert a.step == b_.step == 21
    torch.testing.assert_close(a.loss, b_.loss)
    torch.testing.assert_close(a.gram, b_.gram)
