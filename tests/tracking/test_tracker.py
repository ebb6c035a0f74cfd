"""The handle itself: closing a step, reports, state, arguments."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def _step(tracker: tg.TaskGradTracker, model: nn.Module, ids: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    x = torch.randn(len(ids), 6)
    with tracker.batch(ids):
        model(x).square().mean().backward()
    for o in optimizers:
        o.step()
        o.zero_grad()


IDS = torch.tensor([0, 1, 1, 0, -1, 1])


def test_report_before_the_first_step_is_not_valid() -> None:
    model = _model()
    report = tg.track(model, ["a", "b"], torch.optim.SGD(model.parameters(), 0.1)).report()
    assert not report.valid
    assert report.step == 0
    assert report.steps_since_seen.tolist() == [-1, -1]


def test_report_reads_as_text_and_as_json() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer)
    with tracker.batch(IDS) as batch:
        rows = model(torch.randn(6, 6)).square().mean(1)
        batch.losses(rows)
        rows.mean().backward()
    optimizer.step()
    report = tracker.report()
    assert report.loss is not None
    torch.testing.assert_close(report.loss[0], rows[IDS == 0].mean().double().detach())
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["tasks"] == ["a", "b"]
    assert data["examples"] == [2, 3]
    assert data["signal"] == [None, None]  # no memory yet
    assert "a" in str(report)
    assert report.cosine.diagonal().tolist() == pytest.approx([1.0, 1.0])
    assert report.cosine_se.abs().max() == 0


def test_weight_defines_the_mean_gradient() -> None:
    """With a token mean, ḡ_t is the gradient of the task's own token mean."""
    model = _model().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer, mode="exact")
    x, weight = torch.randn(6, 6).double(), torch.tensor([1.0, 4, 2, 0, 3, 5])
    loss = model(x).square().sum(1)
    with tracker.batch(IDS, weight=weight):
        loss = model(x).square().sum(1)
        ((loss * weight).sum() / weight.sum()).backward()
    optimizer.step()
    report = tracker.report()
    assert report.tokens.tolist() == [1.0, 11.0]
    mine = IDS == 1
    # the gradients were taken before the step, which SGD undoes exactly up to rounding
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.grad
    optimizer.zero_grad()
    loss = model(x).square().sum(1)
    ((loss * weight)[mine].sum() / weight[mine].sum()).backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    torch.testing.assert_close(report.norm[1], norm)


def test_step_closes_when_all_optimizers_have_stepped() -> None:
    model = _model()
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    second = torch.optim.Adam(model[2].parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], [first, second])
    for n in range(3):
        _step(tracker, model, IDS, first)
        assert tracker.report().step == n
        second.step()
        second.zero_grad()
        assert tracker.report().step == n + 1
    assert tracker.report().own_effect.isfinite().all()


def test_without_optimizer_step_closes_the_step() -> None:
    model = _model()
    tracker = tg.track(model, ["a", "b"])
    for _ in range(3):
        _step(tracker, model, IDS)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        tracker.step()
        model.zero_grad()
    report = tracker.report()
    assert report.step == 3
    assert (report.own_effect != 0).all()
    assert (report.others_effect == 0).all()


def test_step_by_hand_is_refused_where_an_optimizer_closes() -> None:
    model = _model()
    tracker = tg.track(model, ["a", "b"], torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="optimizer"):
        tracker.step()


def test_closure_that_runs_once_is_a_step() -> None:
    """Lightning's way to call an optimizer."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with tracker.batch(IDS):
            loss = model(torch.randn(6, 6)).square().mean()
        loss.backward()
        return loss

    for n in range(3):
        optimizer.step(closure)
        assert tracker.report().step == n + 1
    assert tracker.report().valid
    assert tracker.report().signal.isfinite().all()


def test_state_dict_continues_bit_for_bit() -> None:
    torch.manual_seed(0)

    def run(stop: int | None) -> dict[str, object]:
        torch.manual_seed(1)
        model = _model()
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        tracker = tg.track(model, ["a", "b"], optimizer, sketch_dim=20)
        for n in range(12):
            if n == stop:
                file = io.BytesIO()
                torch.save([tracker.state_dict(), model.state_dict(), optimizer.state_dict()], file)
                tracker.remove()
                file.seek(0)
                states = torch.load(file, weights_only=True)
                model = _model()
                optimizer = torch.optim.AdamW(model.parameters(), 0.05)
                tracker = tg.track(model, ["a", "b"], optimizer, sketch_dim=20)
                for thing, state in zip((tracker, model, optimizer), states, strict=True):
                    thing.load_state_dict(state)
            torch.manual_seed(n)
            _step(tracker, model, IDS if n % 3 else IDS.clamp(max=0), optimizer)
        return tracker.report().to_dict()

    assert run(None) == run(7)


def test_state_of_another_tracker_is_refused() -> None:
    model = _model()
    state = tg.track(model, ["a", "b"]).state_dict()
    with pytest.raises(ValueError, match="tasks"):
        tg.track(_model(), ["a", "c"]).load_state_dict(state)
    with pytest.raises(ValueError, match="mode"):
        tg.track(_model(), ["a", "b"], mode="exact").load_state_dict(state)
    with pytest.raises(ValueError, match=r"parameters.*0\.weight"):
        tg.track(nn.Linear(6, 8), ["a", "b"]).load_state_dict(state)


def test_parameters_written_between_steps_count_as_others() -> None:
    """Weights averaged, loaded or pulled back between two steps are seen."""
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a"], optimizer, verify=False)
    ids, x = torch.zeros(2, dtype=torch.int64), torch.ones(2, 1).double()
    for n in range(2):
        if n:
            with torch.no_grad():
                model.weight += 5.0
        with tracker.batch(ids):
            model(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = tracker.report()
    assert report.own_effect.item() == pytest.approx(-0.1)
    assert report.others_effect.item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "net"}, TypeError, "nn.Module"),
        ({"tasks": "ab"}, TypeError, "sequence of names"),
        ({"tasks": ["a", "a"]}, ValueError, "distinct"),
        ({"tasks": []}, ValueError, "at least one"),
        ({"mode": "fast"}, ValueError, "sketch"),
        ({"sketch_dim": 4}, ValueError, "sketch_dim"),
        ({"memory_decay": 1.0}, ValueError, "memory_decay"),
        ({"optimizer": "adam"}, TypeError, "optimizer"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, ValueError, "none of the model"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, ValueError, "no trainable"),
        ({"model": nn.LSTM(2, 2)}, ValueError, "no rule for LSTM"),
    ],
    ids=lambda v: next(iter(v.items()))[0] if isinstance(v, dict) else "",
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments: dict[str, object] = {"model": _model(), "tasks": ["a", "b"], **change}
    with pytest.raises(error, match=words):
        tg.track(**arguments)  # type: ignore[arg-type]


def test_exact_mode_refuses_what_would_not_fit() -> None:
    with torch.device("meta"):
        model = nn.Linear(30_000, 30_000)
    with pytest.raises(ValueError, match="GiB"):
        tg.track(model, ["a", "b"], mode="exact")


def test_a_layer_kind_of_ones_own() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    @tg.register_capture(Scale)
    class ScaleCapture(tg.Capture):
        params = ("gamma",)

        def forward(self, module, rows, gauges, x):  # type: ignore[no-untyped-def]
            if not rows.match(x):
                raise tg.Unattributed("not the batch's rows")
            return x * tg.per_example(module.gamma, gauges["gamma"], rows)

    model = nn.Sequential(_model(), Scale()).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer, mode="exact")
    x = torch.randn(6, 6).double()
    with tracker.batch(IDS):
        model(x).square().mean().backward()
    got = model[1].gamma.grad.clone()
    optimizer.step()
    grads = tracker.task_gradients()["1.gamma"]
    torch.testing.assert_close(grads.sum(0), got)
    assert tracker.coverage().fraction == 1.0
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.grad
    (want,) = torch.autograd.grad(model(x)[IDS == 1].square().sum() / 12, model[1].gamma)
    torch.testing.assert_close(grads[1], want)


def test_task_gradients_need_exact_mode() -> None:
    with pytest.raises(RuntimeError, match="exact"):
        tg.track(_model(), ["a", "b"]).task_gradients()


def test_a_batch_whose_ids_fit_nothing_does_not_leave_an_old_report() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer, verify=False)
    _step(tracker, model, IDS, optimizer)
    assert tracker.report().valid
    with pytest.warns(UserWarning, match="does not start with the shape"), tracker.batch(IDS[:4]):
        model(torch.randn(6, 6)).square().mean().backward()
    optimizer.step()
    assert not tracker.report().valid


def test_a_removed_tracker_takes_no_batch() -> None:
    tracker = tg.track(_model(), ["a", "b"])
    tracker.remove()
    with pytest.raises(RuntimeError, match="removed"):
        tracker.batch(IDS)
