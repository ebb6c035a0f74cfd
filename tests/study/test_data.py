from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from taskgrad.study.data import IGNORE, LEARNABLE, RARE, RARE_SHARE, SEQUENCE, TASKS, Mixture


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(seed=3)


def rare_rows(mixture: Mixture, task: str, count: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    first = int(np.flatnonzero(mixture.task_of_example == TASKS.index(task))[0])
    inputs, targets, ids = mixture.batch(range(first, first + count), step)
    assert (ids == TASKS.index(task)).all()
    return inputs, targets


def instances(inputs: torch.Tensor, targets: torch.Tensor) -> set[tuple[int, int, int]]:
    """(a, b, answer) of every instance in the sequences."""
    whole = torch.cat([inputs, torch.where(targets[:, -1:] == IGNORE, 0, targets[:, -1:])], 1)
    return {tuple(row) for row in whole[:, 1:].reshape(-1, 4)[:, 1:].tolist()}


def test_natural_shares(mixture: Mixture) -> None:
    share = np.bincount(mixture.task_of_example) / len(mixture.task_of_example)
    assert share[1:] == pytest.approx(np.full(4, RARE_SHARE), rel=1e-3)
    assert sum(mixture.sizes.values()) == len(mixture.task_of_example)


def test_text_targets_are_the_next_bytes(mixture: Mixture) -> None:
    inputs, targets, ids = mixture.batch([0, 100], 0)
    assert inputs.shape == targets.shape == (2, SEQUENCE)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (ids == 0).all() and inputs.max() < 128


@pytest.mark.parametrize("task", RARE)
def test_only_answers_are_trained_on(mixture: Mixture, task: str) -> None:
    inputs, targets = rare_rows(mixture, task, 5)
    answers = targets != IGNORE
    assert answers.sum(1).tolist() == [8] * 5
    assert (inputs[:, 1::4] >= 128).all(), "each instance begins with the task's mark"
    whole = torch.cat([inputs, targets[:, -1:]], 1)
    assert torch.equal(whole[:, 1:][answers], targets[answers])


@pytest.mark.parametrize("task", LEARNABLE)
def test_held_out_instances_never_occur_in_training(mixture: Mixture, task: str) -> None:
    seen = instances(*rare_rows(mixture, task, mixture.sizes[task]))
    held = mixture.eval_sets[task, "held_out"]
    assert not seen & instances(held.inputs, held.targets)
    given = mixture.eval_sets[task, "seen"]
    assert instances(given.inputs, given.targets) <= seen


def test_answers(mixture: Mixture) -> None:
    everything = {}
    for task in LEARNABLE:
        held = mixture.eval_sets[task, "held_out"]
        seen = instances(*rare_rows(mixture, task, mixture.sizes[task]))
        everything[task] = seen | instances(held.inputs, held.targets)
    assert all(answer == a for a, _, answer in everything["copy"])
    assert all((a - 48 + b - 48) % 10 == answer - 48 for a, b, answer in everything["addition"])
    later = {(a, b): answer == ord("1") for a, b, answer in everything["comparison"]}
    assert all(later[b, a] != later[a, b] for a, b in later if (b, a) in later)
    for a, b, c in itertools.permutations(sorted({a for a, _ in later}), 3):
        if {(a, b), (b, c), (a, c)} <= later.keys() and later[a, b] and later[b, c]:
            assert later[a, c], "the hidden order is transitive"


def test_comparison_keeps_neighbours_and_both_orders_of_a_pair_together(mixture: Mixture) -> None:
    seen = instances(*rare_rows(mixture, "comparison", mixture.sizes["comparison"]))
    held = mixture.eval_sets["comparison", "held_out"]
    unseen = {frozenset((a, b)) for a, b, _ in instances(held.inputs, held.targets)}
    pairs = {frozenset((a, b)) for a, b, _ in seen}
    assert not pairs & unseen
    assert len(pairs) == 138, "half of the 276 pairs"
    letters = {letter for pair in pairs for letter in pair}
    wins = {x: sum(a == x and answer == ord("1") for a, _, answer in seen) for x in letters}
    assert len(letters) == 24 and max(wins.values()) > 0


def test_coins_are_tossed_again_at_each_presentation(mixture: Mixture) -> None:
    first, second, again = (rare_rows(mixture, "noise", 50, step) for step in (1, 2, 1))
    assert torch.equal(first[1], again[1])
    tosses = [t[1][t[1] != IGNORE] for t in (first, second)]
    assert 0.4 < (tosses[0] == tosses[1]).float().mean() < 0.6
    assert set(torch.cat(tosses).tolist()) == {ord("0"), ord("1")}


def test_seed_decides_everything() -> None:
    indices = [0, 5, *range(430_000, 430_004)]
    one, same, other = (Mixture(seed).batch([i % 420_000 for i in indices], 0)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(one[:2], other[:2]), "the text is the same for every seed"
    orders = [rare_rows(Mixture(seed), "comparison", 20) for seed in (1, 2)]
    assert not torch.equal(orders[0][0], orders[1][0])
