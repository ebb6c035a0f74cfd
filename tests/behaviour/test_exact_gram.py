"""``mode="exact_gram"``: the exact Gram, and the tasks' gradients in memory only where they are needed for it.

Against every architecture of the zoo: ``test_zoo.py``.
"""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taskgrad as tg

TASKS = ["a", "b", "c"]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(40, 24), nn.LayerNorm(24), nn.Linear(24, 80), nn.GELU(), nn.RMSNorm(80), nn.Linear(80, 40)
    )


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 40, (12, 10), generator=generator), torch.randint(-1, 3, (12,), generator=generator)


def _train(model: nn.Module, steps: int = 4, **options: object) -> list[tg.StepReport]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tracker = tg.track(model, TASKS, optimizer, **options)  # type: ignore[arg-type]
    reports = []
    for step in range(steps):
        x, ids = _batch(step)
        with tracker.batch(ids):
            nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(tracker.report())
    return reports


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gram_is_that_of_exact_mode_and_the_memory_that_of_sketch_mode(dtype: torch.dtype) -> None:
    single = _train(_model().to(dtype), mode="exact_gram", sketch_dim=64)
    exact = _train(_model().to(dtype), mode="exact")
    sketch = _train(_model().to(dtype), mode="sketch", sketch_dim=64)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for one, full, small in zip(single, exact, sketch, strict=True):
        for name in ("gram", "cosine", "others_cosine", "norm"):
            torch.testing.assert_close(
                getattr(one, name), getattr(full, name), rtol=tolerance, atol=tolerance, equal_nan=True
            )
        for name in ("signal", "memory_dot", "own_effect", "others_effect"):
            torch.testing.assert_close(
                getattr(one, name), getattr(small, name), rtol=tolerance, atol=tolerance, equal_nan=True
            )
        assert not one.cosine_se.nan_to_num().any()


def test_gram_is_free_of_the_loss_scale() -> None:
    reports = []
    for scale in (None, torch.tensor(1024.0)):
        model = _model().double()
        tracker = tg.track(model, TASKS, mode="exact_gram", sketch_dim=16, loss_scale=scale)
        x, ids = _batch(0)
        with tracker.batch(ids):
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            (loss if scale is None else loss * scale).backward()
        tracker.step()
        reports.append(tracker.report())
    torch.testing.assert_close(reports[0].gram, reports[1].gram)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(self.inner(x).relu()).relu())
        return out


def _compared(
    model: nn.Module, ids: Tensor, *, checkpointed: bool = False
) -> Callable[[int], tuple[tg.StepReport, tg.StepReport, tg.TaskGradTracker]]:
    """A step of so many micro-batches on the model and on a copy in exact mode; their reports."""
    models = [model, copy.deepcopy(model)]
    trackers = [
        tg.track(m, TASKS, mode=mode, sketch_dim=16, verify=False)  # type: ignore[arg-type]
        for m, mode in zip(models, ("exact_gram", "exact"), strict=True)
    ]

    def step(passes: int) -> tuple[tg.StepReport, tg.StepReport, tg.TaskGradTracker]:
        xs = [torch.randn(len(ids), 6, dtype=torch.float64) for _ in range(passes)]
        for m, tracker in zip(models, trackers, strict=True):
            m.zero_grad()
            for x in xs:
                with tracker.batch(ids):
                    out = checkpoint(m, x, use_reentrant=False) if checkpointed else m(x)
                    (out.square().mean() / passes).backward()
            tracker.step()
        one, full = (t.report() for t in trackers)
        assert one.valid and full.valid
        return one, full, trackers[0]

    return step


def _same(one: tg.StepReport, full: tg.StepReport) -> None:
    for name in ("gram", "cosine", "others_cosine", "norm"):
        torch.testing.assert_close(getattr(one, name), getattr(full, name), equal_nan=True, msg=name)


IDS = torch.tensor([0, 1, 2, 0, -1])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_weight_used_twice_keeps_its_parts_from_the_first_step_on(checkpointed: bool) -> None:
    step = _compared(_Twice().double(), IDS, checkpointed=checkpointed)
    for _ in range(4):
        one, full, tracker = step(1)
        _same(one, full)
    kept = {p.name: p.layout.keeps for p in tracker._gauges.live()}
    assert kept == {"inner.weight": "parts", "inner.bias": "sketch", "outer.weight": "sketch", "outer.bias": "sketch"}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_from_the_first_step_on(checkpointed: bool) -> None:
    step = _compared(
        nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double(), IDS, checkpointed=checkpointed
    )
    for passes in (3, 3, 1, 3):
        one, full, _ = step(passes)
        _same(one, full)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_after_single_ones_are_nan_once(checkpointed: bool) -> None:
    step = _compared(
        nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double(), IDS, checkpointed=checkpointed
    )
    for _ in range(3):
        one, full, tracker = step(1)
        _same(one, full)
    assert {p.layout.keeps for p in tracker._gauges.live() if not p.sketch.exact} == {"gram"}
    with pytest.warns(
        UserWarning, match=r"Gram, cosines and norms of step 4 are NaN: 0\.weight, 2\.weight had one use"
    ):
        one, full, _ = step(2)
    for name in ("gram", "cosine", "others_cosine", "norm"):
        assert getattr(one, name).isnan().all(), name
    assert one.signal.isfinite().all() and one.own_effect.isfinite().all(), "the memory goes on"
    assert str(one).splitlines()[2].split()[:3] == ["a", "4", "-"]
    for passes in (2, 1, 2):
        one, full, _ = step(passes)
        _same(one, full)
        torch.testing.assert_close(one.others_cosine_mean, full.others_cosine_mean, atol=0.2, rtol=0)


class _Sometimes(nn.Module):
    """The branch is called so many times."""

    times = 0

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.trunk(x)
        for _ in range(self.times):
            out = out + self.branch(out.tanh())
        return out


def test_each_parameter_has_its_own_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _compared(_Sometimes().double(), IDS)
    for times, surprised in ((1, False), (0, False), (1, False), (2, True), (1, False), (0, False), (3, False)):
        monkeypatch.setattr(_Sometimes, "times", times)
        with pytest.warns(UserWarning, match=r"NaN: branch\.weight had") if surprised else contextlib.nullcontext():
            one, full, tracker = step(1)
        if surprised:
            assert one.gram.isnan().all()
        else:
            _same(one, full)
    keeps = {p.name: p.layout.keeps for p in tracker._gauges.live()}
    assert keeps["trunk.weight"] == "gram" and keeps["branch.weight"] == "parts"


HELD = """
import gc, warnings
import torch
from torch import nn
import taskgrad as tg

warnings.simplefilter("ignore")
model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
size = sum(p.nbytes for p in model.parameters())
tracker = tg.track(model, ["a", "b", "c"], mode="exact_gram", sketch_dim=64)
held = []
for step in range(4):
    model.zero_grad()
    for _ in range(1 + step // 2):  # parts, single uses, the surprise, parts
        with tracker.batch(torch.arange(6) % 3):
            model(torch.randn(6, 64)).square().mean().backward()
    tracker.step()
    assert tracker.report().valid
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.layout is torch.strided and not t.is_meta]
    held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
    del tensors
assert max(held) - min(held) < size / 2, (held, size)
"""


def test_nothing_of_the_size_of_the_gradients_is_kept_between_steps() -> None:
    """Which would be four times that of the parameters. In a process of its own: all tensors are counted."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3, 1e-4])
def test_rows_that_cancel_each_other(epsilon: float) -> None:
    """In float32: few rows, so the Gram is from products of rows, whose size is not that of their sum."""
    torch.manual_seed(0)
    reports = []
    x = torch.randn(16, 64)
    pairs = torch.cat([x, -x * (1 + epsilon)])
    for mode in ("exact_gram", "exact"):
        torch.manual_seed(1)
        model = nn.Linear(64, 64, bias=False)
        tracker = tg.track(model, TASKS, mode=mode, sketch_dim=16, verify=False)  # type: ignore[arg-type]
        for _ in range(2):  # the second has single uses
            model.zero_grad()
            with tracker.batch(torch.arange(32) % 2):
                model(pairs).mean().backward()
            tracker.step()
        reports.append(tracker.report())
    torch.testing.assert_close(reports[0].gram, reports[1].gram, rtol=2e-3, atol=0)


def test_a_forward_from_before_the_taps_were_laid_out_anew_is_not_lost_in_silence() -> None:
    model = nn.Linear(6, 5)
    tracker = tg.track(model, TASKS, mode="exact_gram", sketch_dim=16)
    with tracker.batch(IDS):
        early = model(torch.randn(5, 6)).square().mean()
    for loss in (None, early, None):
        model.zero_grad()
        with tracker.batch(IDS):
            (model(torch.randn(5, 6)).square().mean() + (0 if loss is None else loss)).backward()
        with contextlib.nullcontext() if loss is None else pytest.warns(UserWarning, match="weight .*sum over tasks"):
            tracker.step()
        assert tracker.coverage().attributed == (("weight", "bias") if loss is None else ("bias",))


def test_what_it_does_not_have() -> None:
    with pytest.raises(TypeError, match=r"no argument 'accumulate'.*mode=\"exact_gram\""):
        tg.track(nn.Linear(3, 2), TASKS, mode="exact", accumulate=False)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r'mode must be "sketch", "exact_gram" or "exact"'):
        tg.track(nn.Linear(3, 2), TASKS, mode="gram")  # type: ignore[arg-type]
    tracker = tg.track(nn.Linear(3, 2), TASKS, mode="exact_gram")
    with pytest.raises(RuntimeError, match='mode="exact"'):
        tracker.task_gradients()
    other = tg.track(nn.Linear(3, 2), TASKS, mode="exact")
    with pytest.raises(ValueError, match="mode"):
        other.load_state_dict(tracker.state_dict())


def test_it_holds_what_exact_mode_cannot() -> None:
    model = nn.Linear(20_000, 20_000, device="meta")  # 12 GiB for the taps and memories of three tasks
    with pytest.raises(ValueError, match='mode="exact_gram"'):
        tg.track(model, TASKS, mode="exact")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_graph_breaks() -> None:
    """In every pattern: the parts, single uses, the surprise, and the parts for good."""
    x, ids = _batch(0)

    def run(compiled: bool) -> list[tg.StepReport]:
        torch.compiler.reset()
        model = _model().double()
        tracker = tg.track(model, TASKS, mode="exact_gram", sketch_dim=64, verify=False)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        reports = []
        for passes in (1, 1, 2, 2):
            model.zero_grad()
            with pytest.warns(UserWarning, match="had one use") if len(reports) == 2 else contextlib.nullcontext():
                for _ in range(passes):
                    with tracker.batch(ids):
                        nn.functional.cross_entropy(call(x).flatten(0, 1), x.flatten()).backward()
                tracker.step()
            reports.append(tracker.report())
        return reports

    for compiled, eager in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(compiled.gram, eager.gram, equal_nan=True)
        assert compiled.valid and eager.valid
