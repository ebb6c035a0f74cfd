"""Corners where a taken-over weight gradient or an extra forward pass goes wrong most easily."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES, squared_error
from tests.utils.oracle import separate_backwards, to_double
from tests.utils.steps import (
    TASKS,
    Case,
    Expected,
    assert_report,
    make_case,
    plain_grads,
    relative_error,
    run_batch,
)

IDS = torch.tensor([2, 0, -1, 1, 0, 2])
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "layer_norm": (lambda: nn.LayerNorm(5), (3, 5)),
    "rms_norm": (lambda: nn.RMSNorm(5), (3, 5)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 5, 4)),
}


class Middle(nn.Module):
    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.first = nn.Linear(3, int(torch.tensor(shape).prod()))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.first(x)).unflatten(-1, self.shape)))


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def case_of(model: nn.Module, *args: Tensor, ids: Tensor = IDS) -> Case:
    args = args or (torch.randn(len(ids), 3, dtype=torch.float64),)
    return Case(model.double(), args, {}, lambda out: squared_error(out, ids.ndim), ids, None)


def same_gradients(case: Case, steps: int = 1) -> tg.TaskGradTracker:
    """Track and step; every ``param.grad`` is the untracked model's."""
    tracker = None
    for _ in range(steps):
        case.model.zero_grad()
        plain, _ = plain_grads(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracker = tracker or tg.track(case.model, tasks=list(TASKS), mode="exact")
            run_batch(tracker, case)
            tracker.step()
        for name, p in case.model.named_parameters():
            assert (p.grad is None) == (name not in plain), name
            if p.grad is not None:
                assert relative_error(p.grad, plain[name]) <= 1e-11, name
    assert tracker is not None
    return tracker


# -- one parameter of a layer counts, the other does not ---------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_frozen(kind: str, frozen: str) -> None:
    make, shape = KINDS[kind]
    layer = make()
    if getattr(layer, frozen, None) is None:
        pytest.skip("no such parameter")
    getattr(layer, frozen).requires_grad_(False)
    case = case_of(Middle(layer, shape))
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = same_gradients(case)
    assert set(tracker.coverage().attributed) == set(oracle)
    assert_report(tracker.report(), Expected.of(oracle, oracle, IDS, None), 1e-9)


@pytest.mark.parametrize("computed", ["weight", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_parametrized(kind: str, computed: str) -> None:
    """The computed one is no parameter: its gradient has to go on to what it is computed from."""
    make, shape = KINDS[kind]
    layer = make()
    if getattr(layer, computed, None) is None:
        pytest.skip("no such parameter")
    case = case_of(Middle(layer, shape))  # parametrized modules cannot be copied by pickle, but by deepcopy
    parametrize.register_parametrization(layer, computed, Same().double())
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = same_gradients(case, steps=2)
    coverage = tracker.coverage()
    assert f"layer.parametrizations.{computed}.original" in coverage.unattributed
    assert_report(tracker.report(), Expected.of(oracle, coverage.attributed, IDS, None), 1e-9)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_left_out_by_the_sum_guard(kind: str, part: str) -> None:
    make, shape = KINDS[kind]

    class Penalised(Middle):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * getattr(self.layer, part).sin().mean()

    layer = make()
    if getattr(layer, part, None) is None:
        pytest.skip("no such parameter")
    case = case_of(Penalised(layer, shape))
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = same_gradients(case, steps=3)
    coverage = tracker.coverage()
    assert set(coverage.unattributed) == {f"layer.{part}"}
    assert_report(tracker.report(), Expected.of(oracle, coverage.attributed, IDS, None), 1e-9)


def test_weight_tied_to_a_layer_that_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4, scale_grad_by_freq=True)
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 9)
            self.head.weight = self.table.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(self.table(index))))

    case = case_of(Net(), torch.randint(9, (6, 5)))
    tracker = same_gradients(case, steps=2)
    assert set(tracker.coverage().unattributed) == {"table.weight"}


# -- forward passes of the tracker's own -------------------------------------------------------------------------------


def test_a_model_that_writes_into_its_input() -> None:
    """Verification runs the model again: on a copy, or the batch is spoilt before training sees it."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.mul_(0.5).add_(1.0))

    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64)
    model = Writes().double()
    twin = to_double(model)
    squared_error(twin(x.clone()), 1).mean().backward()
    tracker = tg.track(model, tasks=list(TASKS), mode="exact")
    with tracker.batch(IDS):
        squared_error(model(x.clone()), 1).mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert relative_error(p.grad, q.grad) <= 1e-12
    tracker.step()
    assert tracker.coverage().unattributed == {}


def test_a_model_called_around_its_hooks_is_verified_or_says_that_it_is_not() -> None:
    """A Lightning ``training_step``, ``model.forward(x)``, ``model.loss(x)``: ``model(...)`` never happens."""
    case = make_case(ARCHITECTURES["permuted"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with tracker.batch(case.ids):
                case.row_loss(case.model.forward(*case.args)).mean().backward()
            tracker.step()
            case.model.zero_grad()
    said = any("verif" in str(w.message) for w in caught)
    assert said or "inner.weight" in tracker.coverage().unattributed


@pytest.mark.parametrize("name", ["hf_gpt2_sdpa", "hf_bert_sdpa"])
def test_a_model_that_computes_its_own_loss(name: str) -> None:
    """transformers with ``labels=``: the batch weights are the counted tokens of every example."""
    case = make_case(ARCHITECTURES[name], "example")
    index = case.kwargs["input_ids"]
    labels = torch.where(torch.rand(index.shape) < 0.3, -100, index)
    shifted = labels[:, 1:] if "gpt2" in name else labels
    weight = (shifted != -100).sum(1)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    oracle = {}
    for task in (0, 1, 2, -1):
        twin = to_double(case.model)
        only = labels.where((case.ids == task)[:, None], -100)
        share = weight[case.ids == task].sum() / weight.sum()
        (twin(**case.kwargs, labels=only).loss * share).backward()
        for key, p in twin.named_parameters():
            oracle.setdefault(key, []).append(torch.zeros_like(p) if p.grad is None else p.grad)
    with tracker.batch(case.ids, weight=weight):
        case.model(**case.kwargs, labels=labels).loss.backward()
    tracker.step()
    stacked = {key: torch.stack(parts) for key, parts in oracle.items()}
    assert_report(tracker.report(), Expected.of(stacked, stacked, case.ids, weight), 1e-6)
    assert set(tracker.coverage().attributed) == set(stacked), tracker.coverage().unattributed


# -- gathered rows -----------------------------------------------------------------------------------------------------


def test_rows_of_the_wrong_length_are_left_out() -> None:
    case = make_case(ARCHITECTURES["moe_declared"], "example")
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    case.model.row_context = lambda ids: tracker.rows(torch.cat([ids, ids]))
    with pytest.warns(UserWarning, match="experts"):
        with tracker.batch(case.ids):
            case.loss().backward()
        tracker.step()
    assert set(tracker.coverage().unattributed) == {
        name for name, _ in case.model.named_parameters() if name.startswith("experts")
    }


def test_rows_outside_of_a_batch_do_nothing() -> None:
    case = make_case(ARCHITECTURES["moe_declared"], "example")
    plain, _ = plain_grads(case)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    case.model.row_context = tracker.rows
    case.loss().backward()
    for name, p in case.model.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, plain[name])


def test_an_exception_inside_rows_restores_the_batch() -> None:
    case = make_case(ARCHITECTURES["mlp"], "example")
    oracle = separate_backwards(*case.oracle_arguments)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    with tracker.batch(case.ids):
        with pytest.raises(KeyError), tracker.rows(torch.tensor([0, 1])):
            raise KeyError
        case.loss().backward()
    tracker.step()
    assert_report(tracker.report(), Expected.of(oracle, oracle, case.ids, None), 1e-9)
