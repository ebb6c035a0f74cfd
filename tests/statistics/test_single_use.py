"""``accumulate=False``: the exact Gram of a step without the tasks' gradients in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
    single = _train(_model().to(dtype), mode="exact", accumulate=False, sketch_dim=64)
    exact = _train(_model().to(dtype), mode="exact")
    sketch = _train(_model().to(dtype), mode="sketch", sketch_dim=64)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for one, full, small in zip(single, exact, sketch, strict=True):
        for name in ("gram", "cosine", "others_cosine"):
            torch.testing.assert_close(
                getattr(one, name), getattr(full, name), rtol=tolerance, atol=tolerance, equal_nan=True
            )
        for name in ("signal", "memory_dot", "own_effect", "others_effect", "norm"):
            torch.testing.assert_close(
                getattr(one, name), getattr(small, name), rtol=tolerance, atol=tolerance, equal_nan=True
            )
        assert not one.cosine_se.nan_to_num().any()


def test_gram_is_free_of_the_loss_scale() -> None:
    reports = []
    for scale in (None, torch.tensor(1024.0)):
        model = _model().double()
        tracker = tg.track(model, TASKS, mode="exact", accumulate=False, sketch_dim=16, loss_scale=scale)
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


def test_a_weight_used_twice_is_left_out_by_name() -> None:
    model = _Twice().double()
    tracker = tg.track(model, TASKS, mode="exact", accumulate=False, verify=False)
    with pytest.warns(UserWarning, match="used more than once"):
        with tracker.batch(torch.tensor([0, 1, 2, 0])):
            model(torch.randn(4, 6).double()).square().mean().backward()
        tracker.step()
    report, grads = tracker.report(), [p.grad for p in model.outer.parameters()]
    assert tracker.coverage().attributed == ("outer.weight", "outer.bias")
    total = sum(g.square().sum() for g in grads if g is not None)
    torch.testing.assert_close(report.gram.sum(), total)


def test_a_second_batch_before_the_step_is_refused() -> None:
    model = nn.Linear(3, 2)
    tracker = tg.track(model, TASKS, mode="exact", accumulate=False, verify=False)
    ids = torch.tensor([0, 1, 2])
    with tracker.batch(ids):
        model(torch.randn(3, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"one batch per optimizer step.*accumulate=True"), tracker.batch(ids):
        pass


def test_two_forwards_before_their_backwards_are_refused_at_the_step() -> None:
    model = nn.Linear(3, 2)
    tracker = tg.track(model, TASKS, mode="exact", accumulate=False, verify=False)
    losses = []
    for _ in range(2):
        with tracker.batch(torch.tensor([0, 1, 2])):
            losses.append(model(torch.randn(3, 3)).sum())
    (losses[0] + losses[1]).backward()
    with pytest.raises(RuntimeError, match="one batch per optimizer step"):
        tracker.step()


def test_a_forward_that_is_given_up_does_not_count() -> None:
    model = nn.Linear(3, 2)
    tracker = tg.track(model, TASKS, mode="exact", accumulate=False, verify=False)
    ids = torch.tensor([0, 1, 2])
    with tracker.batch(ids):
        model(torch.randn(3, 3))
    with tracker.batch(ids):
        model(torch.randn(3, 3)).sum().backward()
    tracker.step()
    assert tracker.report().valid


def test_what_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="sketches always accumulate"):
        tg.track(nn.Linear(3, 2), TASKS, mode="sketch", accumulate=False)
    tracker = tg.track(nn.Linear(3, 2), TASKS, mode="exact", accumulate=False)
    with pytest.raises(RuntimeError, match="accumulate=True"):
        tracker.task_gradients()
    other = tg.track(nn.Linear(3, 2), TASKS, mode="exact")
    with pytest.raises(ValueError, match="accumulate"):
        other.load_state_dict(tracker.state_dict())


def test_it_holds_what_exact_mode_cannot() -> None:
    model = nn.Linear(20_000, 20_000, device="meta")  # 12 GiB for the taps and memories of three tasks
    with pytest.raises(ValueError, match="accumulate=False"):
        tg.track(model, TASKS, mode="exact")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_graph_breaks() -> None:
    model = _model().double()
    tracker = tg.track(model, TASKS, mode="exact", accumulate=False, sketch_dim=64, verify=False)
    x, ids = _batch(0)

    def step(call: nn.Module) -> tg.StepReport:
        model.zero_grad()
        with tracker.batch(ids):
            nn.functional.cross_entropy(call(x).flatten(0, 1), x.flatten()).backward()
        tracker.step()
        return tracker.report()

    eager = step(model)
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"))  # type: ignore[arg-type]
    torch.testing.assert_close(compiled.gram, eager.gram)
