"""A saved state: resumed it gives the same numbers bit for bit, damaged it gives an error that names the field."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import taskgrad as tg
from taskgrad.tracking import state as states
from tests.utils.resume import MODES, Run, resumed

ROOT = Path(__file__).parents[2]
TASKS = ["a", "b", "c"]
IDS = torch.tensor([0, 1, 2, 0, 1, 2, 0, -1])


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def _track(model: nn.Module, **options: Any) -> tg.TaskGradTracker:
    return tg.track(model, TASKS, **{"sketch_dim": 16, "verify": False, **options})


def _step(tracker: tg.TaskGradTracker, number: int) -> tg.StepReport:
    """A step of gradient descent by hand; task c is in every second one."""
    torch.manual_seed(number)
    model = tracker.model
    x = torch.randn(8, 6).to(next(model.parameters()))
    model.zero_grad()
    with tracker.batch(IDS if number % 2 else IDS.clamp(max=1)):
        model(x).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    tracker.step()
    return tracker.report()


def _save(tracker: tg.TaskGradTracker) -> tuple[dict[str, Any], dict[str, Any]]:
    return copy.deepcopy(tracker.model.state_dict()), tracker.state_dict()


def _last_digest(tracker: tg.TaskGradTracker) -> str:
    """It covers the whole state."""
    return list(tracker.state_dict()["digest"].values())[-1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "architecture", ["mlp_dropout", "gpt_tied", "residual_conv", "batch_norm", "moe_declared", "unsupported_kinds"]
)
def test_a_resumed_run_is_the_uninterrupted_one(architecture: str, mode: str, tmp_path: Path) -> None:
    run = Run(architecture, mode)
    reports = []
    for number in range(8):
        if number == 4:
            run.save(tmp_path / "state")
        reports.append(run.step(number).to_dict())
    assert resumed(architecture, mode, tmp_path / "state", 4, 8) == reports[4:]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumed_in_a_new_process_is_the_uninterrupted_one(mode: str, tmp_path: Path) -> None:
    run = Run("gpt_dropout", mode)
    reports = []
    for number in range(6):
        if number == 3:
            run.save(tmp_path / "state")
        reports.append(run.step(number).to_dict())
    code = (
        "import json, pathlib, torch; from tests.utils.resume import resumed; torch.set_num_threads(1); "
        f"print(json.dumps(resumed('gpt_dropout', {mode!r}, pathlib.Path({str(tmp_path / 'state')!r}), 3, 6)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(reports[3:]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resumed_as", ["frozen_first", "thawed_first", "as_saved"])
def test_frozen_and_thawed_in_mid_run(mode: str, resumed_as: str) -> None:
    """Thawed at step 2, another frozen at step 4, saved at 6; the columns are in the order in which they came."""
    model = _model()
    model[0].requires_grad_(False)
    tracker = _track(model, **MODES[mode])
    reports = []
    for number in range(10):
        if number == 2:
            model[0].requires_grad_(True)
        if number == 4:
            model[3].requires_grad_(False)
        if number == 6:
            saved, state = _save(tracker)
        if number == 8:
            model[3].requires_grad_(True)
        reports.append(_step(tracker, number).to_dict())
    assert [name for name, *_ in state["parameters"]][-2:] == ["0.weight", "0.bias"]

    other = _model(1)
    if resumed_as == "frozen_first":
        other[5].requires_grad_(False)  # thawed again before the first step
    if resumed_as == "as_saved":
        other[3].requires_grad_(False)
    again = _track(other, **MODES[mode])
    again.load_state_dict(state)
    other.load_state_dict(saved)
    other[5].requires_grad_(True)
    other[3].requires_grad_(False)
    rest = []
    for number in range(6, 10):
        if number == 8:
            other[3].requires_grad_(True)
        rest.append(_step(again, number).to_dict())
    assert rest == reports[6:]


def test_a_parameter_that_the_state_does_not_know_begins_afresh() -> None:
    """As in the uninterrupted run, where it is thawed at the same moment."""
    reports: list[list[dict[str, Any]]] = []
    for stop in (None, 3):
        model = _model()
        model[3].requires_grad_(False)
        tracker = _track(model)
        found = []
        for number in range(6):
            if number == 3:
                if stop:
                    saved, state = _save(tracker)
                    model = _model(2)  # everything trains
                    tracker = _track(model)
                    model.load_state_dict(saved)
                    tracker.load_state_dict(state)
                model[3].requires_grad_(True)
            found.append(_step(tracker, number).to_dict())
        reports.append(found)
    assert reports[0] == reports[1]


def test_going_back_to_an_older_state_takes_back_what_was_left_out_since() -> None:
    model = _model()
    tracker = _track(model, verify=True)
    for number in range(2):
        _step(tracker, number)
    saved, state = _save(tracker)
    expected = [_step(tracker, number).to_dict() for number in (2, 3)]
    with pytest.warns(UserWarning, match=r"3\.weight"):
        tracker._probes.left_out.drop("3.weight", "for this test")
    _step(tracker, 4)
    assert "3.weight" in tracker.coverage().unattributed
    model.load_state_dict(saved)
    tracker.load_state_dict(state)
    assert not tracker.coverage().unattributed
    assert [_step(tracker, number).to_dict() for number in (2, 3)] == expected


def test_what_was_left_out_stays_out_and_is_said_once() -> None:
    tracker = _track(_model())
    with pytest.warns(UserWarning, match=r"3\.weight"):
        tracker._probes.left_out.drop("3.weight", "for this test")
    _step(tracker, 0)
    saved, state = _save(tracker)
    again = _track(_model(1))
    before = _last_digest(again)
    # a warning turned into an error leaves the tracker alone, too
    with pytest.raises(UserWarning, match=r"3\.weight"):
        again.load_state_dict(state)
    assert _last_digest(again) == before
    with pytest.warns(UserWarning, match=r"3\.weight"):
        again.load_state_dict(state)
    again.model.load_state_dict(saved)
    assert again.coverage().unattributed["3.weight"] == "for this test"
    assert _step(again, 1).to_dict() == _step(tracker, 1).to_dict()


@pytest.mark.parametrize("before, after", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_of_another_dtype_goes_on_like_one_that_was_moved(before: torch.dtype, after: torch.dtype) -> None:
    tracker = _track(_model().to(before))
    for number in range(3):
        _step(tracker, number)
    saved, state = _save(tracker)
    again = _track(_model(1).to(after))
    again.model.load_state_dict(saved)
    again.load_state_dict(state)
    tracker.model.to(after)
    for number in range(3, 6):
        assert _step(again, number).to_dict() == _step(tracker, number).to_dict()
    assert again.state_dict()["memory.ema"].dtype == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("before, after", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_state_goes_from_device_to_device(before: str, after: str) -> None:
    tracker = _track(_model().double().to(before))
    for number in range(3):
        _step(tracker, number)
    saved, state = _save(tracker)
    assert {value.device.type for value in state.values() if isinstance(value, torch.Tensor)} == {"cpu"}
    again = _track(_model(1).double().to(after))
    again.model.load_state_dict(saved)
    again.load_state_dict(state)
    _step(tracker, 3)
    _step(again, 3)
    got, want = (t.report(wait=True) for t in (again, tracker))
    for name in ("gram", "signal", "own_effect", "others_effect", "memory_dot"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-6, atol=1e-9, equal_nan=True)


def test_the_order_of_loading_does_not_matter() -> None:
    tracker = _track(_model())
    for number in range(3):
        _step(tracker, number)
    saved, state = _save(tracker)
    expected = _step(tracker, 3).to_dict()
    for model_first in (True, False):
        again = _track(_model(1))
        if model_first:
            again.model.load_state_dict(saved)
        again.load_state_dict(state)
        if not model_first:
            again.model.load_state_dict(saved)
        assert _step(again, 3).to_dict() == expected


def test_a_step_under_way_is_given_up_by_a_load() -> None:
    tracker = _track(_model())
    for number in range(3):
        _step(tracker, number)
    saved, state = _save(tracker)
    expected = _step(tracker, 3).to_dict()
    with tracker.batch(IDS):
        loss = tracker.model(torch.randn(8, 6)).square().mean()
        with pytest.raises(RuntimeError, match="outside"):
            tracker.load_state_dict(state)
    loss.backward()
    tracker.model.load_state_dict(saved)
    tracker.load_state_dict(state)
    assert not tracker.report().valid and tracker.report().step == 3
    assert _step(tracker, 3).to_dict() == expected


def test_loaded_in_inference_mode() -> None:
    tracker = _track(_model())
    _step(tracker, 0)
    with torch.inference_mode():
        tracker.load_state_dict({k: v.clone() if hasattr(v, "clone") else v for k, v in tracker.state_dict().items()})
    assert _step(tracker, 1).valid


@pytest.mark.parametrize(
    "options, field",
    [
        ({"memory_decay": 0.9}, "memory_decay"),
        ({"sketch_dim": 32}, "sketch_dim"),
        ({"mode": "exact"}, "mode"),
        ({"mode": "exact_gram"}, "mode"),
    ],
)
def test_other_settings_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    state = _track(_model()).state_dict()
    with pytest.raises(ValueError, match=field):
        _track(_model(), **options).load_state_dict(state)


def test_another_window_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    state = _track(_model()).state_dict()
    monkeypatch.setattr(states, "WINDOW_STEPS", 100)
    with pytest.raises(ValueError, match="window_steps"):
        _track(_model()).load_state_dict(state)


def _without(model: nn.Sequential) -> nn.Sequential:
    return model[:5]


def _wider(model: nn.Sequential) -> nn.Sequential:
    model[5] = nn.Linear(4, 7)
    return model


@pytest.mark.parametrize("change, name", [(_without, r"5\.weight"), (_wider, r"5\.weight.*\(3, 4\).*\(7, 4\)")])
def test_another_model_is_refused_by_the_parameters_name(
    change: Callable[[nn.Sequential], nn.Sequential], name: str
) -> None:
    tracker = _track(_model())
    _step(tracker, 0)
    other = _track(change(_model()))
    before = _last_digest(other)
    with pytest.raises(ValueError, match=name):
        other.load_state_dict(tracker.state_dict())
    assert _last_digest(other) == before


def test_numbers_of_a_parameter_that_is_left_out_here_are_refused() -> None:
    state = _track(_model()).state_dict()
    other = _track(_model(), include=lambda name, module: name != "3")
    with pytest.raises(ValueError, match=r"3\.weight.*left out by include"):
        other.load_state_dict(state)


def test_a_diverged_run_is_told_from_a_damaged_state() -> None:
    tracker = _track(_model())
    _step(tracker, 0)
    with torch.no_grad():
        tracker.model[0].weight[0, 0] = torch.inf
    tracker._steps.theta = tracker._probes.theta()
    tracker._steps.memory.after[0] = tracker._steps.theta
    with pytest.raises(ValueError, match=r"memory\.after.*diverged"):
        _track(_model()).load_state_dict(tracker.state_dict())


ODD = [
    None, True, False, 0, 1, -1, 3, 10**30, -(10**5000), 0.5, float("nan"), float("inf"), 1e300, "", "a",
    "\x1b[31m\n\0", "\ud800", "名", "x" * 10_000, [], [[]], {}, {"a": 1}, {1: 2}, (), set(), b"bytes", object(), int,
    lambda: 0, ["a", "b", "c"],
    torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.zeros(3, 4, dtype=torch.complex64),
    torch.zeros(2, 2).to_sparse(), torch.zeros(3, device="meta"), torch.ones(3, dtype=torch.bool),
]  # fmt: skip


def _damage_tensor(value: torch.Tensor, rng: random.Random) -> Any:
    flat = value.clone().flatten()
    n = rng.randrange(max(1, flat.numel()))
    kind = rng.randrange(12)
    if kind == 0:
        return value[:-1]
    if kind == 1:
        return value[..., : rng.randrange(value.shape[-1])]
    if kind == 2:
        return value.to(rng.choice([torch.float16, torch.float32, torch.float64, torch.int32, torch.bool]))
    if kind == 3:
        doubled = torch.cat([value, value])
        return rng.choice([value.unsqueeze(0), value.flatten(), doubled, value.flip(0), value.roll(1)])
    if kind == 4:
        return rng.choice([value.to_sparse(), value.to("meta"), value.tolist(), value.numpy(), -value, value * 2])
    if kind == 5:  # nothing changed
        strided = value.unsqueeze(-1).repeat_interleave(2, -1)[..., 0]
        return rng.choice([value.clone(), strided, nn.Parameter(value, False)])
    if kind == 6:
        data = bytearray(value.numpy().tobytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return torch.frombuffer(data, dtype=value.dtype).view(value.shape)
    bad: list[float] = [-1, 0, 1, 7, 1e18, -1e18]
    if value.dtype.is_floating_point:
        bad += [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30]
    flat[n] = rng.choice(bad)
    return flat.view(value.shape)


def _damage_plain(value: Any, rng: random.Random) -> Any:
    """Somewhere inside of a plain value, at any depth."""
    if isinstance(value, (list, dict)) and value and rng.random() < 0.8:
        out = copy.copy(value)
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = rng.randrange(5)
        if kind == 0:
            del out[key]
        elif kind == 1 and isinstance(out, dict):
            out[rng.choice(["x", "\n", 3, None, "0.weight"])] = out.pop(key)
        elif kind == 1:
            out.insert(key, out[key])
        elif kind == 2 and isinstance(out, list):
            rng.shuffle(out)
        else:
            out[key] = _damage_plain(out[key], rng)
        return out
    if type(value) is int and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, float(value), str(value), value * 10**20])
    if type(value) is str and rng.random() < 0.5:
        return rng.choice([value + " ", value[:-1], value.upper(), value.encode(), value + "\0", "\u202e" + value])
    return rng.choice(ODD)


def _damage(state: dict[str, Any], rng: random.Random) -> tuple[Any, set[str]]:
    """A damaged copy, and the fields one of which an error must name."""
    out = dict(state)
    name, other = rng.sample(list(state), 2)
    kind = rng.randrange(12)
    if kind == 0:
        del out[name]
        return out, {name}
    if kind == 1:
        strange = rng.choice([name + "2", name.upper(), "\n", "decay", "memory", None, 3, ("a",)])
        out[strange] = out.pop(name)
        return out, {name, repr(strange)[:5]}
    if kind == 2:
        out[name], out[other] = out[other], out[name]
        return out, {name, other}
    if kind == 3:
        strange = rng.choice(["decay", "memory.decay", "sums", "__class__", "\x1b", 7, None, "x" * 500])
        out[strange] = rng.choice(ODD)
        return out, {repr(strange)[:5]}
    if kind == 4:
        out[name] = rng.choice(ODD)
        return out, {name}
    if kind == 5 and rng.random() < 0.1:
        return rng.choice([None, [], list(state.items()), "state", 3, {}, set(state)]), {"state"}
    if isinstance(state[name], torch.Tensor):
        out[name] = _damage_tensor(state[name], rng)
    else:
        out[name] = _damage_plain(state[name], rng)
    # a digest that does not match may be the field's fault
    return out, set(state) if name == "digest" else {name}


@pytest.mark.parametrize("mode", MODES)
def test_a_mutated_state_is_refused_or_the_same(mode: str, mutations: int = 500) -> None:
    """Error that names the field, with nothing changed; or the same numbers. Never others, never a crash later."""
    rng = random.Random(mode)
    tracker = _track(_model(), **MODES[mode])
    for number in range(4):
        _step(tracker, number)
    saved, state = _save(tracker)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = [_step(tracker, number).to_dict() for number in range(4, 7)]
        again = _track(_model(1), **MODES[mode])
        _step(again, 9)
        untouched = _last_digest(again)
        refused = 0
        for _ in range(mutations):
            damaged, names = _damage(state, rng)
            try:
                again.load_state_dict(damaged)
            except (TypeError, ValueError, KeyError) as error:
                refused += 1
                assert any(name in str(error) for name in names), (names, error)
                assert _last_digest(again) == untouched, error
                continue
            again.model.load_state_dict(saved)
            assert [_step(again, number).to_dict() for number in range(4, 7)] == expected, names
            again = _track(_model(1), **MODES[mode])
            _step(again, 9)
    assert refused > 0.8 * mutations
    again.load_state_dict(state)
