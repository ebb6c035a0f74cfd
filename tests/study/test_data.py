from __future__ import annotations

import numpy as np
import pytest
import torch

from taskgrad.study.data import IGNORE, LEARNABLE, RARE, RARE_SHARE, SEQUENCE, TASKS, Mixture

SIZE = {"largest": 5, "copy": 4, "substitution": 4, "noise": 4}
"""Bytes of an instance: mark, operands, answer."""
LETTERS = 16


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(seed=3)


def rare_rows(mixture: Mixture, task: str, count: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    first = int(np.flatnonzero(mixture.task_of_example == TASKS.index(task))[0])
    inputs, targets, ids = mixture.batch(range(first, first + count), step)
    assert (ids == TASKS.index(task)).all()
    return inputs, targets


def instances(task: str, inputs: torch.Tensor, targets: torch.Tensor) -> set[tuple[int, ...]]:
    """(operands, answer) of every instance in the sequences."""
    size = SIZE[task]
    whole = torch.cat([inputs, torch.where(targets[:, -1:] == IGNORE, ord("\n"), targets[:, -1:])], 1)
    rows = whole[:, 1 : 1 + 32 // size * size].reshape(-1, size)
    return {tuple(row) for row in rows[:, 1:].tolist()}


def all_instances(mixture: Mixture, task: str) -> set[tuple[int, ...]]:
    held = mixture.eval_sets[task, "held_out"]
    seen = instances(task, *rare_rows(mixture, task, mixture.sizes[task]))
    return seen | instances(task, held.inputs, held.targets)


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
    size, fit = SIZE[task], 32 // SIZE[task]
    answers = targets != IGNORE
    assert answers.nonzero()[:, 1].tolist() == [size * i + size - 1 for i in range(fit)] * 5
    whole = torch.cat([inputs, torch.where(targets[:, -1:] == IGNORE, ord("\n"), targets[:, -1:])], 1)
    marks = whole[:, 1 : 1 + fit * size : size]
    assert (marks == 128 + RARE.index(task)).all(), "each instance begins with the task's mark"
    assert (whole == 128 + RARE.index(task)).sum() == marks.numel()
    assert (whole[:, 0] == ord("\n")).all() and (whole[:, 1 + fit * size :] == ord("\n")).all()
    assert torch.equal(whole[:, 1:][answers], targets[answers])


@pytest.mark.parametrize("task", LEARNABLE)
def test_held_out_instances_never_occur_in_training(mixture: Mixture, task: str) -> None:
    seen = instances(task, *rare_rows(mixture, task, mixture.sizes[task]))
    held = mixture.eval_sets[task, "held_out"]
    unseen = instances(task, held.inputs, held.targets)
    assert not {row[:-1] for row in seen} & {row[:-1] for row in unseen}
    given = mixture.eval_sets[task, "seen"]
    assert instances(task, given.inputs, given.targets) <= seen


@pytest.mark.parametrize("task", LEARNABLE)
def test_what_the_rule_needs_of_a_held_out_instance_occurs_in_training(mixture: Mixture, task: str) -> None:
    seen = instances(task, *rare_rows(mixture, task, mixture.sizes[task]))
    held = mixture.eval_sets[task, "held_out"]
    for place in range(SIZE[task] - 2):
        operands = {row[place] for row in instances(task, held.inputs, held.targets)}
        assert operands <= {row[place] for row in seen}


def test_answers(mixture: Mixture) -> None:
    assert all(row[3] == max(row[:3]) for row in all_instances(mixture, "largest"))
    assert all(answer == a for a, _, answer in all_instances(mixture, "copy"))
    table = {(a, answer) for a, _, answer in all_instances(mixture, "substitution")}
    assert len(table) == len(dict(table)) == len({answer for _, answer in table}) == LETTERS
    coins = {answer for _, _, answer in all_instances(mixture, "noise")}
    assert coins == {ord("0"), ord("1")}


def test_chance_is_what_always_giving_the_most_frequent_answer_gets(mixture: Mixture) -> None:
    for task in LEARNABLE:
        trained = rare_rows(mixture, task, mixture.sizes[task])[1]
        answer = trained[trained != IGNORE].mode().values
        held = mixture.eval_sets[task, "held_out"].targets
        assert mixture.chance[task] == pytest.approx((held[held != IGNORE] == answer).float().mean().item())
    assert mixture.chance["largest"] == pytest.approx(0.271, abs=0.06), "9 in 271 of 1,000 triples"
    assert mixture.chance["noise"] == pytest.approx(0.5, abs=0.06)


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
    orders = [rare_rows(Mixture(seed), "substitution", 20) for seed in (1, 2)]
    assert not torch.equal(orders[0][0], orders[1][0])
