"""Extra forward passes leave no trace: whatever a forward does to the model and to the random states, it did once."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import subprocess
import sys
import weakref
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import taskgrad as tg
from taskgrad.checks.undisturbed import Snapshot, _own, undisturbed

IDS = torch.arange(6) % 2


class Does(nn.Module):
    """A model whose forward also does ``act`` to it."""

    def __init__(self, act: Callable[[Does], object]) -> None:
        super().__init__()
        self.act = act
        self.body, self.head = nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)), nn.Linear(8, 2)
        self.teacher = nn.Linear(7, 8).requires_grad_(False)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("wide", torch.zeros(1).expand(4))
        self.calls, self.last = 0, None
        self.seen: list[Any] = [torch.zeros(2)]
        self.cache: dict[Any, Any] = {"first": torch.zeros(2)}
        self.keys, self.recent = {0}, deque([0], maxlen=3)
        self.state = torch.zeros(2)
        self.generators = [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.act(self)
        return self.head(self.body(x))


def reassign(m: Does) -> None:
    m.count = m.count + 1


def momentum(m: Does) -> None:
    m.teacher.weight.data = m.teacher.weight.data * 0.9 + m.body[0].weight.data * 0.1


def count(m: Does) -> None:
    m.calls += 1


def toggle(m: Does) -> None:
    m.body[1].train(not m.body[1].training)


def redirected(m: Does) -> None:
    if "forward" in m.body.__dict__:
        del m.body.__dict__["forward"]
        m.calls += 1
    else:
        plain = type(m.body).forward
        m.body.forward = lambda x: plain(m.body, x)  # type: ignore[method-assign]


ACTS: dict[str, Callable[[Does], object]] = {
    "buffer in place": lambda m: m.count.add_(1),
    "buffer through data": lambda m: m.count.data.add_(1),
    "buffer reassigned": reassign,
    "buffer that is new": lambda m: m.register_buffer(f"new{len(m._buffers)}", torch.zeros(2)),
    "buffer taken away": lambda m: m._buffers.pop("wide", None),
    "parameter in place": lambda m: m.head.bias.add_(1),
    "parameter through data": lambda m: m.body[0].weight.data.mul_(0.9),
    "parameter's data replaced": lambda m: setattr(m.body[0].weight, "data", m.body[0].weight.data * 0.9),
    "momentum encoder": momentum,
    "a view of a parameter": lambda m: m.teacher.weight.view(-1)[3:5].add_(1),
    "counter": count,
    "attribute that is new": lambda m: setattr(m, f"attribute{len(m.__dict__)}", 1),
    "list": lambda m: m.seen.append(len(m.seen)),
    "tensor in a list": lambda m: m.seen[0].add_(1),
    "dict": lambda m: m.cache.update({len(m.cache): 1}),
    "tensor in a dict": lambda m: m.cache["first"].add_(1),
    "set": lambda m: m.keys.add(len(m.keys)),
    "deque": lambda m: m.recent.append(len(m.recent) + m.recent[-1]),
    "tensor attribute": lambda m: m.state.add_(1),
    "training flag": toggle,
    "a module that is new": lambda m: m.add_module(f"module{len(m._modules)}", nn.Linear(2, 2)),
    "a hook that is new": lambda m: m.head.register_forward_hook(lambda *_: None),
    "forward on the instance": redirected,
    "torch's random numbers": lambda m: torch.rand(3),
    "NumPy's random numbers": lambda m: np.random.rand(),
    "Python's random numbers": lambda m: random.random(),
    "generators of its own": lambda m: (
        torch.rand(1, generator=m.generators[0]),
        m.generators[1].random(),
        m.generators[2].random(),
    ),
}


def picture(model: Does) -> list[Any]:
    """All that the acts change, comparable with ``same``."""
    found: list[Any] = [torch.get_rng_state(), str(np.random.get_state()), random.getstate()]
    found += [model.generators[0].get_state(), str(model.generators[1].bit_generator.state)]
    found.append(model.generators[2].getstate())
    for name, module in model.named_modules():
        found += [name, sorted(module.__dict__), module.training, list(module._modules), list(module._buffers)]
        found += [len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in module.__dict__]
    found += [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    found += [model.calls, model.keys.copy(), list(model.recent), model.state.clone()]
    return found + [copy.deepcopy(x) for x in (model.seen, *model.cache.items())]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def seed() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


@pytest.mark.parametrize("name", ACTS)
def test_what_a_forward_does_it_did_once(name: str) -> None:
    """After a tracked batch everything is as in an untracked run: model, attributes, random states, gradients."""
    pictures, gradients = [], []
    for tracked in (False, True):
        seed()
        model = Does(ACTS[name])
        tracker = tg.track(model, ["a", "b"], include=lambda n, m: n != "teacher") if tracked else None
        objects = [id(x) for x in (*model.parameters(), model.seen, model.cache, model.keys, model.recent, model.state)]
        x = torch.randn(6, 7)
        if tracker is None:
            model(x).square().mean().backward()
        else:
            with tracker.batch(IDS):
                model(x).square().mean().backward()
            assert tracker.coverage().verified and not tracker._row_check.failing
            tracker.remove()
        kept = (*list(model.parameters())[: len(objects) - 5], model.seen, model.cache, model.keys, model.recent)
        assert [id(x) for x in (*kept, model.state)] == objects
        pictures.append(picture(model))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert same(*pictures)
    for plain, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["by hand", "probe", "undisturbed"])
@pytest.mark.parametrize("name", ACTS)
def test_passes_that_training_did_not_ask_for_did_nothing(name: str, how: str) -> None:
    seed()
    model = Does(ACTS[name])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    tracker = tg.track(model, ["a", "b"], optimizer, include=lambda n, m: n != "teacher", verify=False)
    x = torch.randn(6, 7)
    before = picture(model)
    if how == "by hand":
        with tracker.batch(IDS):
            assert tracker.verify(x).verified
    elif how == "probe":
        probe = tracker.probe(lambda: model(x).square().mean())
        optimizer.step()
        assert probe.change == 0
    else:
        with undisturbed(model):
            model(x)
            model(x)
            assert not torch.is_grad_enabled()
    assert same(picture(model), before)


class Refuses(dict[str, int]):
    def __setitem__(self, key: str, value: int) -> None:
        raise AssertionError("not by this way")

    update = clear = __setitem__  # type: ignore[assignment]


class Converts(list[Any]):
    def __iter__(self) -> Any:
        return iter(["something else"])

    extend = append = clear = lambda self, *args: None  # type: ignore[assignment]


class Frozen(set[Any]):
    add = update = clear = lambda self, *args: None  # type: ignore[assignment]


def refilled(value: UserDict[str, int]) -> None:
    value.data = {"other": 1}


HOLD: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "Counter": (lambda: Counter("aab"), lambda c: c.update("abc")),
    "Counter of pairs": (lambda: Counter({(1, 2): 3}), lambda c: c.update([(1, 2), (2, 1)])),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda d: d["new"]),
    "OrderedDict": (lambda: OrderedDict(a=1, b=2), lambda d: d.move_to_end("a")),
    "OrderedDict that shrinks": (lambda: OrderedDict(a=1, b=2), lambda d: d.popitem()),
    "deque of a length": (lambda: deque([1, 2, 3], maxlen=3), lambda d: d.append(4)),
    "UserDict": (lambda: UserDict(a=1), lambda d: d.update(a=2, b=3)),
    "UserDict with other data": (lambda: UserDict(a=1), refilled),
    "UserList": (lambda: UserList([1]), lambda d: d.append(2)),
    "dict that refuses": (lambda: Refuses(a=1), lambda d: dict.__setitem__(d, "b", 2)),
    "list that converts": (lambda: Converts([1, 2]), lambda c: list.append(c, 3)),
    "set that refuses": (lambda: Frozen([1, 2]), lambda c: set.add(c, 3)),
    "list, a pair in it": (lambda: [1, 2], lambda c: c.__setitem__(0, (1, 2))),
    "array": (lambda: np.arange(4.0), lambda a: a.__iadd__(1)),
    "array, not numbers": (lambda: np.array([np.nan, 1.0]), lambda a: a.fill(0)),
    "array, every second": (lambda: np.zeros((4, 6))[::2, ::3], lambda a: a.fill(1)),
    "array of text": (lambda: np.array(["a", "b"]), lambda a: a.__setitem__(0, "c")),
    "array in a list": (lambda: [np.zeros(2)], lambda c: c[0].fill(1)),
    "array in a UserDict": (lambda: UserDict(a=np.zeros(2)), lambda c: c["a"].fill(1)),
    "scalar array": (lambda: np.array(1), lambda a: a.__iadd__(1)),
}


@pytest.mark.parametrize("name", HOLD)
def test_containers_of_every_kind_and_arrays(name: str) -> None:
    make, act = HOLD[name]
    model = Does(lambda m: act(m.held))
    model.held = held = make()
    with undisturbed(model):
        model(torch.randn(6, 7))
        assert pickle.dumps(held) != pickle.dumps(make()) or "order" in name or "refuses" in name or "converts" in name
    assert model.held is held and pickle.dumps(held) == pickle.dumps(make())
    if isinstance(held, dict):
        assert list(dict.items(held)) == list(dict.items(make())) and list(dict.keys(held)) == list(held)
    wanted = make()
    act(wanted)
    tracker = tg.track(model, ["a", "b"])
    with tracker.batch(IDS):
        model(torch.randn(6, 7))
    assert pickle.dumps(model.held) == pickle.dumps(wanted)
    assert tracker.coverage().verified


def test_arrays_that_cannot_have_been_written_are_not_copied(tmp_path: Path) -> None:
    model = Does(lambda m: None)
    np.save(tmp_path / "a.npy", np.arange(4.0))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r+")
    model.arrays = [np.frombuffer(b"1234", dtype=np.int8), mapped, mapped[1:].view(np.ndarray), np.array([object()])]
    assert [_own(a) for a in model.arrays] == [False] * 4
    with undisturbed(model):
        model(torch.randn(6, 7))


def test_a_module_that_changes_its_class() -> None:
    class Other(Does):
        pass

    model = Does(lambda m: setattr(m, "__class__", Other))
    with undisturbed(model):
        model(torch.randn(6, 7))
        assert type(model) is Other
    assert type(model) is Does


def test_parametrized_weights_that_are_kept() -> None:
    """What ``cached`` keeps of a pass without gradients would keep training from the weight's gradient."""
    gradients = []
    for tracked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 2))
        weight_norm(model[0])
        spectral_norm(model[1])
        x = torch.randn(6, 7)
        tracker = tg.track(model, ["a", "b"]) if tracked else None
        with tracker.batch(IDS) if tracker else nullcontext(), parametrize.cached():
            used = model[1].weight
            model(x).square().mean().backward()
            assert model[1].weight is used and len(parametrize._cache) == 2
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None for found in gradients for g in found.values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("scheme", [torch.per_tensor_affine, torch.per_channel_affine])
def test_quantized_buffers_are_left_alone(scheme: torch.qscheme) -> None:
    model = Does(lambda m: None)
    if scheme is torch.per_tensor_affine:
        model.register_buffer("table", torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8))
    else:
        model.table = torch.quantize_per_channel(torch.randn(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8)
    tracker = tg.track(model, ["a", "b"])
    with tracker.batch(IDS):
        model(torch.randn(6, 7))
    assert tracker.coverage().verified


def test_what_cannot_be_put_back_keeps_nothing_else_from_it() -> None:
    class Key:
        broken = False

        def __hash__(self) -> int:
            if self.broken:
                raise KeyError("no hash")
            return 1

    def act(m: Does) -> None:
        m.count.add_(1)
        m.cache.clear()
        key.broken = True

    key = Key()
    for tracked in (False, True):
        key.broken = False
        model = Does(act)
        model.cache = {key: 1}
        if tracked:
            tracker = tg.track(model, ["a", "b"])
            with tracker.batch(IDS):
                model(torch.randn(6, 7))
            unverified = tracker.coverage().unverified
            assert model.count.tolist() == [1, 1, 1] and unverified is not None and "no hash" in unverified
        else:
            with pytest.raises(KeyError, match="no hash"), undisturbed(model):
                model(torch.randn(6, 7))
            assert model.count.tolist() == [0, 0, 0]


def test_what_is_not_covered_is_what_the_docstring_says() -> None:
    deeper: list[list[int]] = [[]]
    model = Does(lambda m: m.seen[1][0].append(1))
    model.seen.append(deeper)
    with undisturbed(model):
        model(torch.randn(6, 7))
    assert deeper == [[1]]
    assert Snapshot.__doc__ is not None and "deeper containers" in Snapshot.__doc__


def test_memory_that_was_only_read_is_not_written() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mapped", torch.from_numpy(np.zeros(2)).data)
    array = model.mapped.numpy()
    array.flags.writeable = False
    versions = [t._version for t in (model.weight, model.mapped)]
    with undisturbed(model):
        model(torch.randn(1, 2))
    assert [t._version for t in (model.weight, model.mapped)] == versions


def test_values_that_are_not_numbers_are_put_back() -> None:
    model = Does(lambda m: m.count.fill_(3))
    model.count.fill_(torch.nan)
    with undisturbed(model):
        model(torch.randn(6, 7))
    assert model.count.isnan().all()


def test_the_copies_are_gone_before_the_forward_of_training() -> None:
    """Peak memory: no copy of the parameters lies beside the activations."""
    model, alive = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 2)), []
    made: list[weakref.ref[Snapshot]] = []
    plain = Snapshot.__init__

    def noted(self: Snapshot, model: nn.Module) -> None:
        made.append(weakref.ref(self))
        plain(self, model)

    model[1].register_forward_hook(
        lambda *_: alive.append(any(s() is not None for s in made)) if torch.is_grad_enabled() else None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshot, "__init__", noted)
        tracker = tg.track(model, ["a", "b"])
        gc.disable()
        with tracker.batch(IDS):
            model(torch.randn(6, 7))
        gc.enable()
    assert made and alive == [False]


# -- a pass that fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [RuntimeError, torch.OutOfMemoryError, AttributeError])
def test_a_pass_that_raises_is_a_batch_that_cannot_tell(wrong: type[Exception]) -> None:
    """A model that does not run without gradients, say: training goes on, and everything is put back."""

    class Picky(Does):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if not torch.is_grad_enabled() and len(self.seen) == 2:
                raise wrong("not like this")
            return out

    pictures = []
    for tracked in (False, True):
        seed()
        model = Picky(lambda m: (m.seen.append(1), m.count.add_(1), torch.rand(1)))
        x = torch.randn(6, 7)
        if tracked:
            tracker = tg.track(model, ["a", "b"], include=lambda n, m: n != "teacher")
            with tracker.batch(IDS):
                model(x).sum().backward()
            coverage = tracker.coverage()
            assert not coverage.verified and wrong.__name__ in str(coverage) and "not like this" in str(coverage)
            model.seen.append(1)  # from now on it runs
            with tracker.batch(IDS):
                model(x).sum().backward()
            assert tracker.coverage().verified
            tracker.remove()
        else:
            model(x).sum().backward()
            model.seen.append(1)
            model(x).sum().backward()
        pictures.append(picture(model))
    assert same(*pictures)


def test_the_models_own_fault_reaches_the_user_and_leaves_the_model_clean() -> None:
    def broken(m: Does) -> None:
        m.calls += 1
        raise KeyError("of the model")

    model = Does(broken)
    tracker = tg.track(model, ["a", "b"])
    with pytest.raises(KeyError, match="of the model"), tracker.batch(IDS):
        model(torch.randn(6, 7))
    assert model.calls == 1
    model.act = lambda m: None
    with tracker.batch(IDS):
        model(torch.randn(6, 7))
    assert tracker.coverage().verified


def test_verifying_by_hand_raises_what_the_model_raises() -> None:
    tracker = tg.track(Does(lambda m: None), ["a", "b"])
    with pytest.raises(RuntimeError, match="shapes"), tracker.batch(IDS):
        tracker.verify(torch.randn(6, 3))


def test_writing_into_the_input() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(7, 2)

        def forward(self, batch: Any) -> Tensor:
            return self.body(batch["x"][0].mul_(0.5).add_(1.0) if isinstance(batch, dict) else batch.x.mul_(0.5))

    class Opaque:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    x = torch.randn(6, 7)
    for batch, want in (({"x": [x.clone()]}, x * 0.5 + 1), (Opaque(x.clone()), x * 0.5)):
        tracker = tg.track(model := Writes(), ["a", "b"])
        with tracker.batch(IDS):
            model(batch)
        assert torch.equal(batch["x"][0] if isinstance(batch, dict) else batch.x, want)


# -- Lightning, copies -------------------------------------------------------------------------------------------------


class Redirected(nn.Module):
    """As Lightning under DistributedDataParallel: ``forward`` is replaced on the instance for one call, which puts it
    back and runs ``training_step``, which calls the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.steps = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 2)), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self(x).square().mean(1)

    def redirect(self) -> None:
        original = self.forward

        def wrapped(*args: Any) -> Tensor:
            self.forward = original  # type: ignore[method-assign]
            return self.training_step(*args)

        self.forward = wrapped  # type: ignore[method-assign]


def test_a_forward_that_is_redirected_for_one_call() -> None:
    model = Redirected()
    tracker = tg.track(model, ["a", "b"])
    for number in range(1, 3):
        model.redirect()
        with tracker.batch(IDS):
            out = model(torch.randn(6, 7))
            out.sum().backward()
        assert out.shape == (6,) and model.steps == number
    assert tracker.coverage().verified and not tracker._row_check.failing


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_the_batch_is_not_checked(way: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 2))
    tracker = tg.track(model, ["a", "b"])
    calls: list[int] = []
    with tracker.batch(IDS):
        twin = way(model)
        if twin[0] is not model[0]:
            twin[0].register_forward_hook(lambda *_: calls.append(1))
            twin(torch.randn(6, 7))
            assert calls == [1]
        else:
            twin(torch.randn(6, 7))
        assert tracker._row_check._trial is None
        model(torch.randn(6, 7))
    assert tracker.coverage().verified


def test_a_pickle_made_inside_the_batch_needs_no_taskgrad(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 2))
    tracker = tg.track(model, ["a", "b"])
    with tracker.batch(IDS):
        torch.save(model, tmp_path / "model.pt")
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = """if True:
        import pickle, sys, torch
        sys.modules["taskgrad"] = None
        for model in (torch.load("model.pt", weights_only=False), pickle.load(open("model.pkl", "rb"))):
            assert model(torch.ones(3, 7)).shape == (3, 2) and model._forward_hooks
        """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(6, 7)
    again = tg.track(loaded, ["a", "b"])
    with again.batch(IDS):
        assert torch.equal(loaded(x), model(x))
    assert again.coverage().verified
