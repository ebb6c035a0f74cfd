"""One file of tracker and sampler: whole after any kill, refused where it was damaged, loaded whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import taskgrad as tg
from tests.sampling.helpers import sealed_again
from tests.utils.ranks import on_two_ranks

TASKS = ["a", "b"]
TASK_OF_EXAMPLE = torch.arange(2).repeat_interleave(torch.tensor([90, 10]))


def _sampler(tasks: list[str] = TASKS, **options: Any) -> tg.AdaptiveBatchSampler:
    return tg.AdaptiveBatchSampler(
        TASK_OF_EXAMPLE[: 50 * len(tasks)], batch_size=8, tasks=tasks, update_every=2, delay=0, **options
    )


class Loop:
    """A training run; its batches come from the sampler."""

    def __init__(self, seed: int = 0, sampler: tg.AdaptiveBatchSampler | None = None) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.tracker = tg.track(self.model, TASKS, self.optimizer, verify=False)
        self.sampler = _sampler() if sampler is None else sampler
        self.batches: Iterator[list[int]] | None = None  # of the epoch under way; a load begins another

    def run(self, steps: int) -> list[Any]:
        out = []
        x = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
        self.batches = iter(self.sampler) if self.batches is None else self.batches
        for rows in islice(self.batches, steps):
            self.optimizer.zero_grad()
            with self.tracker.batch(TASK_OF_EXAMPLE[rows]) as batch:
                losses = (self.model(x[rows]) - x[rows][:, :2]).square().mean(1)
                batch.losses(losses)
                losses.mean().backward()
            self.optimizer.step()
            report = self.tracker.report()
            self.sampler.update(report)
            out.append([rows, report.to_dict()])
        return out

    @property
    def state(self) -> tuple[str, dict[str, Any]]:
        return str(self.tracker.state_dict()["digest"]), self.sampler.state_dict()


def test_a_run_continues_from_one_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    loop = Loop()
    loop.run(5)
    tg.save_checkpoint(path, loop.tracker, loop.sampler, step=5)
    expected = loop.run(4)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    again = Loop(seed=1)
    assert tg.load_checkpoint(str(path), again.tracker, again.sampler) == 5
    # the model is the user's to save
    saved = Loop()
    saved.run(5)
    again.model.load_state_dict(saved.model.state_dict())
    assert again.run(4) == expected


def test_the_tracker_alone(tmp_path: Path) -> None:
    loop = Loop()
    loop.run(3)
    tg.save_checkpoint(tmp_path / "x", loop.tracker, step=3)
    again = Loop(seed=1)
    assert tg.load_checkpoint(tmp_path / "x", again.tracker) == 3
    assert again.state[0] == loop.state[0]


@pytest.mark.slow
def test_a_long_ledger_fits(tmp_path: Path) -> None:
    """A header of a safetensors file does not take 100 MB; what is in the JSON parts has no such bound."""
    loop = Loop()
    loop.run(2)
    loop.sampler._decisions.memory["long"] = "x" * 101_000_000
    tg.save_checkpoint(tmp_path / "x", loop.tracker, loop.sampler, step=2)
    assert tg.load_checkpoint(tmp_path / "x", Loop().tracker, again := _sampler()) == 2
    assert len(again._decisions.memory["long"]) == 101_000_000


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Loop]:
    loop = Loop()
    loop.run(5)
    path = tmp_path / "checkpoint.safetensors"
    tg.save_checkpoint(path, loop.tracker, loop.sampler, step=5)
    return path, loop


def test_every_cut_is_refused(saved: tuple[Path, Loop]) -> None:
    path, _ = saved
    data = path.read_bytes()
    again = Loop(seed=1)
    again.run(2)
    before = again.state
    for length in [*range(0, 64), *range(64, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
            tg.load_checkpoint(path, again.tracker, again.sampler)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
        tg.load_checkpoint(path, again.tracker, again.sampler)
    assert again.state == before


def test_a_flipped_bit_is_refused_or_changes_nothing(saved: tuple[Path, Loop], flips: int = 800) -> None:
    path, loop = saved
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    again = Loop(seed=1)
    again.run(2)
    before = again.state
    refused = 0
    for n in range(flips):
        damaged = bytearray(data)
        damaged[rng.randrange(header if n % 2 else len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            tg.load_checkpoint(path, again.tracker, again.sampler)
        except (ValueError, TypeError, KeyError):
            refused += 1
            assert again.state == before
        else:
            assert again.state == loop.state
            again = Loop(seed=1)
            again.run(2)
    assert refused > 0.9 * flips


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    loop = Loop()
    files: dict[str, bytes] = {
        "empty": b"",
        "text": b"hello world, this is no checkpoint",
        "pickle": b"\x80\x02}q\x00.",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}' is no checkpoint"):
            tg.load_checkpoint(tmp_path / name, loop.tracker)
    save_file({"w": torch.zeros(2)}, tmp_path / "model", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="something else"):
        tg.load_checkpoint(tmp_path / "model", loop.tracker)
    with pytest.raises(FileNotFoundError, match="absent"):
        tg.load_checkpoint(tmp_path / "absent", loop.tracker)
    with pytest.raises(IsADirectoryError, match="folder"):
        tg.load_checkpoint(tmp_path, loop.tracker)


def _rewrite(path: Path, **header: str) -> None:
    """Change the header of a checkpoint, as another version of the library might write it."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata: Mapping[str, str] = file.metadata()
    save_file(tensors, path, metadata={**metadata, **header})


def test_a_newer_version_and_another_stamp(saved: tuple[Path, Loop]) -> None:
    path, loop = saved
    _rewrite(path, version="2")
    with pytest.raises(ValueError, match=r"version '2'.*newer"):
        tg.load_checkpoint(path, loop.tracker, loop.sampler)
    _rewrite(path, version="1", step="6")
    with pytest.raises(ValueError, match="changed"):
        tg.load_checkpoint(path, loop.tracker, loop.sampler)


def test_parts_of_different_steps_are_told(saved: tuple[Path, Loop], tmp_path: Path) -> None:
    """Somebody puts the sampler of another checkpoint in, and makes the digest right."""
    from taskgrad import checkpoint

    path, loop = saved
    loop.run(1)
    tg.save_checkpoint(tmp_path / "later", loop.tracker, loop.sampler, step=6)
    with safe_open(path, "pt") as first, safe_open(tmp_path / "later", "pt") as second:
        tensors = {name: first.get_tensor(name).clone() for name in first.keys()}  # noqa: SIM118
        tensors["sampler"] = second.get_tensor("sampler").clone()
        header = dict(first.metadata())
    header["digest"] = checkpoint._digest(5, {n: tensors[n].numpy().tobytes() for n in ("tracker", "sampler")})
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match="different steps"):
        tg.load_checkpoint(path, loop.tracker, loop.sampler)


def test_a_missing_and_an_unwanted_sampler(saved: tuple[Path, Loop], tmp_path: Path) -> None:
    path, loop = saved
    with pytest.raises(ValueError, match="pass the sampler"):
        tg.load_checkpoint(path, loop.tracker)
    tg.save_checkpoint(tmp_path / "alone", loop.tracker, step=5)
    with pytest.raises(ValueError, match="no sampler's state"):
        tg.load_checkpoint(tmp_path / "alone", loop.tracker, loop.sampler)


class Damaged(tg.AdaptiveBatchSampler):
    """A sampler whose state, with right digests, cannot be that of a run."""

    def state_dict(self, *, consumed: int | None = None) -> dict[str, Any]:
        state = super().state_dict(consumed=consumed)
        return sealed_again({**state, "epochs": [[3, 0, 13]]})


def test_both_or_none(saved: tuple[Path, Loop]) -> None:
    path, _ = saved
    # a tracker that does not fit: the sampler stays
    again = Loop(seed=1)
    again.run(2)
    other = tg.track(nn.Linear(3, 2), TASKS)
    before = again.state
    with pytest.raises(ValueError, match="parameters"):
        tg.load_checkpoint(path, other, again.sampler)
    assert again.state == before
    # a sampler that does not fit: the tracker stays
    with pytest.raises(ValueError, match="differs"):
        tg.load_checkpoint(path, again.tracker, _sampler(seed=3))
    assert again.state == before
    # a state of the sampler that is refused late
    damaged = Loop(seed=1, sampler=Damaged(TASK_OF_EXAMPLE, batch_size=8, tasks=TASKS, update_every=2, delay=0))
    damaged.run(4)
    tg.save_checkpoint(path, damaged.tracker, damaged.sampler, step=4)
    with pytest.raises(ValueError, match="field 'epochs' of the sampler's state"):
        tg.load_checkpoint(path, again.tracker, again.sampler)
    assert again.state == before
    again.batches = None
    assert again.run(3) == Loop(seed=1).run(5)[2:]


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    loop = Loop()
    with pytest.raises(FileNotFoundError, match="create it"):
        tg.save_checkpoint(tmp_path / "no" / "x", loop.tracker, step=1)
    with pytest.raises(IsADirectoryError, match=r"checkpoint\.safetensors"):
        tg.save_checkpoint(tmp_path, loop.tracker, step=1)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileNotFoundError, match="no folder"):
        tg.save_checkpoint(tmp_path / "file" / "x", loop.tracker, step=1)


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    loop = Loop()
    with pytest.raises(OSError, match=r"replaced.*pipe"):
        tg.save_checkpoint(tmp_path / "pipe", loop.tracker, step=1)
    with pytest.raises(FileNotFoundError, match="pipe"):
        tg.load_checkpoint(tmp_path / "pipe", loop.tracker)
    assert [f.name for f in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"step": -1}, ValueError, "step"),
        ({"step": True}, TypeError, "step"),
        ({"step": "3"}, TypeError, "step"),
        ({"step": 1.0}, TypeError, "step"),
        ({"path": b"x"}, TypeError, "path"),
        ({"path": ""}, ValueError, "path"),
        ({"path": "a\0b"}, ValueError, "path"),
        ({"tracker": nn.Linear(1, 1)}, TypeError, "tracker"),
        ({"sampler": [1, 2]}, TypeError, "sampler"),
        ({"sampler": _sampler(["a"])}, ValueError, "tasks"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    given = {"path": tmp_path / "x", "tracker": Loop().tracker, "sampler": None, "step": 1, **arguments}
    with pytest.raises(error, match=message):
        tg.save_checkpoint(given.pop("path"), given.pop("tracker"), **given)
    assert not list(tmp_path.iterdir())


def test_a_policy_that_keeps_what_json_cannot_hold(saved: tuple[Path, Loop]) -> None:
    path, loop = saved
    data = path.read_bytes()
    loop.sampler._decisions.memory["bad"] = float("inf")
    with pytest.raises(ValueError, match="OverwriteBoost keeps in state"):
        tg.save_checkpoint(path, loop.tracker, loop.sampler, step=6)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1


def test_paths(tmp_path: Path) -> None:
    """Long and odd names, a relative path, a link; the file has the rights that any new file gets."""
    loop = Loop()
    for name in ("x" * 255, "a\n[b]", "名.safetensors", "*[a]?"):
        tg.save_checkpoint(tmp_path / name, loop.tracker, step=1)
        assert tg.load_checkpoint(tmp_path / name, Loop().tracker) == 1
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        tg.save_checkpoint("relative", loop.tracker, step=2)
        assert tg.load_checkpoint("relative", loop.tracker) == 2
    finally:
        os.chdir(here)
    (tmp_path / "link").symlink_to("relative")
    tg.save_checkpoint(tmp_path / "link", loop.tracker, step=3)
    assert (tmp_path / "link").is_symlink() and tg.load_checkpoint(tmp_path / "relative", loop.tracker) == 3
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "relative").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_the_old_file(saved: tuple[Path, Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    path, loop = saved
    data = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        tg.save_checkpoint(path, loop.tracker, loop.sampler, step=6)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1


_SAVING = """
import os, sys
from tests.test_checkpoint import Loop
import taskgrad as tg
loop = Loop()
loop.run(2)
print("ready", flush=True)
for line in sys.stdin:
    step = int(line)
    pid = os.fork()  # of a process with one thread
    while pid == 0:
        step += 1
        tg.save_checkpoint(sys.argv[1], loop.tracker, loop.sampler, step=step)
        if step == int(line) + 1:
            print(os.getpid(), flush=True)  # however long it took to start
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    root = Path(__file__).parent.parent
    rng = random.Random(0)
    last = 0
    command = [sys.executable, "-c", _SAVING, str(path)]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(14):
            process.stdin.write(f"{last}\n")
            pid = int(process.stdout.readline())
            time.sleep(rng.random() * 0.05)
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            again = Loop(seed=1)
            step = tg.load_checkpoint(path, again.tracker, again.sampler)
            assert step > last
            last = step
        process.stdin.close()
    loop = Loop()
    tg.save_checkpoint(path, loop.tracker, step=0)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "leftovers of killed processes stay"


def _save_and_load(folder: Path, rank: int) -> None:
    loop = Loop()
    loop.run(3)
    tg.save_checkpoint(folder / "shared", loop.tracker, loop.sampler, step=3)
    tg.save_checkpoint(folder / f"of_rank_{rank}", loop.tracker, loop.sampler, step=3)
    dist.barrier()
    again = Loop(seed=1)
    assert tg.load_checkpoint(folder / "shared", again.tracker, again.sampler) == 3
    assert again.state == loop.state


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_rank_0_writes_and_every_rank_reads(tmp_path: Path) -> None:
    on_two_ranks(partial(_save_and_load, tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["of_rank_0", "shared"]


def test_the_json_parts_are_json(saved: tuple[Path, Loop]) -> None:
    path, _ = saved
    with safe_open(path, "pt") as file:
        for name in ("tracker", "sampler"):
            part = json.loads(file.get_tensor(name).numpy().tobytes(), parse_constant=pytest.fail)
            assert part["step"] == 5


def test_the_mode_of_the_file_is_kept(tmp_path: Path) -> None:
    tracker = tg.track(nn.Linear(3, 2), ["a", "b"], verify=False)
    path = tmp_path / "run.safetensors"
    tg.save_checkpoint(path, tracker, step=1)
    path.chmod(0o600)
    (tmp_path / f".{hashlib.sha256(b'run.safetensors').hexdigest()[:16]}.x.tmp").touch()  # of somebody else
    tg.save_checkpoint(path, tracker, step=2)
    assert path.stat().st_mode & 0o777 == 0o600
    assert tg.load_checkpoint(path, tracker) == 2


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    tracker = tg.track(nn.Linear(3, 2), ["a", "b"], verify=False)
    path = tmp_path / "run.safetensors"
    tg.save_checkpoint(path, tracker, step=0)
    stop = threading.Event()

    def save() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            tg.save_checkpoint(path, tracker, step=step)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        steps = [tg.load_checkpoint(path, tg.track(nn.Linear(3, 2), ["a", "b"], verify=False)) for _ in range(150)]
    finally:
        stop.set()
        writer.join()
    assert steps == sorted(steps) and steps[-1] > steps[0]


def test_a_checkpoint_in_the_middle_of_a_step_is_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = tg.track(model, ["a", "b"], optimizer, verify=False)

    def backward() -> None:
        with tracker.batch(torch.tensor([0, 1, 1])):
            model(torch.randn(3, 3)).square().mean().backward()

    for _ in range(2):
        backward()
    with pytest.warns(
        UserWarning, match=r"middle of a step: 2 batches .* in no optimizer step yet.*after optimizer.step"
    ):
        tg.save_checkpoint(tmp_path / "a.safetensors", tracker, step=0)
    optimizer.step()
    tg.save_checkpoint(tmp_path / "a.safetensors", tracker, step=1)
    optimizer.zero_grad()
    backward()
    optimizer.zero_grad()  # a skipped step
    tg.save_checkpoint(tmp_path / "a.safetensors", tracker, step=1)
