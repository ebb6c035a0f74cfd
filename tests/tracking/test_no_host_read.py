"""A step reads nothing back from the device. It runs on "meta": not a CPU for any branch of the tracker, and whoever
reads a value there gets an error in place of a wait.

What is replaced: the parcel to the host, which waits for an event of CUDA, and three places that know no "meta". The
steps on which the guards look at sums are left out: those do wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import taskgrad as tg
from taskgrad.ops._register import Op
from taskgrad.tracking import step as pipeline
from taskgrad.tracking.delivery import Delivery

SENT: list[dict[str, Tensor]] = []
Read = Callable[[Tensor], Any]


class OnTheWay(Delivery):
    """What never arrives."""

    def __init__(self, tasks: Any, step: int, values: dict[str, Tensor], sketches: Any, *_: Any) -> None:
        self.tasks, self.step, self.values, self.sketches = tasks, step, values, sketches
        self.before = None
        self.event = self  # type: ignore[assignment]
        SENT.append(values)

    def query(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    SENT.clear()
    monkeypatch.setattr(pipeline, "Delivery", OnTheWay)
    public, autocast = Op.__call__, torch.is_autocast_enabled

    def by_shapes(op: Op, *args: Any) -> Any:
        if not args[0].is_meta:
            return public(op, *args)
        return op.overload(*(a.detach() if isinstance(a, Tensor) else a for a in args))

    monkeypatch.setattr(Op, "__call__", by_shapes)  # the public ops refuse tensors without data
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and autocast(*kind))


def _model(device: str) -> nn.Module:
    with torch.device(device):
        return nn.Sequential(
            nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.RMSNorm(256), nn.Linear(256, 50)
        )


def train(mode: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch, steps: int = 3, **options: Any) -> None:
    """Some steps on "meta"."""
    columns = tg.track(_model("cpu"), ["a", "b", "c"], verify=False, mode=mode)._gauges.width
    model = _model("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with monkeypatch.context() as making:  # the memory asks once how many columns there are
        making.setattr(Tensor, "__int__", lambda _: columns)
        tracker = tg.track(model, ["a", "b", "c"], optimizer, verify=False, mode=mode)
    tracker._steps._check_sums = False
    x = torch.zeros(6, 5, dtype=torch.int64, device="meta")
    for _ in range(steps):
        with tracker.batch(ids, **options) as batch:
            losses = model(x).float().square().mean(2)
            losses = losses if ids.dim() == 2 else losses.mean(1)
            batch.losses(losses)
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


IDS = {"one": torch.tensor([0, 2, 1, 0, -1, 1]), "token": torch.tensor([0, 2, 1, 0, -1]).repeat(6, 1)}


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("mode", ["sketch", "exact_gram", "exact"])
def test_a_step_reads_nothing(mode: str, ids: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train(mode, IDS[ids].to(where), monkeypatch)
    assert len(SENT) == 3, "one parcel a step"
    assert sum(value.numel() for value in SENT[-1].values()) < 1000


class Waited(TorchFunctionMode):
    """Copies of the host's values to the device that the host waits for."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("to", "tensor", "as_tensor", "copy_") and isinstance(out, Tensor) and out.is_meta:
            given = args[1] if name == "copy_" else args[0]
            if not (isinstance(given, Tensor) and given.is_meta) and not kwargs.get("non_blocking"):
                self.seen.append(f"{name}{tuple(out.shape)}")
        return out


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("mode", ["sketch", "exact_gram", "exact"])
def test_no_copy_to_the_device_is_waited_for(mode: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Waited() as waited:
        torch.zeros(2).to("meta")
        torch.tensor([1.0], device="meta")
        torch.zeros(2).to("meta", non_blocking=True)
        assert waited.seen == ["to(2,)", "tensor(1,)"]
    collect = pipeline.Pipeline.collect
    with Waited() as waited:

        def first_of_all(self: Any, *args: Any) -> Any:
            if not SENT:
                waited.seen.clear()  # what the tracker and its first step set up
            return collect(self, *args)

        monkeypatch.setattr(pipeline.Pipeline, "collect", first_of_all)
        train(mode, IDS["one"].to(where), monkeypatch, weight=torch.ones(6), weight_total=6)
    assert waited.seen == [] and len(SENT) == 3


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_weights_and_their_total_are_not_read(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train("sketch", IDS["one"].to(where), monkeypatch, weight=torch.ones(6, device=where), weight_total=6)
    assert len(SENT) == 3


READS: dict[str, Read] = {
    "item": lambda t: t.sum().item(),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "numpy": lambda t: t.detach().numpy(),
    "nonzero": lambda t: t.nonzero(),
    "bool": lambda t: bool(t.sum()),
    "int": lambda t: int(t.sum()),
    "float": lambda t: float(t.sum()),
    "mask": lambda t: t[t > 0],
}


@pytest.mark.parametrize("read", READS)
def test_a_read_would_be_seen(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = pipeline.Pipeline.collect

    def reading(self: Any, *args: Any) -> Any:
        step = collect(self, *args)
        READS[read](step.gradient)
        return step

    monkeypatch.setattr(pipeline.Pipeline, "collect", reading)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match=r"(?i)meta|convert"):
        train("sketch", IDS["one"], monkeypatch, steps=1)
