"""The price of a step, tried out with a tiny decoder: what is timed was right, what dies takes nothing along."""

from __future__ import annotations

import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from benchmarks import step
from benchmarks.apart import apart
from benchmarks.cost_picture import picture
from benchmarks.models import Setting
from benchmarks.peak import measurable, peaks
from benchmarks.peers import GhostDot, SubBatches, TBackwards, VmapGrad
from benchmarks.step_page import page
from benchmarks.training import Step, Tracked
from benchmarks.truth import Truth

TINY = Setting(40, 16, 1, 8, 6, 2)
THREE = Setting(40, 32, 1, 8, 6, 3)  # parts of 3, 3 and 2 examples


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("step")
    assert step.main(["--quick", "--repeats", "2", "--out", str(out)]) == 0
    assert (out / "step-cpu.md").read_text().startswith("# A training step")
    return json.loads((out / "step-cpu.json").read_text())


def test_every_variant_of_ours_is_right_and_timed(result: dict) -> None:
    found = result["cases"]["quick"]["variants"]
    ours = {name: v for name, v in found.items() if not v["peer"]}
    assert len(ours) == 12
    for name, v in ours.items():
        assert v["ms"] > 0 and len(v["ratios"]) == 2 and v["spread"] >= 0 and "off" not in v, name
        assert v["errors"]["grad"] < step.LIMIT["grad"], name
        assert ("gram" in v["errors"]) == name.startswith(("sketch", "exact")), name
    assert found["exact_gram, 4 micro-batches"]["beside"] == "plain, 4 micro-batches"


def test_peers_that_need_no_package_are_right_and_timed(result: dict) -> None:
    found = result["cases"]["quick"]["variants"]
    for name in ("T backwards", "T sub-batches", "vmap(grad)", "ghost dot-product"):
        assert found[name]["ratio"] > 0 and found[name]["errors"]["gram"] < step.LIMIT["gram"], name
    assert found["ghost dot-product"]["adapted"] and step.ASIS in found["ghost dot-product"]["off"]


@pytest.mark.skipif(not measurable(), reason="no /proc")
def test_memory_is_taken_of_what_differs_in_it(result: dict) -> None:
    found = result["cases"]["quick"]["variants"]
    for name in ("plain", "sketch", "exact_gram", "exact", "exact_gram, 4 micro-batches", "T backwards", "vmap(grad)"):
        assert set(found[name]["peak"]) == {"first", "step"}, name
    assert not any("peak failed" in v for v in found.values()) and "peak" not in found["sketch, every=4"]


def test_the_page_says_why_something_has_no_number(result: dict) -> None:
    text = page(result)
    assert (
        "| exact_gram, every=4 |" in text
        and "- ghost dot-product, on the decoder as it is: ValueError: a layer" in text
    )
    lost = page(result | {"failed": {"width 512, T = 8": "ChildProcessError: the process died with code -9"}})
    assert "- width 512, T = 8: ChildProcessError" in lost


def test_a_whole_file_is_not_measured_again(result: dict, tmp_path: Path) -> None:
    result = copy.deepcopy(result)
    result["cases"]["quick"]["seconds"] = -1.0
    (tmp_path / "step-cpu.json").write_text(json.dumps(result))
    assert step.main(["--quick", "--repeats", "2", "--resume", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "step-cpu.json").read_text())["cases"]["quick"]["seconds"] == -1.0
    result["machine"]["torch"] = "1.0"
    (tmp_path / "step-cpu.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit, match=r"torch 1\.0"):
        step.main(["--quick", "--resume", "--out", str(tmp_path)])


def test_a_case_that_dies_loses_no_other(result: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "measure", _die)
    (tmp_path / "step-cpu.json").write_text(json.dumps(result))
    lost = replace(step.QUICK[0], name="lost")
    found = step.run([*step.QUICK, lost], 2, tmp_path, resume=True)
    assert set(found["cases"]) == {"quick"} and "code -9" in found["failed"]["lost"]


def test_what_a_process_raises_is_told() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        apart(divmod, 1, 0, timeout=60)
    with pytest.raises(TimeoutError):
        apart(signal.pause, timeout=0.5)
    assert apart(divmod, 7, 2, timeout=60) == (3, 1)


@pytest.mark.parametrize("make", [TBackwards, SubBatches, VmapGrad, GhostDot])
@pytest.mark.parametrize("setting", [TINY, THREE])
def test_peers_agree_with_float64(make: type[Step], setting: Setting) -> None:
    setting = replace(setting, tied=False, batched_positions=True)
    peer = make(setting)
    peer.settle()
    errors, _ = Truth(setting).errors(peer)
    assert errors["gram"] < 1e-5 and errors["grad"] < 1e-5


def test_the_truth_of_examples_and_tasks_is_one() -> None:
    truth = Truth(replace(TINY, tasks=TINY.batch))  # a task an example
    assert torch.allclose(truth.norms, truth.gram.diagonal().sqrt(), rtol=1e-5)


class Off(TBackwards):
    def statistics(self) -> dict[str, Tensor]:
        return {"gram": self.product * 1.01}


class Failing(TBackwards):
    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        raise NotImplementedError("no such layer")


class Skewed(Step):
    """Leaves another gradient than the mean's."""

    def backward(self) -> None:
        super().backward()
        self.params[0].grad[0] += 1e-2  # type: ignore[index]


@pytest.mark.parametrize(
    ("make", "reason"), [(Off, "gram has a relative error of 0.01"), (Failing, "no such layer"), (Skewed, "grad")]
)
def test_what_is_wrong_gets_no_time(make: type[Step], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "peers", lambda: {"theirs": make})
    found = step.measure(step.Case("tiny", TINY, block=0.0), 1)["variants"]
    assert "ratio" in found["plain"] and "ratio" not in found["theirs"]
    assert set(found["theirs"]["off"]) == {step.ASIS, step.ADAPTED}
    assert all(reason in text for text in found["theirs"]["off"].values())


def test_a_block_is_whole_rounds_of_measured_and_unmeasured_steps() -> None:
    tracked = Tracked(TINY, "sketch", every=4)
    tracked.settle()
    before = tracked.tracker.report().step
    step.Timer._block(tracked, 5)
    assert tracked.tracker.report().step - before == 8


class Hoarder(Step):
    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        torch.ones(64 << 20, dtype=torch.uint8)
        super().micro_batch(tokens, ids)


@pytest.mark.skipif(not measurable(), reason="no /proc")
def test_a_peak_holds_what_was_freed_within_the_step() -> None:
    plain, hoarder = (apart(peaks, make, TINY, timeout=120) for make in (Step, Hoarder))
    assert 60 << 20 < hoarder["step"] - plain["step"] < 68 << 20


def test_the_picture_is_drawn_of_what_was_timed() -> None:
    def case(tasks: int, **ratios: float) -> dict:
        setting = {"width": 256, "tasks": tasks}
        return {"setting": setting, "parameters": 3.3e6, "variants": {n: {"ratio": r} for n, r in ratios.items()}}

    drawn = picture({"cases": {"a": case(2, sketch=1.1), "b": case(64, sketch=1.2, exact_gram=40.0)}})
    text = "".join(ElementTree.fromstring(drawn).itertext())
    assert "sketch 1.20" in text and "exact_gram 40" in text and "3.3 M" in text and "T backwards" not in text
    with pytest.raises(ValueError, match="different numbers of tasks"):
        picture({"cases": {"a": case(2, sketch=1.1)}})


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
