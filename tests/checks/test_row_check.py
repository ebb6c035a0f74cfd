"""The check of rows by perturbation: models that are right pass whatever the batch, others fail, and it ends."""

from __future__ import annotations

import importlib
import threading
import warnings
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import taskgrad as tg
from taskgrad.checks.moves import rebuild
from taskgrad.checks.row_check import LATE, LAZY, TRACED
from taskgrad.checks.trial import MIXED, SHIFTED, SHUFFLED, STUCK
from taskgrad.checks.unchecked import Unchecked
from tests.utils.zoo.base import SEQ, VOCAB, WIDTH
from tests.utils.zoo.sequence import GPT, Block

TASKS = ["a", "b"]


def floats(batch: int = 6, *shape: int) -> Tensor:
    return torch.randn(batch, *(shape or (7,)))


def tokens(batch: int = 6, seq: int = SEQ) -> Tensor:
    return torch.randint(1, VOCAB, (batch, seq))


def first_batch(model: nn.Module, *args: Any, ids: Tensor | None = None, **kwargs: Any) -> tg.TaskGradTracker:
    """Track, one forward in a batch; any warning is an error."""
    tracker = tg.track(model, TASKS)
    step(tracker, model, *args, ids=ids, **kwargs)
    return tracker


def step(
    tracker: tg.TaskGradTracker, model: nn.Module, *args: Any, ids: Tensor | None = None, **kwargs: Any
) -> tg.Coverage:
    """A batch of ids per example, as many as the first argument is long, where none are given."""
    with tracker.batch(torch.arange(len(args[0])) % 2 if ids is None else ids):
        model(*args, **kwargs)
    return tracker.coverage()


def failing(tracker: tg.TaskGradTracker) -> dict[str, str]:
    """Layer -> reason."""
    return dict(tracker._row_check.failing)


# -- what is right passes ----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A decoder with an attention mask as one of its inputs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.qkv = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.dropout = dropout

    def forward(self, index: Tensor, mask: Tensor) -> Tensor:
        x = F.dropout(self.embedding(index), self.dropout, self.training)
        q, k, v = (part[:, None] for part in self.qkv(self.norm(x)).chunk(3, -1))
        mask = mask[:, None, None] if mask.dim() == 2 else mask
        return self.head(x + F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout)[:, 0])


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8),
                         nn.Linear(8, 2))  # fmt: skip


def dropout(rate: float) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 8), nn.Dropout(rate), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(rate),
                         nn.Linear(8, 2))  # fmt: skip


BATCHES = [2, 3, 4, 5, 6, 7, 16]
RIGHT: dict[str, Callable[[int], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "dropout": lambda b: (dropout(0.1), (floats(b),)),
    "much dropout": lambda b: (dropout(0.6), (floats(b),)),
    "batch norm": lambda b: (batch_norm(), (floats(b),)),
    "batch norm, dropout": lambda b: (nn.Sequential(batch_norm(), nn.Dropout(0.3), nn.Linear(2, 2)), (floats(b),)),
    "gpt": lambda b: (GPT("row", dropout=0.1), (tokens(b),)),
    "gpt, B = S": lambda b: (GPT("batch", dropout=0.1), (tokens(b, b) if b < 9 else tokens(b),)),
    "mask (B, S)": lambda b: (Masked(0.1), (tokens(b), torch.arange(SEQ) < (torch.arange(b) % 3 + 2)[:, None])),
    "mask (B, 1, S, S)": lambda b: (
        Masked(),
        (tokens(b), (torch.rand(b, 1, SEQ, SEQ) < 0.5) | torch.eye(SEQ, dtype=torch.bool)),
    ),
    "float mask (B, 1, S, S)": lambda b: (Masked(0.1), (tokens(b), torch.randn(b, 1, SEQ, SEQ))),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", RIGHT)
def test_no_false_alarm(name: str, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, args = RIGHT[name](batch)
    tracker = first_batch(model, *args)
    assert tracker.coverage().verified and not failing(tracker)


@pytest.mark.parametrize("name", ["batch norm", "gpt", "mask (B, S)"])
def test_no_false_alarm_in_bfloat16(name: str) -> None:
    model, args = RIGHT[name](8)
    tracker = tg.track(model, TASKS)
    with tracker.batch(torch.arange(8) % 2), torch.autocast("cpu", torch.bfloat16):
        model(*args)
    assert tracker.coverage().verified and not failing(tracker)


class Activated(nn.BatchNorm2d):
    """timm's way: a subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1).relu()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Activated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_batch_norms(dtype: torch.dtype, norm: type[nn.BatchNorm2d]) -> None:
    """Exchanged examples are summed in another order; the rounding errors grow from layer to layer."""
    layers = [m for _ in range(40) for m in (nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers)
    want = {name: b.clone() for name, b in model.named_buffers()}
    tracker = tg.track(model, TASKS)
    with tracker.batch(torch.arange(16) % 2), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert tracker.verify(floats(16, 3, 9, 9)).verified
        assert all(torch.equal(b, want[name]) for name, b in model.named_buffers())
        model(floats(16, 3, 9, 9))
    assert not failing(tracker)


def test_an_order_behind_batch_norms_is_told() -> None:
    for order in (torch.arange(8).roll(1), torch.arange(8).flip(0)):
        model = nn.Sequential(batch_norm(), nn.Linear(2, 7), nn.BatchNorm1d(7), Reordered(order))
        assert set(failing(first_batch_quietly(model, floats(8)))) == {"3.inner"}


def test_what_all_examples_have_alike_cannot_be_told_and_stays() -> None:
    """Token types that are all zero, one position for all, a branch that is zero at the start."""

    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.types = nn.Embedding(VOCAB, WIDTH), nn.Embedding(2, WIDTH)
            self.position, self.queries = nn.Embedding(SEQ, WIDTH), nn.Parameter(torch.randn(WIDTH))
            self.on_queries, self.zero, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            nn.init.zeros_(self.zero.weight)
            nn.init.zeros_(self.zero.bias)

        def forward(self, index: Tensor) -> Tensor:
            x = self.embedding(index) + self.types(torch.zeros_like(index))
            x = x + self.position(torch.arange(index.shape[1]).expand_as(index))
            return x + self.head(self.zero(x)) + self.on_queries(self.queries.expand_as(x))

    tracker = first_batch(Alike(), tokens())
    assert tracker.coverage().verified and not failing(tracker)


# -- what is wrong fails -----------------------------------------------------------------------------------------------


class Reordered(nn.Module):
    def __init__(self, order: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.order, self.dropout = order, dropout
        self.stem, self.inner, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.stem(x)), self.dropout)
        return self.head(self.inner(x[self.order])[self.order.argsort()])


@pytest.mark.parametrize("batch", [2, 3, 4, 5])
def test_every_order_of_a_small_batch_is_told(batch: int) -> None:
    x = floats(batch)
    for order in torch.cartesian_prod(*[torch.arange(batch)] * batch):
        if len(order.unique()) == batch:
            tracker = first_batch_quietly(Reordered(order), x)
            identity = torch.equal(order, torch.arange(batch))
            assert set(failing(tracker)) == (set() if identity else {"inner"}), order


@pytest.mark.parametrize("batch", [6, 8, 12, 32])
@pytest.mark.parametrize("kind", ["swap", "reversed", "halves", "random"])
def test_orders_of_a_larger_batch(kind: str, batch: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        order = torch.arange(batch)
        if kind == "swap":
            pair = torch.randperm(batch)[:2]
            order[pair] = pair.flip(0)
        else:
            order = {"reversed": order.flip(0), "halves": order.roll(batch // 2), "random": torch.randperm(batch)}[kind]
        tracker = first_batch_quietly(Reordered(order), floats(batch))
        assert set(failing(tracker)) == {"inner"}, order


def test_an_order_behind_dropout_is_told() -> None:
    tracker = first_batch_quietly(Reordered(torch.arange(16).roll(1), dropout=0.2), floats(16))
    assert failing(tracker) == {"inner": MIXED}


def first_batch_quietly(model: nn.Module, *args: Any, **kwargs: Any) -> tg.TaskGradTracker:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return first_batch(model, *args, **kwargs)


def test_the_reason_says_what_was_seen() -> None:
    flat = first_batch_quietly(GPT("flat"), tokens(SEQ))
    assert failing(flat) == {"position": STUCK}
    assert f"position: {STUCK}" in str(flat.coverage())
    pair = torch.tensor([1, 0, 2, 3])  # the passes exchange three and three: the pair stands still in neither, or moves
    reasons = [failing(first_batch_quietly(Reordered(pair), floats(4)))["inner"] for _ in range(2)]
    assert reasons[0] == reasons[1] and reasons[0] in (MIXED, SHUFFLED)


# -- ids per token -----------------------------------------------------------------------------------------------------


def token_ids(index: Tensor) -> Tensor:
    return torch.arange(index.numel()).view(index.shape[:2]) % 3 - 1


class Shifted(nn.Module):
    """Tokens in other places of the sequence for one layer, with or without attention before it."""

    def __init__(self, shift: int, attention: bool | None) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.block = None if attention is None else Block(8, causal=attention)
        self.shift = shift

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index)
        x = x if self.block is None else self.block(x)
        return self.head(self.inner(x.roll(self.shift, 1)).roll(-self.shift, 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("batch", "seq"), [(4, 5), (6, 12), (3, 3), (2, 30), (6, 6)])
def test_tokens_of_other_places_are_told(batch: int, seq: int, seed: int) -> None:
    torch.manual_seed(seed)
    index = torch.rand(batch, 40).argsort(1)[:, :seq] % VOCAB
    for shift in (0, 1, -1, 2):
        tracker = first_batch_quietly(Shifted(shift, None), index, ids=token_ids(index))
        assert failing(tracker) == ({"inner": SHIFTED} if shift else {}), shift
        assert tracker.coverage().verified


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_no_alarm_with_ids_per_token(causal: bool) -> None:
    for batch, seq in [(4, 5), (6, 12), (2, 2), (6, 6)]:
        index = tokens(batch, seq)
        tracker = first_batch(Shifted(0, causal), index, ids=token_ids(index))
        assert tracker.coverage().verified and not failing(tracker)


def test_tokens_one_place_late_behind_causal_attention() -> None:
    index = torch.rand(4, 40).argsort(1)[:, :9] % VOCAB
    for seed in range(5):
        torch.manual_seed(seed)
        tracker = first_batch_quietly(Shifted(1, True), index, ids=token_ids(index))
        assert set(failing(tracker)) <= {"inner"}


def test_sequences_of_one_token() -> None:
    index = tokens(6, 1)
    tracker = first_batch(Shifted(0, None), index, ids=token_ids(index))
    assert tracker.coverage().verified and not failing(tracker)


# -- inputs of every form ----------------------------------------------------------------------------------------------


@dataclass
class Sample:
    x: Tensor
    name: str = "sample"


@dataclass(frozen=True)
class Frozen:
    samples: list[Sample]


class Opaque:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Reads(nn.Module):
    """A right model and, with ``order``, a wrong one, on whatever ``get`` finds its tensor in."""

    def __init__(self, get: Callable[[Any], Tensor], wrong: bool) -> None:
        super().__init__()
        self.get, self.wrong = get, wrong
        self.inner, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, batch: Any) -> Tensor:
        x = self.get(batch)
        return self.head(self.inner(x.roll(1, 0)).roll(-1, 0) if self.wrong else self.inner(x))


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda x: {"x": x, "name": "n"}, lambda b: b["x"]),
    "nested": (lambda x: [({"x": x},), None, 3], lambda b: b[0][0]["x"]),
    "dataclass": (Sample, lambda b: b.x),
    "frozen dataclass in a list": (lambda x: Frozen([Sample(x)]), lambda b: b.samples[0].x),
    "transformers": (lambda x: __import__("transformers").BatchEncoding({"x": x}), lambda b: b["x"]),
}


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_batches_in_other_forms(form: str, wrong: bool) -> None:
    make, get = FORMS[form]
    x = floats(6)
    batch = make(x)
    tracker = first_batch_quietly(Reads(get, wrong), batch, ids=torch.arange(6) % 2)
    assert tracker.coverage().verified
    assert set(failing(tracker)) == ({"inner"} if wrong else set())
    assert get(batch) is x


# -- batches that cannot tell ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls where no snapshot reaches."""

    calls = 0

    def __init__(self, get: Callable[[Any], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.get = get
        self.first, self.second = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, batch: Any) -> Tensor:
        type(self).calls += 1
        return self.second(torch.tanh(self.first(self.get(batch))))


class CountingNorm(Counting):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))


UNTELLING: dict[str, tuple[Any, Callable[[Any], Tensor], int, str]] = {
    "one example": (floats(1), lambda b: b, 1, "differ"),
    "equal rows": (floats(1).expand(6, 7), lambda b: b, 6, "differ"),
    "ragged": ([torch.randn(n, 7) for n in (2, 4, 3)], torch.cat, 9, "leading dimension"),
    "no tensor": (6, lambda b: torch.randn(b, 7), 6, "leading dimension"),
    "rows of another number": (torch.randn(12, 7), lambda b: b, 6, "leading dimension"),
}


@pytest.mark.parametrize("name", UNTELLING)
def test_a_batch_that_cannot_tell_is_tried_three_times_in_all(name: str) -> None:
    batch, get, count, reason = UNTELLING[name]
    model = Counting(get)
    tracker = tg.track(model, TASKS)
    for number in range(5):
        Counting.calls = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            coverage = step(tracker, model, batch, ids=torch.arange(count) % 2)
        assert Counting.calls == (3 if number < 3 else 1)
        ours = [str(w.message) for w in caught if "not verified" in str(w.message)]
        assert len(ours) == (number == 2)
        if ours:
            assert reason in ours[0] and "tracker.verify(" in ours[0] and "verify=False" in ours[0]
        assert not coverage.verified and coverage.unverified is not None and reason in coverage.unverified
        assert reason in str(coverage)


def test_an_input_that_can_be_read_only_once_is_read_by_training() -> None:
    model = Counting(next)
    tracker = tg.track(model, TASKS)
    coverage = step(tracker, model, iter([floats()]), ids=torch.arange(6) % 2)
    assert coverage.unverified is not None and "only once" in coverage.unverified


class Sequences(MutableMapping[str, Any]):
    """Somebody's own mapping: a shallow copy shares the store."""

    def __init__(self, **store: Any) -> None:
        self.store = store

    def __getitem__(self, key: str) -> Any:
        return self.store[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.store[key] = value

    def __delitem__(self, key: str) -> None:
        del self.store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


class Locked:
    def __init__(self, x: Tensor) -> None:
        self.x, self.lock = x, threading.Lock()


class Single(Locked):
    def __deepcopy__(self, memo: Any) -> Single:
        return self


UNMOVABLE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "an object": (Opaque, lambda b: b.x),
    "an object in a dict": (lambda x: {"x": [Opaque(x)]}, lambda b: b["x"][0].x),
    "a mapping of somebody's own": (lambda x: Sequences(x=x), lambda b: b["x"]),
    "an object with a lock": (Locked, lambda b: b.x),
    "an object that is not copied": (Single, lambda b: b.x),
    "a set": (lambda x: {x}, lambda b: next(iter(b))),
    "a file": (lambda x: {"x": x, "file": open(__file__)}, lambda b: (b["file"].read(1), b["file"].close(), b["x"])[2]),  # noqa: SIM115
    "a generator": (lambda x: {"x": (t for t in [x])}, lambda b: next(b["x"])),
    "a layer": (lambda x: {"x": x, "norm": nn.BatchNorm1d(7)}, lambda b: b["norm"](b["x"])),
    "a method of a layer": (lambda x: {"x": x, "norm": nn.BatchNorm1d(7).forward}, lambda b: b["norm"](b["x"])),
    "an object with a graph": (lambda x: Opaque(x.requires_grad_() * 1), lambda b: b.x),
}


@pytest.mark.parametrize("form", UNMOVABLE)
def test_what_cannot_be_copied_is_not_handed_to_a_pass(form: str) -> None:
    make, get = UNMOVABLE[form]
    x = floats()
    batch = make(x.clone())
    model = Counting(lambda b: taken.append(get(b)) or taken[-1])  # type: ignore[func-returns-value]
    taken: list[Tensor] = []
    tracker = tg.track(model, TASKS)
    Counting.calls = 0
    coverage = step(tracker, model, batch, ids=torch.arange(6) % 2)
    assert Counting.calls == 1 and len(taken) == 1 and not coverage.verified
    assert coverage.unverified is not None and "an input of type" in coverage.unverified
    assert form.endswith("layer") or torch.equal(taken[0], x)


def test_a_cache_of_keys_is_not_used_up() -> None:
    """transformers' cache grows with every call; with a graph it cannot be copied deeply."""
    from transformers import DynamicCache

    class Cached(Counting):
        def forward(self, x: Tensor, cache: Any) -> Tensor:  # type: ignore[override]
            out = self.first(x)
            keys, _ = cache.update(out[:, None, None], out[:, None, None], 0)
            return self.second(keys.mean((1, 2)))

    for graph in (False, True):
        cache, states = DynamicCache(), torch.randn(6, 1, 2, WIDTH, requires_grad=graph) * 1
        cache.update(states, states, 0)
        model = Cached()
        first_batch(model, floats(), cache)
        assert cache.get_seq_length() == 3


class Form(Enum):
    ONE = 1


class Counted(list[Any]):
    """A list and a dict that do more than hold."""

    def append(self, value: Any) -> None:
        raise AssertionError

    extend = append


class Strict(dict[str, Any]):
    opened = 0

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.x = items["x"]

    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError


class Pair(NamedTuple):
    x: Tensor
    name: str = ""


@dataclass
class Slotted:
    __slots__ = ("x",)
    x: Tensor


@pytest.mark.parametrize(
    ("make", "get"),
    [
        (lambda x: Counted([x]), lambda b: b[0]),
        (lambda x: Strict(x=x), lambda b: b["x"]),
        (lambda x: Strict(x=x), lambda b: b.x),
        (lambda x: defaultdict(list, x=x), lambda b: b["x"]),
        (lambda x: OrderedDict(x=x), lambda b: b["x"]),
        (lambda x: deque([x]), lambda b: b[0]),
        (lambda x: UserDict({"x": x}), lambda b: b["x"]),
        (Pair, lambda b: b.x),
        (Slotted, lambda b: b.x),
        (lambda x: modeling_outputs().BaseModelOutput(last_hidden_state=x), lambda b: b.last_hidden_state),
        (lambda x: modeling_outputs().BaseModelOutput(last_hidden_state=x), lambda b: b[0]),
    ],
    ids=["list", "dict", "dict's attribute", "defaultdict", "OrderedDict", "deque", "UserDict", "NamedTuple", "slots",
         "ModelOutput", "ModelOutput by index"],
)  # fmt: skip
def test_subclasses_of_what_holds_are_rebuilt(make: Callable[[Tensor], Any], get: Callable[[Any], Tensor]) -> None:
    x = floats()
    for wrong in (False, True):
        batch = make(x)
        tracker = first_batch_quietly(Reads(get, wrong), batch, ids=torch.arange(6) % 2)
        assert tracker.coverage().verified and set(failing(tracker)) == ({"inner"} if wrong else set())
        assert get(batch) is x


def modeling_outputs() -> Any:
    return importlib.import_module("transformers.modeling_outputs")


def test_one_object_twice_in_an_input_is_one_in_the_copy() -> None:
    x = floats()
    both: dict[str, Any] = {"x": x, "y": [x]}
    both["self"] = both
    new = rebuild(both, Tensor.clone)
    assert new["x"] is new["y"][0] is not x and new["self"] is new and torch.equal(new["x"], x)


def test_padding_free_rows_are_not_verified_by_one_row() -> None:
    """Ids (1, S): tokens could be told apart, examples not."""
    model, index = Shifted(0, None), tokens(1, 12)
    tracker = tg.track(model, TASKS)
    for _ in range(2):
        assert not step(tracker, model, index, ids=token_ids(index)).verified


def test_the_batch_after_one_that_cannot_tell() -> None:
    model = Reordered(torch.arange(6).roll(1))
    tracker = tg.track(model, TASKS)
    assert not step(tracker, model, torch.ones(6, 7)).verified
    with pytest.warns(UserWarning, match="inner"):
        coverage = step(tracker, model, floats(6))
    assert coverage.verified and "inner.weight" in coverage.unattributed


def test_verified_once_is_verified_for_good() -> None:
    model = Counting()
    tracker = first_batch(model, floats())
    Counting.calls = 0
    step(tracker, model, floats(1))
    assert Counting.calls == 1 and tracker.coverage().verified


def test_by_hand_after_it_was_given_up() -> None:
    model = Counting()
    tracker = tg.track(model, TASKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            step(tracker, model, floats(1))
    Counting.calls = 0
    with tracker.batch(torch.arange(6) % 2):
        assert tracker.verify(floats()).verified
    assert Counting.calls == 3


def test_by_hand_in_the_first_batch_is_the_only_time() -> None:
    model = Counting()
    tracker = tg.track(model, TASKS)
    Counting.calls = 0
    with tracker.batch(torch.arange(6) % 2):
        tracker.verify(floats())
        model(floats())
    assert Counting.calls == 4 and tracker.coverage().verified
    other = tg.track(Counting(), TASKS)
    with other.batch(torch.arange(6) % 2):
        other.verify(floats())
    assert other.coverage().verified


def test_a_later_batch_that_cannot_tell_takes_nothing_back() -> None:
    tracker = first_batch(Counting(), floats())
    with tracker.batch(torch.tensor([0])):
        assert tracker.verify(floats(1)).verified and not tracker._row_check.told


def test_a_state_that_was_verified_is_not_checked_again() -> None:
    tracker = tg.track(model := Counting(), TASKS)
    with tracker.batch(torch.arange(6) % 2):
        model(floats()).sum().backward()
    state = tracker.state_dict()
    tracker.remove()
    later = tg.track(model, TASKS)
    later.load_state_dict(state)
    Counting.calls = 0
    assert step(later, model, floats()).verified and Counting.calls == 1


def test_a_tensor_as_long_as_the_batch_that_is_none() -> None:
    """Weights of features: moved with the examples they change every row. The next batch leaves them."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(7, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return self.head(self.stem(x) * weight)

    model, weight = Weighted(), torch.rand(6)
    tracker = first_batch(model, floats(), weight)
    assert not tracker.coverage().verified and not failing(tracker)
    assert step(tracker, model, floats(), weight).verified and not failing(tracker)
    by_hand = tg.track(Weighted(), TASKS)
    with by_hand.batch(torch.arange(6) % 2):
        assert by_hand.verify(floats(), weight).verified
    assert not failing(by_hand)


def test_a_mask_of_positions_as_long_as_the_batch() -> None:
    model, mask = Masked(), torch.ones(SEQ, SEQ, dtype=torch.bool).tril()[None, None]

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, index: Tensor, mask: Tensor) -> Tensor:
            return self.inner(index, mask[None, None].expand(len(index), -1, -1, -1))

    outer = Causal()
    tracker = first_batch(outer, tokens(SEQ), mask[0, 0])
    assert step(tracker, outer, tokens(SEQ), mask[0, 0]).verified and not failing(tracker)


def test_times_per_example_do_not_hide_a_layer_that_is_wrong() -> None:
    """A diffusion model's times (B,) are the batch's: what fails with them and without them is wrong."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.stem, self.inner = nn.Linear(1, 8), nn.Linear(7, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            x = self.stem(x) + self.time(time[:, None])
            return self.inner(x.roll(1, 0))

    model = Timed()
    tracker = first_batch(model, floats(), torch.rand(6))
    with pytest.warns(UserWarning, match="inner"):
        assert step(tracker, model, floats(), torch.rand(6)).verified
    assert set(failing(tracker)) == {"inner"}


def test_suspects_are_left_out_if_no_batch_can_clear_them() -> None:
    class Weighted(Reordered):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * weight[:, None]

    model = Weighted(torch.arange(6).roll(1))
    tracker = first_batch(model, floats(), torch.rand(6))
    assert not step(tracker, model, torch.ones(6, 7), torch.ones(6)).verified and not failing(tracker)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coverage = step(tracker, model, torch.ones(6, 7), torch.ones(6))
    assert not coverage.verified and "inner.weight" in coverage.unattributed
    assert {"not verified" in str(w.message) for w in caught} == {True, False}


def test_hooks_that_change_the_input_run_once_a_forward() -> None:
    """The check takes what the model's own hooks made of the input, and does not run them again on that."""
    model, seen = Counting(), []
    model.register_forward_pre_hook(lambda module, args: (seen.append(args[0]), (args[0][:, :7],))[1])
    tracker = first_batch(model, floats(6, 9))
    assert len(seen) == 1 and tracker.coverage().verified and not failing(tracker)


# -- layers that are first called later --------------------------------------------------------------------------------


class Late(Counting):
    """A layer on rows of its own making only where the batch is as long as the sequence: ``position``; and one that
    works on the rows of the batch only if told: ``extra``."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.extra = nn.Embedding(20, 7), nn.Linear(7, 7)

    def forward(self, batch: Tensor, extra: bool = False) -> Tensor:
        x = batch
        if len(x) == 5:
            x = x + self.position(torch.arange(x.shape[1])).mean(0)
        return super().forward(self.extra(x) if extra else x)


def late_tracker() -> tuple[tg.TaskGradTracker, Late]:
    model = Late()
    tracker = tg.track(model, TASKS)
    passes(tracker, model, floats(6, 5, 7))
    assert tracker.coverage().verified
    return tracker, model


def passes(tracker: tg.TaskGradTracker, model: Counting, *args: Any) -> int:
    """How often the model was called for one batch."""
    Counting.calls = type(model).calls = 0
    step(tracker, model, *args)
    return type(model).calls


def test_a_layer_that_is_called_later_is_checked_then() -> None:
    tracker, model = late_tracker()
    assert passes(tracker, model, floats(4, 5, 7)) == 1 and tracker.coverage().verified
    assert passes(tracker, model, floats(4, 5, 7), True) == 1
    unverified = tracker.coverage().unverified
    assert unverified is not None and LATE in unverified and "extra" in unverified and "position" not in unverified
    assert passes(tracker, model, floats(4, 5, 7), True) == 3
    assert tracker.coverage().verified and not failing(tracker)
    assert passes(tracker, model, floats(4, 5, 7), True) == 1
    assert type(model.extra).forward and not any(isinstance(s.capture, Unchecked) and s.name == "extra"
                                                 for s in tracker._row_check.sites)  # fmt: skip


def test_a_layer_that_is_called_later_on_other_rows_is_left_out() -> None:
    tracker, model = late_tracker()
    step(tracker, model, floats(5, 5, 7))
    assert not tracker.coverage().verified
    with pytest.warns(UserWarning, match="position"):
        assert passes(tracker, model, floats(5, 5, 7)) == 3
    coverage = tracker.coverage()
    assert coverage.verified and failing(tracker) == {"position": STUCK}
    assert STUCK in coverage.unattributed["position.weight"]


def test_a_layer_that_is_called_once_and_cannot_be_told_is_left_out() -> None:
    tracker, model = late_tracker()
    step(tracker, model, floats(5, 5, 7))
    for number in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert passes(tracker, model, floats(4, 5, 7)) == 3
        assert ["position" in str(w.message) for w in caught] == [True] * (number == 2)
    assert tracker.coverage().verified and LATE in tracker.coverage().unattributed["position.weight"]
    # there are no more tries: what comes later still is left out as it comes
    with pytest.warns(UserWarning, match="extra"):
        assert passes(tracker, model, floats(4, 5, 7), True) == 1
    assert LATE in tracker.coverage().unattributed["extra.weight"] and tracker.coverage().verified
    assert passes(tracker, model, floats(5, 5, 7), True) == 1


def test_a_layer_that_is_called_with_gradients_only_cannot_be_told() -> None:
    class Graph(Counting):
        def forward(self, batch: Tensor) -> Tensor:
            out = super().forward(batch)
            return out + self.extra(batch).mean() if torch.is_grad_enabled() else out

    model = Graph()
    model.extra = nn.Linear(7, WIDTH)
    tracker = first_batch(model, floats())
    assert not tracker.coverage().verified
    with pytest.warns(UserWarning, match="extra"):
        for _ in range(3):
            step(tracker, model, floats())
    assert LATE in tracker.coverage().unattributed["extra.weight"] and not step(tracker, model, floats()).unverified


def test_gathered_rows_have_ids_of_their_own() -> None:
    class Gathers(Counting):
        def forward(self, batch: Tensor) -> Tensor:
            with tracker.rows(torch.arange(len(batch))[1:] % 2):
                gathered = self.extra(batch[1:]).mean()
            return super().forward(batch) + gathered

    model = Gathers()
    model.extra = nn.Linear(7, 2)
    tracker = tg.track(model, TASKS)
    for number in range(3):
        assert passes(tracker, model, floats()) == (1 if number else 3)
        assert tracker.coverage().verified
    assert "extra.weight" not in tracker._gauges.left_out.reasons


@pytest.mark.parametrize("part", [True, False])
def test_a_layer_called_later_in_what_is_compiled(part: bool) -> None:
    torch._dynamo.reset()
    model = Late()
    tracker = tg.track(model, TASKS)
    step(tracker, model, floats(4, 5, 7))
    call: Callable[..., Tensor] = model
    if part:
        model.extra.compile(backend="aot_eager", fullgraph=True)
    else:
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(5):
            with tracker.batch(torch.arange(4) % 2):
                call(floats(4, 5, 7), True).sum().backward()
            unverified = tracker.coverage().unverified
            assert (unverified is not None and "extra" in unverified) == (number == 0 or (number < 3 and not part))
    # where the whole is compiled, nothing can be told
    assert ("extra.weight" in tracker._gauges.left_out.reasons) is not part
    assert any("extra" in str(w.message) for w in caught) is not part


def test_inputs_that_hold_no_rows_are_copied_or_are_what_they_are() -> None:
    class Takes(Counting):
        def forward(self, batch: Tensor, more: Any) -> Tensor:  # type: ignore[override]
            torch.rand(1, generator=more["generator"])
            return super().forward(batch)

    more = {"generator": torch.Generator().manual_seed(3), "type": Sample, "module": torch, "function": len,
            "none": None, "dtype": torch.int8, "device": torch.device("cpu"), "size": torch.Size([2]),
            "slice": slice(1, 2), "array": np.arange(3), "form": Form.ONE, "bytes": bytearray(b"x")}  # fmt: skip
    tracker = first_batch(Takes(), floats(), more)
    assert tracker.coverage().verified
    twin = torch.Generator().manual_seed(3)
    torch.rand(1, generator=twin)
    assert torch.equal(twin.get_state(), more["generator"].get_state())


def test_late_layers_by_hand_and_without_automatic_checks() -> None:
    model = Late()
    tracker = tg.track(model, TASKS, verify=False)
    with tracker.batch(torch.arange(4) % 2):
        assert tracker.verify(floats(4, 5, 7)).verified
        model(floats(4, 5, 7), True)
    for _ in range(5):
        assert passes(tracker, model, floats(4, 5, 7), True) == 1
    assert LATE in str(tracker.coverage().unverified) and "extra.weight" not in tracker._gauges.left_out.reasons
    with tracker.batch(torch.arange(4) % 2):
        assert tracker.verify(floats(4, 5, 7), True).verified


@pytest.mark.filterwarnings("ignore:.*no tracked forward")
def test_a_state_knows_which_layers_a_step_has_used() -> None:
    model = Late()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, TASKS, optimizer)

    def train(tracker: tg.TaskGradTracker, *args: Any) -> int:
        Late.calls = 0
        optimizer.zero_grad()
        with tracker.batch(torch.arange(4) % 2):
            model(*args).sum().backward()
        optimizer.step()
        return Late.calls

    assert train(tracker, floats(4, 5, 7)) == 3
    for late in (False, True):
        if late:
            train(tracker, floats(4, 5, 7), True)  # not checked yet
        state = tracker.state_dict()
        assert state["verified"] is not late
        tracker.remove()
        tracker = tg.track(model, TASKS, optimizer)
        tracker.load_state_dict(state)
        assert train(tracker, floats(4, 5, 7), late) == (3 if late else 1)
        assert tracker.coverage().verified


def test_ranks_agree_on_more_tries() -> None:
    """Two ranks, of which one calls the layer: both try again, as often."""
    pairs = [late_tracker() for _ in range(2)]
    checks = [tracker._row_check for tracker, _ in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taskgrad.checks.row_check.world_size", lambda group: 2)
        for number in range(6):
            wants = [check.due for check in checks]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                calls = [passes(tracker, model, floats(5 if rank == number == 0 else 4, 5, 7))
                         for rank, (tracker, model) in enumerate(pairs)]  # fmt: skip
            assert calls == [3 if want else 1 for want in wants] and wants == [1 <= number <= 3] * 2
            together = [any(flags) for flags in zip(*(check.standing for check in checks), strict=True)]
            for check in checks:
                check.agree(together)
    assert [set(check.failing) for check in checks] == [{"position"}, set()]
    behind = tg.track(Late(), TASKS)._row_check  # verified by what another rank saw
    behind.agree([True, True, True, False, False, True, False, False])
    assert behind.due and (behind.attempts, behind.more) == (1, 1) and behind.reason is None


# -- what is not to be looked at ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "look",
    [
        lambda m, x: make_fx(m)(x),
        lambda m, x: torch.export.export(m, (x,)),
        lambda m, x: torch.fx.symbolic_trace(m),
    ],
    ids=["make_fx", "export", "fx"],
)
def test_a_model_that_is_traced_is_not_tried(look: Callable[[nn.Module, Tensor], object]) -> None:
    model = dropout(0.0)
    tracker = tg.track(model, TASKS)
    with tracker.batch(torch.arange(6) % 2):
        look(model, floats())
        assert tracker._row_check.attempts == 0 and not tracker._row_check._tried
        model(floats())
    assert tracker.coverage().verified


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_part_that_is_traced_in_the_forward_is_not_looked_at() -> None:
    class Tracing(Counting):
        traced: list[Any]

        def forward(self, batch: Tensor) -> Tensor:
            out = self.second(self.first(batch))
            if not self.traced and torch.is_grad_enabled():
                with torch.no_grad():
                    self.traced.append(torch.jit.trace(self.second, self.first(batch)))
            return out

    model = Tracing()
    model.traced = []
    tracker = tg.track(model, TASKS)
    with tracker.batch(torch.arange(6) % 2):
        with torch.no_grad():
            torch.jit.trace(model, floats())
        model(floats())
    assert tracker.coverage().verified and not failing(tracker) and len(model.traced) == 1


def test_passes_are_not_counted_by_a_mode_of_the_users() -> None:
    model = Counting()
    tracker = tg.track(model, TASKS)
    with tracker.batch(torch.arange(6) % 2), FlopCounterMode(display=False) as counter:
        model(floats())
    assert counter.get_total_flops() == 2 * 6 * (7 * WIDTH + WIDTH * 2)
    assert tracker.coverage().unverified == TRACED and step(tracker, model, floats()).verified


def test_lazy_parameters_come_first() -> None:
    model = nn.Sequential(nn.Linear(7, 8))
    tracker = tg.track(model, TASKS)
    model.extend([nn.LazyBatchNorm1d(), nn.LazyLinear(2)])
    with tracker.batch(torch.arange(6) % 2):
        model(floats()).sum().backward()
    assert [type(m) for m in model] == [nn.Linear, nn.BatchNorm1d, nn.Linear]
    assert tracker.coverage().unverified == LAZY and model[1].num_batches_tracked == 1
    assert step(tracker, model, floats()).verified


@pytest.mark.parametrize("place", ["row_sums", "Snapshot", "Trial.verdict", "example_moves", "batch_norm_trains"])
def test_what_goes_wrong_in_the_check_does_not_reach_the_forward(place: str) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("of the check's own")

    model = Counting()
    tracker = tg.track(model, TASKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"taskgrad.checks.{'fingerprint' if place == 'row_sums' else 'row_check'}.{place}", fails)
        coverage = step(tracker, model, floats())
    assert coverage.unverified is not None and "of the check's own" in coverage.unverified
    assert step(tracker, model, floats()).verified


# -- when it runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "args", "ids", "calls"),
    [
        (Counting, (floats(),), torch.arange(6) % 2, 3),
        (Counting, (torch.randn(6, 5, 7),), torch.zeros(6, 5, dtype=torch.int64), 5),
        (CountingNorm, (torch.randn(6, 7),), torch.arange(6) % 2, 4),
    ],
    ids=["per example", "per token", "BatchNorm"],
)
def test_the_number_of_passes(make: type[Counting], args: tuple[Tensor, ...], ids: Tensor, calls: int) -> None:
    model = make()
    tracker = tg.track(model, TASKS)
    make.calls = 0
    with tracker.batch(ids):
        model(*args)
        model(*args)  # a second view: not another try
    assert make.calls == calls + 1
    assert tracker.coverage().verified


@pytest.mark.parametrize("output", [True, False])
def test_an_optimizer_step_inside_the_batch_is_already_without_the_layer(output: bool) -> None:
    """Also where the model gives back nothing (it keeps its loss, say)."""

    class Keeps(Reordered):
        def forward(self, x: Tensor) -> Tensor | None:  # type: ignore[override]
            self.loss = super().forward(x).square().mean()
            return self.loss if output else None

    model = Keeps(torch.arange(6).roll(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, TASKS, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tracker.batch(torch.arange(6) % 2):
            model(floats())
            model.loss.backward()
            if output:
                optimizer.step()
        if not output:
            optimizer.step()
    assert set(failing(tracker)) == {"inner"} and tracker.report().valid
    inner = tracker._gauges.gauges["inner.weight"].columns
    assert tracker._steps.gradient is not None and not tracker._steps.gradient[:, inner].any()


def test_a_forward_that_raised_and_was_called_again() -> None:
    class Once(Reordered):
        full = True

        def forward(self, x: Tensor) -> Tensor:
            out = self.stem(x)
            if torch.is_grad_enabled() and self.full:
                self.full = False
                raise torch.OutOfMemoryError("too large")
            return self.head(out)

    model = Once(torch.arange(6))
    tracker = tg.track(model, TASKS)
    with tracker.batch(torch.arange(6) % 2):
        with pytest.raises(torch.OutOfMemoryError):
            model(floats())
        model(floats())
    assert not failing(tracker)


def test_evaluation_is_not_a_try() -> None:
    model = Counting()
    tracker = tg.track(model, TASKS)
    Counting.calls = 0
    for _ in range(4):
        with tracker.batch(torch.arange(6) % 2), torch.no_grad():
            model(floats())
        with torch.no_grad(), tracker.batch(torch.arange(6) % 2):
            model(floats())
    assert Counting.calls == 8
    assert step(tracker, model, floats()).verified


def test_a_recomputation_inside_the_batch_is_not_looked_at() -> None:
    class Checkpointed(Counting):
        def forward(self, batch: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, batch, use_reentrant=False)

    model = Checkpointed()
    tracker = tg.track(model, TASKS)
    with tracker.batch(torch.arange(6) % 2):
        model(floats()).sum().backward()
    assert tracker.coverage().verified and not failing(tracker)


def test_no_hook_stays_on_the_model() -> None:
    model = Counting()
    tracker = tg.track(model, TASKS)
    hooks = (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called)
    assert not any(hooks)
    step(tracker, model, floats(1))
    assert not any(hooks)
    with pytest.raises(KeyError), tracker.batch(torch.arange(6) % 2):
        assert all(hooks[:2])
        raise KeyError
    assert not any(hooks)


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_waiting_for_a_call_does_not_compile_again(way: str) -> None:
    """Hooks come and go with the batch; a model that is compiled as a whole is not looked into by itself."""
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 2))
    tracker = tg.track(model, TASKS)
    call: Callable[[Tensor], Tensor] = model
    if way == "wrapped":
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="aot_eager", fullgraph=True)
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            with tracker.batch(torch.arange(6) % 2):
                call(floats()).sum().backward()
            seen.append(counts["unique_graphs"])
    assert seen[:3] == [1, 1, 1] and seen[-1] <= 2
    assert [str(w.message) for w in caught if "not verified" in str(w.message) and "model(...)" in str(w.message)]
    with tracker.batch(torch.arange(6) % 2):
        assert tracker.verify(floats()).verified


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_part_that_is_compiled(way: str) -> None:
    torch._dynamo.reset()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part = nn.Linear(7, 7), Reordered(torch.arange(6).roll(1))
            if way == "wrapped":
                self.part = torch.compile(self.part, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
            else:
                self.part.compile(backend="aot_eager", fullgraph=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.first(x))

    tracker = first_batch_quietly(Outer(), floats())
    assert tracker.coverage().verified and [name.split(".")[-1] for name in failing(tracker)] == ["inner"]
