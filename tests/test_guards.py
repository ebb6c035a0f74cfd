"""What must never be silently wrong: each guard with models that fool a tracker without it, and every wrong call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES, squared_error
from tests.utils.oracle import separate_backwards
from tests.utils.steps import TASKS, Case, Expected, Tracked, assert_report, make_case, relative_error, run_batch, tracked_step
from tests.utils.zoo.base import SEQ, VOCAB, WIDTH
from tests.utils.zoo.sequence import GPT, SequenceFirst

IDS = torch.tensor([2, 0, -1, 1, 0])


def case_of(model: nn.Module, *args: Tensor, ids: Tensor = IDS) -> Case:
    return Case(model.double(), args, {}, lambda out: squared_error(out, ids.ndim), ids, None)


def indices(batch: int = SEQ, seq: int = SEQ) -> Tensor:
    return torch.randint(1, VOCAB, (batch, seq))


def assert_never_wrong(case: Case, done: Tracked) -> None:
    """Whatever is attributed equals separate backwards."""
    oracle = separate_backwards(*case.oracle_arguments)
    parts = done.task_gradients
    for name in done.attributed:
        assert relative_error(parts[name], oracle[name]) <= 1e-10, name
    if done.attributed:
        assert_report(done.report, Expected.of(oracle, done.attributed, case.ids, None), 1e-9)


# -- guard 1: rows by leading shape ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["windows", "flattened", "half_batch", "sequence_first", "gpt_flat_positions", "learned_query",
                                  "moe_gathered", "shared_across_rows"])  # fmt: skip
def test_rows_of_another_shape_are_not_attributed_even_unverified(name: str) -> None:
    case = make_case(ARCHITECTURES[name], "example")
    done = tracked_step(case, verify=False)
    must, must_not = ARCHITECTURES[name].expected(case.model, "example")
    assert must_not and must_not <= set(done.unattributed)
    assert must <= set(done.attributed)
    assert_never_wrong(case, done)


def test_a_layer_on_rows_of_another_shape_later_is_dropped_then() -> None:
    """The last batch of an epoch, or a branch taken once: the step on which it happens is already without the layer."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Linear(7, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.odd = False

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.odd else self.inner(x)

    model = Sometimes()
    case = case_of(model, torch.randn(5, 3, 7, dtype=torch.float64))
    done = tracked_step(case)
    assert "inner.weight" in done.attributed
    model.odd = True
    case.model.zero_grad()
    with pytest.warns(UserWarning, match=r"inner\."):
        run_batch(done.tracker, case)
        done.tracker.step()
    oracle = separate_backwards(*case.oracle_arguments)
    assert set(done.tracker.coverage().attributed) == {"stem.weight", "stem.bias"}
    assert_report(done.tracker.report(), Expected.of(oracle, ["stem.weight", "stem.bias"], IDS, None), 1e-9)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, oracle[name].sum(0)) <= 1e-12, name


# -- guard 2: verification by perturbation -----------------------------------------------------------------------------


class StackedWindows(nn.Module):
    """Windows ahead of the batch, [windows, B, d], with as many windows as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack(self.stem(x).chunk(5, 1)).flatten(2)
        return self.head(torch.tanh(self.inner(x)).transpose(0, 1).sum(1))


class TransposedPositions(nn.Module):
    """A sequence-first model whose positions are expanded over the batch: [S, B] indices that depend on no example."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(SEQ, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, index: Tensor) -> Tensor:
        place = torch.arange(index.shape[1])[:, None].expand(-1, len(index))
        x = self.embedding(index) + self.position(place).transpose(0, 1)
        return self.head(torch.tanh(x))


class Shuffled(nn.Module):
    """Another order in the middle, undone by a layer that is itself in that order."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order
        self.stem, self.inner, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(torch.tanh(self.stem(x))[self.order])
        return self.head(torch.tanh(inner)[self.order.argsort()])


class BatchMean(nn.Module):
    """Every example sees the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x - x.mean(0))


FOOLED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "arange_positions": (lambda: GPT("flat"), indices, {"position.weight"}),
    "sequence_first": (SequenceFirst, indices, {"inner.weight", "inner.bias"}),
    "stacked_windows": (StackedWindows, lambda: torch.randn(5, 5, 7), {"inner.weight", "inner.bias"}),
    "transposed_positions": (TransposedPositions, indices, {"position.weight"}),
    "reversed": (lambda: Shuffled(torch.arange(4, -1, -1)), lambda: torch.randn(5, 7), {"inner.weight", "inner.bias"}),
    "rolled": (lambda: Shuffled(torch.arange(5).roll(1)), lambda: torch.randn(5, 7), {"inner.weight", "inner.bias"}),
    "rolled_by_two": (lambda: Shuffled(torch.arange(5).roll(2)), lambda: torch.randn(5, 7), {"inner.weight", "inner.bias"}),
    "one_swap": (lambda: Shuffled(torch.tensor([1, 0, 2, 3, 4])), lambda: torch.randn(5, 7), {"inner.weight", "inner.bias"}),
    "swap_of_even_rows": (
        lambda: Shuffled(torch.tensor([2, 1, 0, 3, 4])), lambda: torch.randn(5, 7), {"inner.weight", "inner.bias"},
    ),
    "swap_of_odd_rows": (
        lambda: Shuffled(torch.tensor([0, 3, 2, 1, 4])), lambda: torch.randn(5, 7), {"inner.weight", "inner.bias"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOOLED)
def test_rows_that_only_look_like_the_batch_are_found_by_perturbation(name: str) -> None:
    make, data, fooled = FOOLED[name]
    x = data()
    case = case_of(make(), x.double() if x.is_floating_point() else x)
    assert fooled <= set(tracked_step(case, verify=False).attributed), "nothing to find"
    case = case_of(make(), x.double() if x.is_floating_point() else x)
    done = tracked_step(case)
    assert fooled <= set(done.unattributed), done.attributed
    assert_never_wrong(case, done)
    assert set(done.attributed) | fooled == {n for n, _ in case.model.named_parameters()}, done.unattributed
    assert done.tracker.coverage().verified


@pytest.mark.parametrize("make", [BatchMean, ARCHITECTURES["batch_attention"].build], ids=["mean", "attention"])
def test_layers_behind_a_mixing_of_examples_are_dropped(make: Callable[[], nn.Module]) -> None:
    case = case_of(make(), torch.randn(5, 7, dtype=torch.float64))
    done = tracked_step(case)
    assert {"head.weight", "head.bias"} <= set(done.unattributed)


def test_tokens_rolled_along_the_sequence_with_ids_per_token() -> None:
    """Shifted windows with ids (B, S): the shape is right and no example mixes, yet rows belong to other tokens."""

    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(torch.tanh(self.stem(x)).roll(1, 1))
            return self.head(torch.tanh(x).roll(-1, 1))

    ids = torch.arange(20).view(4, 5) % 4 - 1
    case = case_of(Rolled(), torch.randn(4, 5, 7, dtype=torch.float64), ids=ids)
    done = tracked_step(case)
    assert {"inner.weight", "inner.bias"} <= set(done.unattributed)
    assert_never_wrong(case, done)


def test_verification_leaves_no_trace() -> None:
    """Dropout draws, BatchNorm statistics, training mode and custom buffers are as without it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.body = nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x)

    outs, states = [], []
    for verify in (False, True):
        torch.manual_seed(3)
        model = Counting().double()
        tracker = tg.track(model, tasks=list(TASKS), verify=verify)
        with tracker.batch(IDS):
            out = model(torch.randn(5, 7, dtype=torch.float64))
            out.sum().backward()
        outs.append((out.detach(), torch.rand(3)))
        states.append(model.state_dict())
        assert all(module.training for module in model.modules())
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_verification_when_a_batch_cannot_tell_waits_for_one_that_can() -> None:
    """One example, or equal examples: nothing to perturb. The next batch is asked."""
    model = Shuffled(torch.tensor([1, 0]))
    case = case_of(model, torch.randn(1, 7, dtype=torch.float64).expand(2, -1).clone(), ids=torch.tensor([0, 1]))
    done = tracked_step(case)
    assert not done.tracker.coverage().verified
    case.args = (torch.randn(2, 7, dtype=torch.float64),)
    case.model.zero_grad()
    with pytest.warns(UserWarning, match=r"inner\."):
        run_batch(done.tracker, case)
        done.tracker.step()
    assert done.tracker.coverage().verified
    assert set(done.tracker.coverage().attributed) == {"stem.weight", "stem.bias", "head.weight", "head.bias"}


def test_verify_by_hand() -> None:
    model = Shuffled(torch.arange(5).roll(1))
    case = case_of(model, torch.randn(5, 7, dtype=torch.float64))
    tracker = tg.track(model, tasks=list(TASKS), verify=False)
    with pytest.warns(UserWarning, match=r"inner\."), tracker.batch(IDS):
        coverage = tracker.verify(*case.args)
    assert coverage.verified and "inner.weight" in coverage.unattributed
    with pytest.raises(RuntimeError, match="batch"):
        tracker.verify(*case.args)


@pytest.mark.parametrize("seed", range(5))
def test_verification_has_no_false_alarms_on_repeated_examples(seed: int) -> None:
    """A batch with few distinct examples, binary features and dead units."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randint(2, (5, 1)).double().expand(-1, 4).clone()
    case = case_of(model, x)
    done = tracked_step(case)
    assert done.unattributed == {}, done.unattributed


def test_a_dead_layer_is_no_false_alarm() -> None:
    """LoRA's B is zero at the start, a zero-initialised residual branch hides what comes before it."""

    class ZeroBranch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.down = nn.Linear(7, 7), nn.Linear(7, 3), nn.Linear(3, 7)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.down(self.up(x))

    case = case_of(ZeroBranch(), torch.randn(5, 7, dtype=torch.float64))
    done = tracked_step(case)
    assert done.unattributed == {}, done.unattributed
    assert_never_wrong(case, done)


# -- guard 3: the sum over tasks is param.grad -------------------------------------------------------------------------


class Bypassed(nn.Module):
    """``use`` says how the weight of ``inner`` is used a second time, where no module sees it."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use
        self.stem, self.inner, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.inner(x)) + self.use(self.inner, x))


@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize(
    "use",
    [
        lambda layer, x: F.linear(x.sin(), layer.weight),
        lambda layer, x: x @ layer.weight,
        lambda layer, x: x * layer.weight.diagonal(),
        lambda layer, x: type(layer).forward(layer, x.cos()),
    ],
    ids=["functional", "matmul", "diagonal", "unbound_forward"],
)
def test_uses_of_a_weight_that_no_module_sees(use: Callable[[nn.Linear, Tensor], Tensor], mode: str) -> None:
    case = case_of(Bypassed(use), torch.randn(5, 7, dtype=torch.float64))
    unguarded = tracked_step(case, mode=mode, verify=False, sketch_dim=4096)
    assert "inner.weight" in unguarded.attributed, "nothing to find"
    unguarded.tracker.remove()
    case.model.zero_grad()
    done = tracked_step(case, mode=mode, sketch_dim=4096)
    assert "inner.weight" in done.unattributed
    assert {"stem.weight", "stem.bias", "head.weight", "head.bias"} <= set(done.attributed)
    oracle = separate_backwards(*case.oracle_arguments)
    if mode == "exact":
        assert_never_wrong(case, done)
    assert_report(done.report, Expected.of(oracle, done.attributed, IDS, None), 1e-9)


@pytest.mark.parametrize("sketch_dim", [16, 64])
def test_a_small_sketch_finds_them_too(sketch_dim: int) -> None:
    case = case_of(Bypassed(lambda layer, x: F.linear(x.sin(), layer.weight)), torch.randn(5, 7, dtype=torch.float64))
    done = tracked_step(case, mode="sketch", sketch_dim=sketch_dim)
    assert "inner.weight" in done.unattributed
    assert {"stem.weight", "stem.bias", "head.weight", "head.bias"} <= set(done.attributed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_penalty_on_the_weights(dtype: torch.dtype) -> None:
    case = make_case(ARCHITECTURES["mlp"], "example", dtype=dtype)
    tracker = tg.track(case.model, tasks=list(TASKS))
    with pytest.warns(UserWarning, match=r"3\.weight"):
        with tracker.batch(case.ids):
            (case.loss() + 0.1 * case.model[3].weight.square().sum()).backward()  # type: ignore[index, union-attr]
        tracker.step()
    assert set(tracker.coverage().unattributed) == {"3.weight"}
    assert tracker.report().valid
    oracle = separate_backwards(*case.oracle_arguments)
    names = tracker.coverage().attributed
    assert_report(tracker.report(), Expected.of(oracle, names, case.ids, None), 1e-9 if dtype == torch.float64 else 1e-4)


def test_a_use_that_begins_later_is_found_on_a_later_check() -> None:
    model = Bypassed(lambda layer, x: torch.zeros(()))
    case = case_of(model, torch.randn(5, 7, dtype=torch.float64))
    done = tracked_step(case)
    assert done.unattributed == {}
    model.use = lambda layer, x: F.linear(x.sin(), layer.weight)
    with pytest.warns(UserWarning, match=r"inner\."):
        for _ in range(400):
            model.zero_grad()
            run_batch(done.tracker, case)
            done.tracker.step()
            if "inner.weight" in done.tracker.coverage().unattributed:
                break
    assert "inner.weight" in done.tracker.coverage().unattributed


def test_a_forward_outside_of_the_batch_in_the_same_step() -> None:
    """An auxiliary loss whose forward nobody tracked is in ``param.grad`` and in no task."""
    case = make_case(ARCHITECTURES["mlp"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS))
    with pytest.warns(UserWarning, match="outside"):
        run_batch(tracker, case)
        case.model(torch.randn(4, 7, dtype=torch.float64)).square().mean().backward()
        tracker.step()
    assert tracker.coverage().unattributed


def test_clipping_by_value_is_an_alarm_for_what_it_changed() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS))
    with pytest.warns(UserWarning, match="clipping by value"):
        run_batch(tracker, case)
        torch.nn.utils.clip_grad_value_(case.model.parameters(), 1e-3)
        tracker.step()


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_what_was_left_out_stays_out_of_the_memory(mode: str) -> None:
    """Signal and memory_dot of the second step are over the attributed parameters alone."""
    case = case_of(Bypassed(lambda layer, x: F.linear(x.sin(), layer.weight)), torch.randn(5, 7, dtype=torch.float64))
    oracle = separate_backwards(*case.oracle_arguments)
    done = tracked_step(case, mode=mode, sketch_dim=4096)
    case.model.zero_grad()
    run_batch(done.tracker, case)
    done.tracker.step()
    expected = Expected.of(oracle, done.attributed, IDS, None)
    torch.testing.assert_close(done.tracker.report().signal, expected.norm.square(), rtol=1e-9, atol=0)
    mean = expected.norm / expected.gram.diagonal().sqrt()
    torch.testing.assert_close(done.tracker.report().memory_dot[:, :3], mean[:, None] * expected.gram, rtol=1e-9, atol=1e-18)


# -- steps that do not happen ------------------------------------------------------------------------------------------


def history(case: Case, disturb: Callable[[tg.TaskGradTracker, Case], None] | None, **options: Any) -> list[tg.StepReport]:
    """Two good steps at fixed parameters, with something in between that must leave no mark."""
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact", **options)
    reports = []
    for number in range(2):
        if number == 1 and disturb is not None:
            disturb(tracker, case)
            case.model.zero_grad()
        run_batch(tracker, case)
        tracker.step()
        case.model.zero_grad()
        reports.append(tracker.report())
    return reports


def non_finite(value: float) -> Callable[[tg.TaskGradTracker, Case], None]:
    def disturb(tracker: tg.TaskGradTracker, case: Case) -> None:
        with tracker.batch(case.ids):
            (case.loss() * value).backward()
        tracker.step()
        assert not tracker.report().valid
        assert tracker.report().signal.isnan().all()

    return disturb


def one_bad_row(tracker: tg.TaskGradTracker, case: Case) -> None:
    good = case.args
    x = good[0].clone()
    x[1, 0] = torch.inf
    case.args = (x,)
    run_batch(tracker, case)
    case.args = good
    tracker.step()
    assert not tracker.report().valid


def zeroed(set_to_none: bool) -> Callable[[tg.TaskGradTracker, Case], None]:
    def disturb(tracker: tg.TaskGradTracker, case: Case) -> None:
        run_batch(tracker, case)
        case.model.zero_grad(set_to_none=set_to_none)
        assert not tracker.report().valid

    return disturb


def zeroed_then_stepped(tracker: tg.TaskGradTracker, case: Case) -> None:
    run_batch(tracker, case)
    case.model.zero_grad()
    tracker.step()
    assert not tracker.report().valid


def raised_before_backward(tracker: tg.TaskGradTracker, case: Case) -> None:
    with pytest.raises(KeyError, match="user"), tracker.batch(case.ids.roll(1)):
        case.loss()
        raise KeyError("user")


def raised_before_forward(tracker: tg.TaskGradTracker, case: Case) -> None:
    with pytest.raises(KeyError, match="user"), tracker.batch(case.ids.roll(1)):
        raise KeyError("user")


def raised_in_forward(tracker: tg.TaskGradTracker, case: Case) -> None:
    with pytest.raises(RuntimeError, match="shape"), tracker.batch(case.ids.roll(1)):
        case.model(torch.randn(6, 3, dtype=torch.float64))


def raised_inside_backward(tracker: tg.TaskGradTracker, case: Case) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ValueError("user")

    handle = case.model[2].register_forward_hook(lambda module, args, out: Broken.apply(out))  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="user"):
        run_batch(tracker, case)
    handle.remove()


def never_backward(tracker: tg.TaskGradTracker, case: Case) -> None:
    with tracker.batch(case.ids.roll(2)):
        case.loss()


def empty_batch(tracker: tg.TaskGradTracker, case: Case) -> None:
    with tracker.batch(case.ids):
        pass


def validation_loss(tracker: tg.TaskGradTracker, case: Case) -> None:
    with torch.no_grad(), tracker.batch(case.ids.roll(1)):
        case.loss()


def step_without_anything(tracker: tg.TaskGradTracker, case: Case) -> None:
    tracker.step()


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(non_finite(torch.nan), id="nan"),
        pytest.param(non_finite(torch.inf), id="inf"),
        one_bad_row,
        pytest.param(zeroed(True), id="zeroed_to_none"),
        pytest.param(zeroed(False), id="zeroed"),
        zeroed_then_stepped,
        raised_before_backward,
        raised_before_forward,
        raised_in_forward,
        raised_inside_backward,
        never_backward,
        empty_batch,
        validation_loss,
        step_without_anything,
    ],
)
def test_a_step_that_does_not_happen_leaves_no_mark(disturb: Callable[[tg.TaskGradTracker, Case], None]) -> None:
    torch.manual_seed(0)
    plain = history(make_case(ARCHITECTURES["mlp"], "example"), None)
    torch.manual_seed(0)
    marked = history(make_case(ARCHITECTURES["mlp"], "example"), disturb)
    for got, want in zip(marked, plain, strict=True):
        assert got.valid and want.valid
        for name in ("examples", "tokens", "gram", "cosine", "norm", "signal", "memory_dot", "steps_since_seen", "overwrite"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-12, atol=1e-15, equal_nan=True)


def test_skipped_amp_step() -> None:
    """GradScaler meets an infinite gradient and leaves ``optimizer.step`` out; the scale then changes."""
    results = []
    for overflow in (False, True):
        torch.manual_seed(0)
        case = make_case(ARCHITECTURES["mlp"], "example", dtype=torch.float32)
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer, mode="exact", loss_scale=scaler)
        valid = []
        for number in range(3):
            factor = torch.inf if overflow and number == 1 else 1.0
            if not overflow and number == 1:
                continue
            optimizer.zero_grad()
            with tracker.batch(case.ids):
                scaler.scale(case.loss() * factor).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(case.model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            valid.append(tracker.report().valid)
        report = tracker.report()
        results.append(report)
        assert report.valid and report.step == 2
        assert tracker.coverage().unattributed == {}
        assert valid[0] and valid[-1]
    for name in ("gram", "norm", "signal", "memory_dot", "own_effect", "others_effect"):
        torch.testing.assert_close(getattr(results[1], name), getattr(results[0], name), rtol=1e-3, atol=1e-7, equal_nan=True)


def test_a_skipped_step_is_reported_as_such_once_its_gradients_are_gone() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example", dtype=torch.float32)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    tracker = tg.track(case.model, tasks=list(TASKS), optimizer=optimizer)
    for valid in (True, False, True):
        with tracker.batch(case.ids):
            case.loss().backward()
        if valid:
            optimizer.step()
        optimizer.zero_grad()
        assert tracker.report().valid is valid


def test_the_first_report_is_there_before_any_step() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    report = tg.track(case.model, tasks=list(TASKS)).report()
    assert report.step == 0 and not report.valid
    assert report.steps_since_seen.tolist() == [-1, -1, -1]
    assert report.to_dict()["gram"] == [[None] * 3] * 3
    assert "step 0" in str(report)


# -- wrong calls -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracker() -> tg.TaskGradTracker:
    return tg.track(make_case(ARCHITECTURES["mlp"], "example").model, tasks=list(TASKS))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1, 2], TypeError, r"ids.*tensor.*list"),
        (torch.tensor([0.0, 1.0]), TypeError, r"ids.*int64.*float32.*long"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, r"ids.*int64.*int32.*long"),
        (torch.tensor([True, False]), TypeError, r"ids.*int64.*bool"),
        (torch.tensor(1), ValueError, r"ids.*\(B,\).*\(B, S\).*\(\)"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), ValueError, r"ids.*\(B,\).*\(2, 3, 4\)"),
        (torch.zeros(0, dtype=torch.int64), ValueError, r"ids.*empty"),
        (torch.tensor([0, 3]), ValueError, r"ids.*\[-1, 3\).*3"),
        (torch.tensor([0, -2]), ValueError, r"ids.*\[-1, 3\).*-2"),
    ],
)
def test_wrong_ids(tracker: tg.TaskGradTracker, ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tracker.batch(ids)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0, 1.0], TypeError, r"weight.*tensor"),
        (torch.ones(3), ValueError, r"weight.*\(2,\).*\(3,\)"),
        (torch.tensor([1.0, -1.0]), ValueError, r"weight.*negative"),
        (torch.tensor([1.0, torch.nan]), ValueError, r"weight.*finite"),
    ],
)
def test_wrong_weight(tracker: tg.TaskGradTracker, weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tracker.batch(torch.tensor([0, 1]), weight=weight)


def test_wrong_rows(tracker: tg.TaskGradTracker) -> None:
    with tracker.batch(torch.tensor([0, 1])), pytest.raises(ValueError, match=r"ids.*\[-1, 3\)"), tracker.rows(torch.tensor([5])):
        pass


def test_ids_that_do_not_fit_the_batch_attribute_nothing_and_say_so() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    case.ids = torch.tensor([0, 1, 2, 0])
    tracker = tg.track(case.model, tasks=list(TASKS))
    with pytest.warns(UserWarning, match=r"\(6, \d+\).*ids.*\(4,\)"):
        with tracker.batch(case.ids):
            case.model(*case.args).sum().backward()
        tracker.step()
    assert tracker.coverage().attributed == ()
    assert tracker.coverage().fraction == 0


def test_nested_batches_of_one_tracker(tracker: tg.TaskGradTracker) -> None:
    ids = torch.tensor([0, 1])
    with tracker.batch(ids), pytest.raises(RuntimeError, match=r"batch\(\).*open"), tracker.batch(ids):
        pass


def test_wrong_losses(tracker: tg.TaskGradTracker) -> None:
    with tracker.batch(torch.tensor([0, 1])) as batch, pytest.raises(ValueError, match=r"per_row.*\(2,\).*\(3,\)"):
        batch.losses(torch.zeros(3))


def frozen() -> nn.Module:
    return nn.Linear(3, 2).requires_grad_(False)


def linear() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (frozen, {}, ValueError, r"model.*no trainable.*requires_grad"),
        (lambda: nn.ReLU(), {}, ValueError, r"model.*no trainable"),
        (lambda: nn.PReLU(), {}, ValueError, r"PReLU"),
        (lambda: "model", {}, TypeError, r"model.*Module.*str"),
        (linear, {"tasks": []}, ValueError, r"tasks.*at least one"),
        (linear, {"tasks": ["a", "a"]}, ValueError, r"tasks.*distinct"),
        (linear, {"tasks": "ab"}, TypeError, r"tasks.*'ab'"),
        (linear, {"tasks": [0, 1]}, TypeError, r"tasks.*names"),
        (linear, {"mode": "fast"}, ValueError, r'mode.*"sketch".*"exact".*fast'),
        (linear, {"sketch_dim": 0}, ValueError, r"sketch_dim.*0"),
        (linear, {"sketch_dim": 64.0}, TypeError, r"sketch_dim.*float"),
        (linear, {"memory_decay": 1.0}, ValueError, r"memory_decay.*\[0, 1\).*1\.0"),
        (linear, {"memory_decay": -0.1}, ValueError, r"memory_decay.*-0\.1"),
        (linear, {"optimizer": "adam"}, TypeError, r"optimizer.*"),
        (linear, {"optimizer": [nn.Linear(1, 1)]}, TypeError, r"optimizer.*Linear"),
        (linear, {"loss_scale": "big"}, TypeError, r"loss_scale.*str"),
        (linear, {"include": ["0.weight"]}, TypeError, r"include.*list"),
        (linear, {"include": lambda name, module: False}, ValueError, r"include"),
    ],
)
def test_wrong_arguments_of_track(
    make: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tg.track(make(), **{"tasks": ["a", "b"], **options})


def test_an_optimizer_of_another_model() -> None:
    optimizer = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer.*parameters"):
        tg.track(nn.Linear(3, 2), tasks=["a"], optimizer=optimizer)


def test_an_optimizer_of_the_model_before_it_was_copied() -> None:
    """``model = copy(model)`` after the optimizer was built: half of the pair is the wrong one."""
    model = nn.Linear(3, 2)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"optimizer.*parameters"):
        tg.track(model, tasks=["a"], optimizer=optimizers)


def test_tracking_one_model_twice() -> None:
    model = nn.Linear(3, 2)
    first = tg.track(model, tasks=["a"])
    with pytest.raises((ValueError, RuntimeError), match=r"remove|tracker"):
        tg.track(model, tasks=["a"])
    first.remove()
    tg.track(model, tasks=["a"])


def test_step_by_hand_with_an_optimizer() -> None:
    model = nn.Linear(3, 2)
    tracker = tg.track(model, tasks=["a"], optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"optimizer.*step"):
        tracker.step()


def test_task_gradients_need_exact_mode_and_a_step() -> None:
    with pytest.raises(RuntimeError, match=r'mode="exact"'):
        tg.track(nn.Linear(3, 2), tasks=["a"]).task_gradients()
    with pytest.raises(RuntimeError, match=r"step"):
        tg.track(nn.Linear(3, 2), tasks=["a"], mode="exact").task_gradients()


def test_a_state_of_another_tracker() -> None:
    state = tg.track(nn.Linear(3, 2), tasks=["a", "b"]).state_dict()
    for other in (
        tg.track(nn.Linear(3, 2), tasks=["a", "c"]),
        tg.track(nn.Linear(3, 2), tasks=["a", "b"], mode="exact"),
        tg.track(nn.Linear(4, 2), tasks=["a", "b"]),
    ):
        with pytest.raises(ValueError, match="state_dict"):
            other.load_state_dict(state)
