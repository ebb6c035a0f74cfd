"""The harness that the policies are compared with: its data, its controls, a short run of it and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.policies import tables
from benchmarks.policies.__main__ import main
from benchmarks.policies.controls import LossDriven, equal, replay
from benchmarks.policies.parity import SETTINGS, Parity
from taskgrad.sampling import AdaptiveBatchSampler


@pytest.mark.parametrize("name", SETTINGS)
def test_labels_are_parities_of_few_bits_and_noise_is_none(name: str) -> None:
    setting = SETTINGS[name]
    data = Parity(setting, seed=3)
    ks = [group.k for group in setting.groups for _ in range(group.count)]
    for task, k in enumerate(ks):
        inputs, labels = data.batch(np.full(600, task), step=0)
        assert inputs[:, : len(ks)].sum(0).tolist() == [600.0 * (t == task) for t in range(len(ks))]
        bits = (inputs[:, len(ks) :].numpy() > 0).astype(np.int64)
        # over the field of two elements a parity is linear: the labels of sums of inputs are the sums of labels
        solved = _solve(bits, labels.numpy())
        assert (solved is None) == (k == 0)
        if solved is not None:
            assert solved.sum() == k


def _solve(bits: Any, labels: Any) -> Any:
    """The one set of bits, 0/1 [bits], whose parity gives all labels, by elimination; None if there is none."""
    rows = np.column_stack([bits, labels])
    columns = bits.shape[1]
    for column in range(columns):
        pivot = column + np.flatnonzero(rows[column:, column])[0]
        rows[[column, pivot]] = rows[[pivot, column]]
        others = rows[:, column].astype(bool)
        others[column] = False
        rows[others] ^= rows[column]
    return None if rows[columns:].any() else rows[:columns, -1]


def test_examples_are_fresh_at_every_step_and_the_same_for_a_seed() -> None:
    tasks = np.zeros(50, dtype=np.int64)
    data = Parity(SETTINGS["parity"], seed=0)
    first, again = data.batch(tasks, 5)[0], Parity(SETTINGS["parity"], seed=0).batch(tasks, 5)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, data.batch(tasks, 6)[0])
    assert not torch.equal(first, data.batch(tasks, 5, held_out=True)[0])


def test_the_natural_mix_of_many_tasks_is_as_described() -> None:
    setting = SETTINGS["many"]
    natural = setting.sizes / setting.sizes.sum()
    assert len(natural) == 32 and natural[:4].sum() == pytest.approx(0.86)
    assert natural[4:] == pytest.approx(0.14 / 28)


def test_loss_driven_parts_follow_the_rare_tasks_losses() -> None:
    state = SimpleNamespace(tasks=("a", "b", "c"), natural=np.array([0.8, 0.1, 0.1]), memory={})
    policy: Any = LossDriven()
    nan = float("nan")
    assert policy.weights(SimpleNamespace(loss=torch.tensor([1.0, 3.0, nan])), state).tolist() == [0, 0.5, 0.5]
    assert policy.weights(SimpleNamespace(loss=torch.tensor([1.0, nan, 1.0])), state).tolist() == [0, 0.75, 0.25]


def test_replay_gives_the_mean_weights_within_the_budget() -> None:
    slots = np.repeat(np.arange(3), [80, 10, 10])
    natural = np.array([0.8, 0.1, 0.1])
    mean = np.array([0.72, 0.17, 0.11])
    sampler = AdaptiveBatchSampler(slots, batch_size=10, policy=replay(mean, natural, 0.3), budget=0.3)
    assert sampler.weights == pytest.approx(mean, abs=1e-9)
    even = AdaptiveBatchSampler(slots, batch_size=10, policy=equal(natural), budget=0.3)
    assert even.weights == pytest.approx([0.56, 0.22, 0.22])


@pytest.mark.slow
def test_short_runs_leave_lines_that_the_tables_are_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs.jsonl"
    policies = ("natural", "equal", "loss", "uniform", "OverwriteBoost", "replay", "shuffled")
    for policy in policies:
        main(["--setting", "parity", "--policy", policy, "--seed", "0", "--steps", "60", "--out", str(out)])
    capsys.readouterr()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["policy"] for line in lines] == list(policies)
    for line in lines:
        assert np.sum(line["shares"], axis=1) == pytest.approx(1, abs=1e-4)
        assert len(line["accuracy"]) == len(line["mean"]) == 12
    mean = {line["policy"]: np.array(line["mean"]) for line in lines}
    assert mean["replay"] == pytest.approx(mean["OverwriteBoost"], abs=1e-6)
    rare = np.array([tables.rare_accuracy(line) for line in lines])
    assert ((rare > 0.3) & (rare < 0.7)).all()
    table = tables.render(lines)
    assert all(f"| {policy} |" in table for policy in policies)
    assert "| 1.00 (1.00) |" in table  # the equal split is the unit of what noise gets


def test_replay_without_its_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="OverwriteBoost"):
        main(["--setting", "parity", "--policy", "replay", "--seed", "0", "--out", str(tmp_path / "none.jsonl")])
