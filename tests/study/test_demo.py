from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from taskgrad.cli import main
from taskgrad.study import demo, summary
from taskgrad.study.data import LEARNABLE, RARE, SEQUENCE, TASKS, Mixture
from taskgrad.study.model import ByteGPT
from taskgrad.study.train import POLICIES, RARE_BUDGET, train
from taskgrad.tracking.track import track


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
    assert "Right answers on held-out (seen) instances" in printed

    result = json.loads((out / "result.json").read_text())
    assert list(result["runs"]) == list(POLICIES)
    assert result["config"]["steps"] == 10 and result["versions"]["torch"] == torch.__version__
    for run in result["runs"].values():
        assert run["evaluations"][-1]["step"] == 10
        assert set(run["evaluations"][-1]["seen"]) == set(run["evaluations"][-1]["held_out"]) == set(RARE)
        assert len(run["curves"]["share"]) == len(run["curves"]["step"]) == 10
        assert len(run["push"]) == len(TASKS)

    assert set(result["chance"]) == set(RARE) and 0.4 < result["chance"]["noise"] < 0.6

    page = (out / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert sum(tag == "svg" for tag, _ in tags.seen) == 12
    assert not re.search(r'(src|href)="', page), "the report needs no other file"


def test_headline_and_table_lead_with_held_out_instances() -> None:
    result = made_up_result()
    assert summary.headline(result) == (
        "Right answers on held-out (seen) instances of the rare tasks that can be learned: "
        "natural mix 0.30 (0.60, text loss 1.250), equal split 0.30 (0.60, text loss 1.250), "
        "OverwriteBoost 0.30 (0.60, text loss 1.250)."
    )
    table = [dict(zip(summary.HEADER, row, strict=True)) for row in summary.rows(result)]
    noise = next(row for row in table if row["task"] == "noise")
    assert (noise["held out"], noise["seen"], noise["share"], noise["at end"]) == ("0.50", "0.51", "0.40%", "0.60%")
    means = [row["held out"] for row in table if row["task"] == "learnable mean"]
    assert means == ["0.30", "0.30", "0.30", "0.10"], "the three runs, and one answer for all"


def made_up_result() -> dict[str, Any]:
    """The mean over the learnable tasks is .3 held out and .6 seen, in each run."""
    held_out = dict(zip(RARE, (0.2, 0.3, 0.4, 0.5), strict=True))
    seen = dict(zip(RARE, (0.5, 0.6, 0.7, 0.51), strict=True))
    run = {
        "evaluations": [{"step": 1, "text_loss": 1.25, "held_out": held_out, "seen": seen}],
        "curves": {"share": [[0.976, 0.006, 0.006, 0.006, 0.006]]},
        "share": [0.984, 0.004, 0.004, 0.004, 0.004],
        "epochs": [1.0] * 5,
    }
    chance = dict(zip(RARE, (0.2, 0.05, 0.05, 0.5), strict=True))
    return {
        "tasks": list(TASKS),
        "rare": list(RARE),
        "learnable": list(LEARNABLE),
        "chance": chance,
        "runs": dict.fromkeys(POLICIES, run),
    }


@pytest.mark.parametrize("option", [["--steps", "0"], ["--seed", "-1"]])
def test_wrong_options(option: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *option, "--out", str(tmp_path)]) == 2
    assert "at least" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a[/b]c", "[red]", "\x1b[2J", "two\nlines", "[link=x]"])
def test_any_folder_will_do(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], runs_of_one_step: None
) -> None:
    out = tmp_path / name
    assert main(["demo", "--steps", "1", "--out", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "result.json"]
    printed = capfd.readouterr().out
    assert name.encode("unicode_escape").decode() in printed and "\x1b" not in printed


@pytest.fixture
def runs_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained once, in this process."""
    runs = {name: train(name, 0, 1).to_dict() for name in POLICIES}
    monkeypatch.setattr(demo, "_train_all", lambda seed, steps, console: runs)


def _a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def _in_a_file(tmp_path: Path) -> Path:
    return _a_file(tmp_path) / "x[/red]"


def _occupied(tmp_path: Path) -> Path:
    (tmp_path / "report.html").mkdir()
    return tmp_path


def _system(tmp_path: Path) -> Path:
    return Path("/proc")


@pytest.mark.parametrize("make", [_a_file, _in_a_file, _occupied, _system])
def test_a_folder_that_cannot_be_written_to_is_told_before_training(
    make: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_train_all", lambda *_: pytest.fail("it trained"))
    assert main(["demo", "--out", str(make(tmp_path))]) == 2
    assert "nothing can be written" in capfd.readouterr().out


def test_a_failed_write_leaves_the_last_result(
    tmp_path: Path, runs_of_one_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["demo", "--steps", "1", "--out", str(tmp_path)]) == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        main(["demo", "--steps", "1", "--out", str(tmp_path)])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for child processes in /proc")
def test_its_processes_end_with_it_when_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "taskgrad.cli", "demo", "--steps", "100000", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        workers: list[int] = []
        deadline = time.monotonic() + 60
        # computing: a second of processor time is more than starting up takes of it in user code
        while time.monotonic() < deadline and (len(workers) < 3 or min(map(_seconds, workers)) < 1):
            time.sleep(0.2)
            workers = _training(process.pid)
        assert len(workers) == 3
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _training(parent: int) -> list[int]:
    """Children of a process that were spawned to train."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may have ended meanwhile
            of = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if of == parent and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def _seconds(pid: int) -> float:
    """Processor time of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK")


def _alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
