from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from taskgrad.cli import main
from taskgrad.study.data import RARE, SEQUENCE, TASKS, Mixture
from taskgrad.study.model import ByteGPT
from taskgrad.study.train import POLICIES, RARE_BUDGET, train
from taskgrad.tracker import track


def test_model_size() -> None:
    assert 35_000 < sum(p.numel() for p in ByteGPT(SEQUENCE).parameters()) < 45_000


def test_every_parameter_of_the_model_is_attributed() -> None:
    mixture = Mixture(0)
    model = ByteGPT(SEQUENCE)
    tracker = track(model, tasks=TASKS, mode="exact")
    inputs, _, ids = mixture.batch([0, 1, len(mixture.task_of_example) - 1], 0)
    with tracker.batch(ids):
        model(inputs).square().mean().backward()
    tracker.step()
    assert not tracker.coverage().unattributed


def test_a_run_is_reproducible_and_the_runs_differ_by_their_batches() -> None:
    first, again, equal = train("natural", 5, 12), train("natural", 5, 12), train("equal", 5, 12)
    assert first.evaluations == again.evaluations and first.curves == again.curves
    assert sum(first.share[1:]) < sum(equal.share[1:])
    assert sum(equal.share[1:]) == pytest.approx(RARE_BUDGET, abs=0.005)


def test_no_run_exceeds_the_budget() -> None:
    boosted = train("overwrite_boost", 0, 30)
    assert all(sum(shares[1:]) <= RARE_BUDGET + 1e-4 for shares in boosted.curves["share"])


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_quick_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    assert main(["demo", "--quick", "--steps", "10", "--out", str(tmp_path / "new" / "folder")]) == 0
    out = tmp_path / "new" / "folder"
    printed = capfd.readouterr().out
    assert "OverwriteBoost" in printed and "report.html" in printed

    result = json.loads((out / "result.json").read_text())
    assert list(result["runs"]) == list(POLICIES)
    assert result["config"]["steps"] == 10 and result["versions"]["torch"] == torch.__version__
    for run in result["runs"].values():
        assert run["evaluations"][-1]["step"] == 10
        assert set(run["evaluations"][-1]["seen"]) == set(RARE)
        assert len(run["curves"]["share"]) == len(run["curves"]["step"]) == 10
        assert len(run["push"]) == len(TASKS)

    page = (out / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert sum(tag == "svg" for tag, _ in tags.seen) == 10
    assert not re.search(r'(src|href)="', page), "the report needs no other file"


@pytest.mark.parametrize("option", [["--steps", "0"], ["--seed", "-1"]])
def test_wrong_options(option: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *option, "--out", str(tmp_path)]) == 2
    assert "at least" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())
