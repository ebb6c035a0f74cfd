"""Where the plain model runs, the tracked one runs, with the same result; copies and files of it are clean."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taskgrad as tg
from tests.utils.oracle import separate_backwards
from tests.utils.steps import Case, Expected, assert_report, relative_error

IDS = torch.tensor([0, 1, 1, 0, -1, 1])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="taskgrad:")
        yield


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def track(model: nn.Module, **options: Any) -> tg.TaskGradTracker:
    return tg.track(model, ["a", "b"], **{"verify": False, **options})


# -- copies ------------------------------------------------------------------------------------------------------------


def zeroed(layer: nn.Linear) -> nn.Linear:
    layer._parameters = dict(layer._parameters)  # copy.copy shares it
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    layer.bias = nn.Parameter(torch.zeros_like(layer.bias))
    return layer


@pytest.mark.parametrize("inside", [True, False])
def test_a_copied_layer_runs_its_own_weights(inside: bool) -> None:
    model = make()
    tracker = track(model)
    x = torch.randn(6, 4)

    def check() -> None:
        shallow = zeroed(copy.copy(model[0]))
        deep = zeroed(copy.deepcopy(model[0]))
        for layer in (shallow, deep):
            assert not layer(x).any()
        assert model[0](x).any()

    if inside:
        with tracker.batch(IDS):
            check()
    else:
        check()


def test_replicas_run_their_own_weights() -> None:
    model = make()
    track(model)
    replica = model._replicate_for_data_parallel()
    layer = model[0]._replicate_for_data_parallel()
    layer.weight, layer.bias = torch.zeros(6, 4), torch.zeros(6)
    replica._modules["0"] = layer
    assert not replica[0](torch.randn(6, 4)).any()


def test_copies_and_files_know_nothing_of_taskgrad() -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = tg.track(model, ["a", "b"], optimizer)
    with tracker.batch(IDS):
        model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for data in (buffer.getvalue(), pickle.dumps(model), pickle.dumps(copy.deepcopy(model)), pickle.dumps(optimizer)):
        assert b"taskgrad" not in data
    twin = copy.deepcopy(model)
    for module in twin.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__
    for p in twin.parameters():
        assert not p._backward_hooks
    for module, kind in zip(model.modules(), (nn.Sequential, nn.Linear, nn.Tanh, nn.LayerNorm, nn.Linear), strict=True):
        assert type(module) is kind


def test_a_saved_model_loads_where_taskgrad_is_not_installed(tmp_path: Path) -> None:
    model = make()
    tracker = track(model, verify=True)
    x = torch.randn(6, 4)
    with tracker.batch(IDS):
        model(x).sum().backward()
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['taskgrad'] = None\n"
        "import torch\n"
        "model, x, out = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(x), out)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=120)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripting_and_tracing_a_copy() -> None:
    model = make()
    tracker = track(model, verify=True)
    x = torch.randn(6, 4)
    with tracker.batch(IDS):
        model(x).sum().backward()
    for twin in (copy.deepcopy(model), copy.copy(model)):
        assert torch.equal(torch.jit.script(copy.deepcopy(twin))(x), model(x))
        assert torch.equal(torch.jit.trace(copy.deepcopy(twin), x)(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_subclass_that_calls_its_base_compiles(backend: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(nn.Linear(4, 5), Doubled(5, 3))
    x = torch.randn(6, 4)
    want = model(x)
    tracker = track(model)
    with tracker.batch(IDS):
        got = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, want)


class Own(nn.Module):
    """A kind that no other test tracks."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@tg.register_capture(Own)
class OwnCapture(tg.Capture):
    params = ("gamma",)

    def forward(self, module: nn.Module, rows: Any, gauges: Any, *args: Any, **kwargs: Any) -> Tensor:
        return args[0] * tg.per_example(module.gamma, gauges["gamma"], rows)  # type: ignore[arg-type]


def test_the_class_is_as_before_once_nothing_of_it_is_tracked() -> None:
    before = Own.forward
    models = Own(), Own()
    first, second = (track(model) for model in models)
    assert Own.forward is not before
    first.remove()
    with second.batch(IDS):
        for model in models:
            model(torch.randn(6, 4)).sum().backward()
    second.step()
    assert second.report().valid
    second.remove()
    assert Own.forward is before


def test_a_tracker_that_is_dropped_lets_the_model_go() -> None:
    model = Own()
    before = Own.forward
    gone = weakref.ref(model)
    track(model)
    del model
    gc.collect()
    assert gone() is None
    track(Own()).remove()
    assert Own.forward is before


def test_two_trackers_of_two_models_at_once() -> None:
    models = [make().double(), make().double()]
    trackers = [track(m, mode="exact") for m in models]
    xs = [torch.randn(6, 4, dtype=torch.float64) for _ in models]
    ids = [IDS, IDS.flip(0)]
    with trackers[0].batch(ids[0]), trackers[1].batch(ids[1]):
        sum(m(x).square().sum(1).mean() for m, x in zip(models, xs, strict=True)).backward()  # type: ignore[union-attr]
    for model, tracker, x, i in zip(models, trackers, xs, ids, strict=True):
        tracker.step()
        case = Case(model, (x,), {}, lambda out: out.square().sum(1), i, None)
        oracle = separate_backwards(model, ((x,), {}), case.row_loss, i, 2)
        assert_report(tracker.report(), Expected.of(oracle, oracle, i, None), 1e-9)


@pytest.mark.parametrize("swapped", [False, True])
def test_two_trackers_of_parts_of_one_model(swapped: bool) -> None:
    """What "an optimizer stepped and another one did not" tells to do."""
    model = make()
    parts = [track(model, verify=True, include=lambda n, _, k=k: (n == "0") == k) for k in (True, False)]  # type: ignore[misc]
    first, second = reversed(parts) if swapped else parts
    for _ in range(2):
        with first.batch(IDS), second.batch(IDS):
            model(torch.randn(6, 4)).square().mean().backward()
        for tracker in parts:
            tracker.step()
            assert tracker.report().valid and tracker.coverage().verified
        model.zero_grad()
    assert set(parts[0].coverage().attributed) == {"0.weight", "0.bias"}
    assert set(parts[1].coverage().attributed) == {"2.weight", "2.bias", "3.weight", "3.bias"}


# -- what is done to a model in the middle of a run --------------------------------------------------------------------


def steps(model: nn.Module, tracker: tg.TaskGradTracker, inputs: Callable[[], Tensor], count: int = 1) -> None:
    for _ in range(count):
        with tracker.batch(IDS):
            model(inputs()).square().mean().backward()
        tracker.step()
        model.zero_grad()


def test_a_table_that_is_resized_in_mid_run() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    tracker = track(model, verify=True)

    def step(vocab: int) -> None:
        index = torch.randint(vocab, (6, 5))
        with tracker.batch(IDS):
            model(input_ids=index, labels=index).loss.backward()
        tracker.step()
        model.zero_grad()

    step(11)
    model.resize_token_embeddings(13)
    step(13)
    step(13)
    assert tracker.report().valid
    assert "transformer.wte.weight" in tracker.coverage().unattributed
    assert "transformer.h.0.attn.c_attn.weight" in tracker.coverage().attributed


@pytest.mark.parametrize("how", ["data", "parameter"])
def test_a_weight_of_another_shape_in_mid_run(how: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    tracker = track(model)
    steps(model, tracker, lambda: torch.randint(7, (6, 2)), 2)
    if how == "data":
        model[0].weight.data = torch.randn(9, 4)
    else:
        model[0].weight = nn.Parameter(torch.randn(9, 4))
    model[0].num_embeddings = 9
    steps(model, tracker, lambda: torch.randint(9, (6, 2)), 2)
    assert tracker.report().valid
    assert set(tracker.coverage().attributed) == {"1.weight", "1.bias"}
    assert "0.weight" in tracker.coverage().unattributed


@pytest.mark.parametrize("grad", [True, False], ids=["with dX", "no dX"])
@pytest.mark.parametrize("what", ["weight", "bias", "input"])
@pytest.mark.parametrize("kind", ["linear", "layer_norm", "rms_norm", "group_norm", "conv"])
def test_written_in_place_between_forward_and_backward(kind: str, what: str, grad: bool) -> None:
    """It runs where plain torch runs, and raises where plain torch raises."""
    layers: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "linear": (lambda: nn.Linear(5, 4), (3, 5)),
        "layer_norm": (lambda: nn.LayerNorm(5), (3, 5)),
        "rms_norm": (lambda: nn.RMSNorm(5), (3, 5)),
        "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
        "conv": (lambda: nn.Conv1d(4, 6, 3), (4, 7)),
    }
    make_layer, shape = layers[kind]
    if what != "input" and getattr(make_layer(), what, None) is None:
        return
    results = []
    for tracked in (False, True):
        torch.manual_seed(1)
        layer = make_layer()
        x = torch.randn(6, *shape, requires_grad=grad)
        y = x * 1
        tracker = track(layer) if tracked else None
        try:
            if tracker:
                with tracker.batch(IDS):
                    out = layer(y)
            else:
                out = layer(y)
            with torch.no_grad():
                (y if what == "input" else getattr(layer, what)).mul_(2)
            out.square().sum().backward()
            results.append([p.grad for p in layer.parameters()] + [x.grad])
        except RuntimeError:
            results.append(None)  # type: ignore[arg-type]
    plain, got = results
    assert (plain is None) == (got is None)
    for a, b in zip(plain or [], got or [], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert relative_error(b, a) < 1e-6


class Experts(nn.Module):
    """Gathered rows, declared to the tracker; an expert may get no token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.tracker: Any = None
        self.ids = IDS

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            where = torch.nonzero(route == number)[:, 0]
            with self.tracker.rows(self.ids[where]):
                out = out.index_add(0, where, expert(x[where]))
        return self.head(out)


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_an_expert_without_tokens(mode: str) -> None:
    import contextlib

    model = Experts().double()
    tracker = track(model, mode=mode)
    for route in ([0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [2, 1, 0, 2, 1, 0]):
        x, r = torch.randn(6, 4, dtype=torch.float64), torch.tensor(route)
        model.tracker = type("Plain", (), {"rows": staticmethod(lambda ids: contextlib.nullcontext())})
        oracle = separate_backwards(model, ((x, r), {}), lambda out: out.square().sum(1), IDS, 2)
        model.tracker = tracker
        with tracker.batch(IDS):
            model(x, r).square().sum(1).mean().backward()
        tracker.step()
        assert tracker.coverage().unattributed.keys() <= {f"experts.{n}.{k}" for n in range(3) for k in
            ("0.weight", "0.bias", "1.weight", "1.bias")}  # fmt: skip
        if mode == "exact":
            assert_report(tracker.report(), Expected.of(oracle, tracker.coverage().attributed, IDS, None), 1e-9)
        model.zero_grad()
    assert tracker.coverage().fraction == 1


@pytest.mark.parametrize("kind", ["sparse", "complex", "jagged"])
def test_inputs_that_are_no_dense_real_arrays(kind: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dtype = torch.complex64 if kind == "complex" else torch.float32
            self.odd, self.even = nn.Linear(4, 3, bias=kind != "sparse", dtype=dtype), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "sparse":
                return self.odd(x.to_sparse()) + self.even(x)
            if kind == "complex":
                return self.odd(x.to(torch.complex64)).abs() + self.even(x)
            nested = torch.nested.nested_tensor(list(x[:, None]), layout=torch.jagged)
            return self.odd(nested).values() + self.even(x)

    grads = []
    x = torch.randn(6, 4)
    for tracked in (False, True):
        torch.manual_seed(0)
        model = Odd()
        tracker = track(model) if tracked else None
        for _ in range(2):
            if tracker:
                with tracker.batch(IDS):
                    model(x).square().mean().backward()
                tracker.step()
                assert tracker.report().valid
                assert {"odd.weight"} <= set(tracker.coverage().unattributed)
                assert set(tracker.coverage().attributed) == {"even.weight", "even.bias"}
            else:
                model(x).square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
    for a, b in zip(grads[1], grads[3], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "segments"])
def test_checkpointing_loses_no_layer(whole: bool, reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 5)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.LayerNorm(5)) for _ in range(3))
            self.head = nn.Linear(5, 2)
            self.plain = False

        def body(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x) if whole or self.plain else checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

        def forward(self, x: Tensor) -> Tensor:
            if whole and not self.plain:
                return checkpoint(self.body, x, use_reentrant=reentrant)  # type: ignore[no-any-return]
            return self.body(x)

    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tracker = tg.track(model, ["a", "b"], optimizer, mode="exact")
    for _ in range(3):
        total: dict[str, Tensor] = {}
        for _ in range(2):  # micro-batches
            x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
            model.plain = True
            oracle = separate_backwards(model, ((x,), {}), lambda out: out.square().sum(1), IDS, 2)
            model.plain = False
            total = {n: total.get(n, 0) + g / 2 for n, g in oracle.items()}
            with tracker.batch(IDS):
                loss = model(x).square().sum(1).mean() / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = tracker.report()
        assert report.valid, report.reason
        assert tracker.coverage().fraction == 1, tracker.coverage()
        parts = tracker.task_gradients()
        for name, want in total.items():
            assert relative_error(parts[name], want) < 1e-9, name


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_tracking_twice_says_what_to_do() -> None:
    model = make()
    tracker = track(model)
    with pytest.raises(RuntimeError, match=r"remove\(\)"):
        track(model)
    with tracker.batch(IDS):  # the first one is as it was
        model(torch.randn(6, 4)).sum().backward()
    tracker.step()
    assert tracker.report().valid
    tracker.remove()
    track(model)


@pytest.mark.parametrize("why", ["memory", "include", "optimizer", "tasks"])
def test_a_track_that_raises_leaves_nothing(why: str) -> None:
    model = make()
    before = nn.Linear.forward, nn.LayerNorm.forward

    def include(name: str, module: nn.Module) -> bool:
        raise KeyError(name)

    with pytest.raises((ValueError, KeyError, TypeError)):
        if why == "memory":
            tg.track(nn.Linear(64, 64), [str(t) for t in range(1 << 18)], mode="exact")
        elif why == "include":
            track(model, include=include)
        elif why == "optimizer":
            tg.track(model, ["a"], torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
        else:
            tg.track(model, ["a", "a"])
    assert (nn.Linear.forward, nn.LayerNorm.forward) == before
    assert not any(p._backward_hooks for p in model.parameters())
    track(model)


def test_accelerate_s_optimizer_is_unwrapped() -> None:
    class Wrapped(torch.optim.Optimizer):
        """As AcceleratedOptimizer: an Optimizer whose step may do nothing."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        @property
        def param_groups(self) -> Any:
            return self.optimizer.param_groups

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.optimizer.step()

    model = make()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    wrapped = Wrapped(Wrapped(inner))
    for given in (wrapped, [wrapped], (wrapped, inner)):
        tracker = tg.track(model, ["a", "b"], given, verify=False)
        with tracker.batch(IDS):
            model(torch.randn(6, 4)).sum().backward()
        wrapped.step()
        assert tracker.report().valid
        model.zero_grad()
        tracker.remove()


def test_fsdp1_is_refused_by_name() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\)"):
        track(FullyShardedDataParallel(make()))


def test_parameters_on_several_devices_are_refused() -> None:
    model = make()
    model[3] = nn.Linear(6, 3, device="meta")
    with pytest.raises(ValueError, match=r"several devices \(cpu, meta\)"):
        track(model)


def test_another_default_device() -> None:
    model = make()
    x = torch.randn(6, 4)
    with torch.device("meta"):
        tracker = tg.track(model, ["a", "b"])
        for _ in range(2):
            with tracker.batch(IDS) as b:
                loss = model(x).square().sum(1)
                b.losses(loss)
                loss.mean().backward()
            tracker.step()
            model.zero_grad()
        report = tracker.report()
        assert report.valid and report.gram.device.type == "cpu"
        str(report), report.to_dict(), tracker.coverage(), tracker.state_dict()


# -- what others do to classes, to autograd and to the compiler --------------------------------------------------------


def test_a_class_that_is_patched_is_not_taken_for_the_one_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) * 2)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    x = torch.randn(6, 4)
    want = model(x)
    tracker = track(model)
    with tracker.batch(IDS):
        torch.testing.assert_close(model(x), want)
    assert "0.weight" in tracker.coverage().unattributed
    tracker.remove()


def test_a_patch_over_ours_outlives_the_tracker() -> None:
    class Layer(Own):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    tg.register_capture(Layer)(OwnCapture)
    model, x = Layer(), torch.randn(6, 4)
    first = track(model)
    inner = Layer.forward
    Layer.forward = lambda self, x: inner(self, x) * 1  # type: ignore[method-assign]
    first.remove()
    torch.testing.assert_close(model(x), x)
    with pytest.raises(ValueError, match="no rule"):
        track(model)
    torch.testing.assert_close(model(x), x)


def test_a_weight_that_is_tied_in_mid_run() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)).double()
    tracker = track(model, mode="exact")
    for k in range(5):
        if k == 2:
            model[1].weight = model[0].weight
        with tracker.batch(IDS):
            model(torch.randint(9, (6, 3))).square().mean().backward()
        tracker.step()
        assert tracker.report().valid
        assert relative_error(tracker.task_gradients()["0.weight"].sum(0), model[0].weight.grad) < 1e-10  # type: ignore[arg-type]
        model.zero_grad()
    assert tracker.coverage().fraction == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ["grad", "jacrev", "jvp", "vmap", "dual"])
def test_transforms_of_torch_func_inside_of_a_batch(what: str) -> None:
    results = []
    for tracked in (False, True):
        model = make()
        x = torch.randn(6, 4)
        torch.manual_seed(3)
        v = torch.randn(6, 4)

        def other(model: nn.Module = model, x: Tensor = x, v: Tensor = v) -> Tensor:
            if what == "grad":
                return torch.func.grad(lambda z: model(z).sum())(x).sum()
            if what == "jacrev":
                return torch.func.jacrev(lambda z: model(z).sum(0))(x).sum()
            if what == "jvp":
                return torch.func.jvp(model, (x,), (v,))[1].sum()
            if what == "vmap":
                return torch.func.vmap(model)(x).sum()
            with torch.autograd.forward_ad.dual_level():
                dual = model(torch.autograd.forward_ad.make_dual(x, v))
                return torch.autograd.forward_ad.unpack_dual(dual).tangent.sum()

        if tracked:
            tracker = track(model)
            with tracker.batch(IDS):
                results.append(other().detach())
        else:
            results.append(other().detach())
    torch.testing.assert_close(results[0], results[1])


def test_a_function_that_has_no_gradient_for_a_weight() -> None:
    class Skip(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            return dy * 2, None

    model = make()
    tracker = track(model, verify=True)
    for _ in range(2):
        with tracker.batch(IDS):
            Skip.apply(model(torch.randn(6, 4)), model[3].weight).square().mean().backward()
        tracker.step()
        assert tracker.report().valid
        model.zero_grad()


@pytest.mark.parametrize("width", [(4, 0), (0, 4)])
def test_layers_without_features(width: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.ModuleList([nn.Linear(*width), nn.Linear(4, 3)])
    tracker = track(model)
    with tracker.batch(IDS):
        (model[0](torch.randn(6, width[0])).sum() + model[1](torch.randn(6, 4)).square().mean()).backward()
    tracker.step()
    assert tracker.report().valid


@pytest.mark.parametrize("kind", ["group_norm", "rms_norm"])
def test_the_memory_layout_of_an_output_is_the_plain_one(kind: str) -> None:
    if kind == "group_norm":
        layer: nn.Module = nn.GroupNorm(2, 4)
        x = torch.randn(6, 4, 5, 5).to(memory_format=torch.channels_last)
    else:
        layer, x = nn.RMSNorm(4), torch.randn(6, 5, 2, 4).transpose(1, 2)
    want = layer(x)
    tracker = track(layer)
    with tracker.batch(IDS):
        got = layer(x)
    assert got.stride() == want.stride() and torch.equal(got, want)


def test_a_group_norm_has_no_rows_of_tokens() -> None:
    """Channels as many as tokens."""
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.Linear(3, 3))
    tracker = track(model)
    with tracker.batch(torch.zeros(4, 8, dtype=torch.int64)):
        model(torch.randn(4, 8, 3)).square().mean().backward()
    tracker.step()
    assert "0.weight" in tracker.coverage().unattributed and "1.weight" in tracker.coverage().attributed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_run_before_it_was_tracked() -> None:
    model = make()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(6, 4)).sum().backward()
    model.zero_grad()
    tracker = track(model)
    for _ in range(2):
        with tracker.batch(IDS):
            compiled(torch.randn(6, 4)).square().mean().backward()
        tracker.step()
        assert tracker.report().valid
        model.zero_grad()
    assert tracker.coverage().fraction == 1


def test_lazy_modules_are_to_be_run_once() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="run the model once"):
        track(model)
    model(torch.randn(6, 3))
    track(model)
