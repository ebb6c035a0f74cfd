"""What must never be silently wrong: each guard with models that fool a tracker without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES, squared_error
from tests.utils.oracle import separate_backwards, weight_copies
from tests.utils.steps import (
    TASKS,
    Case,
    Expected,
    Tracked,
    assert_report,
    make_case,
    plain_grads,
    relative_error,
    run_batch,
    tracked_step,
)
from tests.utils.zoo.base import SEQ, VOCAB, WIDTH
from tests.utils.zoo.sequence import GPT, SequenceFirst

IDS = torch.tensor([2, 0, -1, 1, 0])
OTHER_SHAPES = (
    "windows", "flattened", "half_batch", "sequence_first", "gpt_flat_positions", "learned_query", "moe_gathered",
    "shared_across_rows",
)  # fmt: skip


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


@pytest.mark.parametrize("name", OTHER_SHAPES)
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


INNER = {"inner.weight", "inner.bias"}
ORDERS = {
    "reversed": [4, 3, 2, 1, 0],
    "rolled": [4, 0, 1, 2, 3],
    "rolled_by_two": [3, 4, 0, 1, 2],
    "first_swap": [1, 0, 2, 3, 4],
    "swap_of_even_rows": [2, 1, 0, 3, 4],
    "swap_of_odd_rows": [0, 3, 2, 1, 4],
}
FOOLED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "arange_positions": (lambda: GPT("flat"), indices, {"position.weight"}),
    "sequence_first": (SequenceFirst, indices, INNER),
    "stacked_windows": (StackedWindows, lambda: torch.randn(5, 5, 7), INNER),
    "transposed_positions": (TransposedPositions, indices, {"position.weight"}),
    **{
        name: ((lambda order=order: Shuffled(torch.tensor(order))), lambda: torch.randn(5, 7), INNER)
        for name, order in ORDERS.items()
    },
}


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
def test_a_mixing_of_examples_that_treats_all_alike_is_row_attribution(make: Callable[[], nn.Module]) -> None:
    """As BatchNorm in training mode: what flows through the weights at the rows of the task."""
    case = case_of(make(), torch.randn(5, 7, dtype=torch.float64))
    done = tracked_step(case)
    assert done.unattributed == {} and done.tracker.coverage().verified
    oracle = weight_copies(*case.oracle_arguments)
    for name, parts in done.task_gradients.items():
        assert relative_error(parts, oracle[name]) <= 1e-10, name


class Neighbours(nn.Module):
    """Every example sees the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + 0.1 * x.roll(1, 0))


@pytest.mark.parametrize("batch", [3, 4, 5, 8, 33])
@pytest.mark.parametrize("seed", range(3))
def test_layers_behind_any_other_mixing_are_dropped(batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    done = tracked_step(case_of(Neighbours(), torch.randn(batch, 7, dtype=torch.float64), ids=torch.arange(batch) % 3))
    assert set(done.unattributed) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("mode", ["sketch", "exact_gram", "exact"])
def test_nothing_left_to_compare(mode: str) -> None:
    """The only layer fails: the step runs, and no report pretends to be about something."""

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + x.roll(1, 0))

    case = case_of(Only(), torch.randn(5, 7, dtype=torch.float64))
    plain, _ = plain_grads(case)
    done = tracked_step(case, mode, sketch_dim=16)
    assert done.attributed == () and not done.report.valid
    assert all(relative_error(done.grads[name], grad) <= 1e-12 for name, grad in plain.items())


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
    ],
    ids=["functional", "matmul", "diagonal"],
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
    assert_report(
        tracker.report(), Expected.of(oracle, names, case.ids, None), 1e-9 if dtype == torch.float64 else 1e-4
    )


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


@pytest.mark.parametrize(
    "call",
    [lambda layer, x: type(layer).forward(layer, x), lambda layer, x: nn.Linear.forward(layer, x), lambda m, x: m(x)],
    ids=["of the type", "of the class", "call"],
)
def test_a_second_use_that_goes_through_the_class_is_seen(call: Callable[[nn.Linear, Tensor], Tensor]) -> None:
    case = case_of(Bypassed(lambda layer, x: call(layer, x.cos())), torch.randn(5, 7, dtype=torch.float64))
    done = tracked_step(case)
    assert done.unattributed == {}
    assert_never_wrong(case, done)


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
    torch.testing.assert_close(
        done.tracker.report().memory_dot[:, :3], mean[:, None] * expected.gram, rtol=1e-9, atol=1e-18
    )
