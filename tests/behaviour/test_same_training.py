"""Nothing that the model's code sees changes: inputs and outputs of every module, the loss and every gradient, tracked
and not, from the same random state."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from tests.utils.architectures import Architecture
from tests.utils.steps import CASES, TASKS, Case, case_id, make_case

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:.*recompilation|.*lru_cache")

NO_GRAPH = ("lstm", "gru")  # Dynamo breaks the graph there, tracked or not
COMPILED = [(a, kind) for a, kind in CASES if a.compiles and kind == "example" and a.name not in NO_GRAPH]

Seen = list[tuple[str, list[Any]]]
Setting = Callable[[nn.Module, Case], Tensor]


def leaves(value: Any) -> list[Any]:
    values = list(value.values()) if isinstance(value, dict) else value
    return [x.detach().clone() if isinstance(x, Tensor) else type(x) for x in tree_flatten(values)[0]]


@contextlib.contextmanager
def recorded(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Keep what enters and leaves every module."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, out: seen.append((name, [*leaves((args, kwargs)), *leaves(out)]))

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(case: Case, setting: Setting, tracked: bool) -> tuple[Seen, Tensor, dict[str, Tensor]]:
    """One step of a copy of the model: what its modules saw, the loss, the gradients."""
    model = copy.deepcopy(case.model)
    seen: Seen = []
    tracker = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tracked:
            tracker = tg.track(model, TASKS, verify=False)
            if hasattr(model, "row_context"):
                model.row_context = tracker.rows
        torch.manual_seed(5)
        with tracker.batch(case.ids) if tracker else contextlib.nullcontext():
            with recorded(model, seen):
                loss = setting(model, case).mean()
            loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return seen, loss.detach(), grads


def assert_same(case: Case, setting: Setting, rounding: float = 0.0, of_gradients: float = 1e-6) -> None:
    """``rounding``: of the values, relative; ``of_gradients``: of every gradient, relative to all of them."""
    plain_seen, plain_loss, plain = run(case, setting, tracked=False)
    seen, loss, grads = run(case, setting, tracked=True)
    assert [name for name, _ in seen] == [name for name, _ in plain_seen]
    for (name, got), (_, want) in zip(seen, plain_seen, strict=True):
        assert len(got) == len(want), name
        for a, b in zip(got, want, strict=True):
            assert isinstance(a, Tensor) == isinstance(b, Tensor), name
            if isinstance(a, Tensor):
                assert a.shape == b.shape and a.dtype == b.dtype, name
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(loss, plain_loss, rtol=rounding, atol=0)
    whole = torch.stack([g.double().norm() for g in plain.values()]).norm()
    assert set(grads) == set(plain)
    for name, grad in plain.items():
        assert (grads[name] - grad).norm() <= of_gradients * whole, name


@pytest.mark.parametrize(("architecture", "kind"), CASES, ids=case_id)
def test_eager(architecture: Architecture, kind: str) -> None:
    assert_same(make_case(architecture, kind, dtype=torch.float32), lambda m, c: c.row_loss(m(*c.args, **c.kwargs)))


@pytest.mark.parametrize(("architecture", "kind"), CASES, ids=case_id)
def test_autocast(architecture: Architecture, kind: str) -> None:
    def setting(model: nn.Module, case: Case) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.row_loss(model(*case.args, **case.kwargs))

    # plain torch rounds the gradients of weights to bfloat16, too
    assert_same(make_case(architecture, kind, dtype=torch.float32), setting, of_gradients=2e-2)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize(("architecture", "kind"), CASES, ids=case_id)
def test_activation_checkpointing(architecture: Architecture, kind: str, reentrant: bool) -> None:
    def setting(model: nn.Module, case: Case) -> Tensor:
        flag = torch.zeros((), requires_grad=True)  # reentrant: some input must want a gradient
        return checkpoint(  # type: ignore[no-any-return]
            lambda _: case.row_loss(model(*case.args, **case.kwargs)), flag, use_reentrant=reentrant
        )

    assert_same(make_case(architecture, kind, dtype=torch.float32), setting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [c for c in CASES if c[0].compiles and c[1] == "example" and c[0].name not in NO_GRAPH],
    ids=case_id,
)
def test_compiled(architecture: Architecture, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs of the whole: hooks of modules would break the graph."""

    def setting(model: nn.Module, case: Case) -> Tensor:
        torch.compiler.reset()
        return case.row_loss(torch.compile(model, backend="aot_eager", fullgraph=True)(*case.args, **case.kwargs))

    monkeypatch.setitem(globals(), "recorded", lambda model, seen: contextlib.nullcontext())
    assert_same(make_case(architecture, kind, dtype=torch.float32), setting, 1e-6)


SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "bert": ("BertForMaskedLM", {**SMALL, "max_position_embeddings": 16}),
    "roberta": ("RobertaForMaskedLM", {**SMALL, "max_position_embeddings": 20}),
    "electra": ("ElectraForMaskedLM", {**SMALL, "embedding_size": 32, "max_position_embeddings": 16}),
    "albert": ("AlbertForMaskedLM", {**SMALL, "embedding_size": 16, "max_position_embeddings": 16}),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_transformers_with_their_dropout(name: str) -> None:
    """Losses to the bit over three steps, rows verified on the way, and every parameter attributed: position embeddings
    are fed [1, L]."""
    transformers = pytest.importorskip("transformers")
    kind, options = SHIPPED[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).train()
    twin = copy.deepcopy(model)
    index = torch.randint(5, 50, (4, 8))
    tracker = tg.track(model, TASKS)
    for step in range(3):
        torch.manual_seed(step)
        with tracker.batch(torch.tensor([0, 1, 2, 0])):
            loss = model(input_ids=index, labels=index).loss
        loss.backward()
        torch.manual_seed(step)
        plain = twin(input_ids=index, labels=index).loss
        plain.backward()
        assert torch.equal(loss, plain)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                if q.grad is not None:
                    p -= 0.01 * q.grad
                    q -= 0.01 * q.grad
        tracker.step()
        assert tracker.report().valid
        model.zero_grad()
        twin.zero_grad()
    assert tracker.coverage().verified and tracker.coverage().fraction == 1, tracker.coverage()
