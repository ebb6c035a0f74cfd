"""The whole tracker on a GPU, against the same run on the CPU in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.RMSNorm(256), nn.Linear(256, 50)
    )


def _train(device: str, dtype: torch.dtype, mode: str, *, half: bool = False, wait: bool = True) -> tg.StepReport:
    model = _model().to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tracker = tg.track(model, ["a", "b", "c"], optimizer, mode=mode, sketch_dim=1024)  # type: ignore[arg-type]
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, 50, (16, 24), generator=generator)
        ids = torch.randint(-1, 3, (16,), generator=generator)
        with tracker.batch(ids), torch.autocast(device, torch.bfloat16, enabled=half):
            logits = model(x.to(device))
            nn.functional.cross_entropy(logits.flatten(0, 1), x.roll(1, 1).flatten().to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tracker.report(wait=wait)


def _close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert (got - want).nan_to_num().norm() <= tolerance * want.nan_to_num().norm()


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_float32_agrees_with_the_cpu_in_float64(mode: str) -> None:
    truth = _train("cpu", torch.float64, mode)
    report = _train("cuda", torch.float32, mode)
    assert report.valid
    for name in ("gram", "signal", "memory_dot", "own_effect", "others_effect"):
        _close(getattr(report, name), getattr(truth, name), 2e-3)


def test_bfloat16_autocast_agrees_roughly() -> None:
    _close(_train("cuda", torch.float32, "sketch", half=True).gram, _train("cpu", torch.float64, "sketch").gram, 0.05)


def test_runs_repeat_bit_for_bit() -> None:
    first, second = (_train("cuda", torch.float32, "sketch").to_dict() for _ in range(2))
    assert first == second


def test_a_step_does_not_wait_for_the_gpu() -> None:
    model = _model().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tracker = tg.track(model, ["a", "b", "c"], optimizer)
    x = torch.randint(0, 50, (16, 24))
    ids, x = torch.randint(-1, 3, (16,)), x.cuda()
    for step in range(8):
        # the guards look at the numbers on the first three steps
        torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")
        try:
            with tracker.batch(ids):
                model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.report()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert tracker.report(wait=True).step == 8
