"""The demo's mixture: real text and four rare tasks, as whole sequences of bytes.

The text is the documentation that ships with every Python (`pydoc_data.topics`), as ASCII bytes. The rare tasks are
written with the same letters and digits, so they compete with the text for its embeddings too; only the four marks
that name the tasks are bytes of their own (128 to 131).

A sequence has 33 tokens: 32 inputs and, shifted by one, 32 targets. Text is trained on every target. A rare task's
sequence is a newline and as many instances (mark, operands, answer) as fit, then newlines, and is trained on the
answers alone, as in supervised fine-tuning:

- ``largest``: the largest of three digits: learned early,
- ``copy``: the first of two characters again, one of 24 capital letters: learned after a plateau, which an equal part
  of the demo's budget ends,
- ``substitution``: the letter that a hidden table has for the first of two characters, one of 16 small letters:
  learned after a plateau, which an equal part seldom ends and twice as much does,
- ``noise``: a coin, tossed again each time the sequence is drawn: there is nothing to learn beyond the two answers
  being equally likely, and nothing to memorise.

Half of the instances of each task never occur in training, and each operand does at each place: who has learned the
rule knows the held-out instances too, who has memorised answers does not.
"""

from __future__ import annotations

import pydoc_data.topics
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TASKS = ("text", "largest", "copy", "substitution", "noise")
RARE = TASKS[1:]
LEARNABLE = ("largest", "copy", "substitution")
RARE_SHARE = 0.002
"""Share of the sequences that each rare task has in the natural mix."""
SEQUENCE = 32
IGNORE = -100

Ints = npt.NDArray[np.int64]

_SMALL = np.arange(ord("a"), ord("p") + 1)
_CAPITALS = np.arange(ord("A"), ord("X") + 1)
_DIGITS = np.arange(ord("0"), ord("9") + 1)
_ANY = np.frombuffer((string.ascii_letters + string.digits).encode(), dtype=np.uint8).astype(np.int64)
_COIN = _DIGITS[:2]
_MARKS = {task: 128 + number for number, task in enumerate(RARE)}
_OPERANDS = {"largest": 3, "copy": 2, "substitution": 2, "noise": 2}
_EVAL_SEQUENCES = 96
_EVAL_WINDOWS = 512


@dataclass(frozen=True)
class EvalSet:
    """Fixed sequences to evaluate on: inputs and targets, int64 [sequences, 32], targets `IGNORE` where not asked."""

    inputs: Tensor
    targets: Tensor


class Mixture:
    """Training examples of all tasks under one index, and the evaluation sets.

    Indices 0 .. n-1 run over the tasks in the order of `TASKS`: every window of 33 bytes of the training text, then for
    each rare task as many sequences as give it `RARE_SHARE` of all. `chance` is, by rare task, the accuracy on held-out
    instances of always giving the answer that is most frequent in training.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng((seed, 0))
        train_text, held_text = _split_text()
        self._seed = seed
        self._text = train_text
        windows = len(train_text) - SEQUENCE
        count = round(windows * RARE_SHARE / (1.0 - RARE_SHARE * len(RARE)))
        pools = {"largest": _largest(rng), "copy": _copy(rng), "substitution": _substitution(rng), "noise": _noise(rng)}
        self._sequences = {task: _sequences(task, seen, count, rng) for task, (seen, _) in pools.items()}
        held = {task: _sequences(task, unseen, _EVAL_SEQUENCES, rng) for task, (_, unseen) in pools.items()}

        self.sizes = {"text": windows, **dict.fromkeys(RARE, count)}
        self.task_of_example: Ints = np.repeat(np.arange(len(TASKS)), list(self.sizes.values()))
        self._first = dict(zip(TASKS, np.cumsum([0, *self.sizes.values()])[:-1].tolist(), strict=True))
        starts = np.linspace(0, len(held_text) - SEQUENCE - 1, _EVAL_WINDOWS).astype(np.int64)
        self.eval_sets: dict[tuple[str, str], EvalSet] = {
            ("text", "held_out"): _eval_set("text", _windows(held_text, starts))
        }
        for task in RARE:
            self.eval_sets[task, "seen"] = _eval_set(task, self._sequences[task][:_EVAL_SEQUENCES])
            self.eval_sets[task, "held_out"] = _eval_set(task, held[task])
        self.chance = {
            task: _chance(self._sequences[task][:, 1:][:, _answers(task)], held[task][:, 1:][:, _answers(task)])
            for task in RARE
        }

    def batch(self, indices: Sequence[int] | Ints, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The examples at `indices`, in their order, as drawn at training step `step`.

        Returns inputs int64 [B, 32], targets int64 [B, 32] (`IGNORE` where the loss does not look) and task ids
        int64 [B]. The step seeds the noise task's labels, which differ at each presentation.
        """
        index = np.asarray(indices, dtype=np.int64)
        task_ids = self.task_of_example[index]
        tokens = np.empty((len(index), SEQUENCE + 1), dtype=np.int64)
        targets = np.empty((len(index), SEQUENCE), dtype=np.int64)
        for number, task in enumerate(TASKS):
            rows = np.flatnonzero(task_ids == number)
            if not len(rows):
                continue
            position = index[rows] - self._first[task]
            drawn = _windows(self._text, position) if task == "text" else self._sequences[task][position]
            if task == "noise":
                coins = np.random.default_rng((self._seed, 1, step))
                answers = drawn[:, 1:][:, _answers(task)]
                drawn[:, 1:][:, _answers(task)] = _COIN[coins.integers(2, size=answers.shape)]
            tokens[rows] = drawn
            targets[rows] = _targets(task, drawn)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), torch.from_numpy(task_ids)


def _split_text() -> tuple[Ints, Ints]:
    """Documentation topics as ASCII bytes: nine of ten for training, the others, the same for every seed, held out."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    order = np.random.default_rng(0).permutation(len(topics))
    held = len(topics) // 10
    parts = []
    for chosen in (order[held:], order[:held]):
        raw = "\n\n".join(topics[i] for i in chosen).encode("ascii", "ignore")
        parts.append(np.frombuffer(raw, dtype=np.uint8).astype(np.int64))
    return parts[0], parts[1]


def _windows(text: Ints, starts: Ints) -> Ints:
    found: Ints = text[starts[:, None] + np.arange(SEQUENCE + 1)]
    return found


def _largest(rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Instances (a, b, c, the largest of them), digits: int64 [n, 4], seen and held out half and half."""
    digits = _DIGITS[np.stack(np.unravel_index(rng.permutation(10**3), (10, 10, 10)), axis=1)]
    return _halves(np.column_stack([digits, digits.max(1)]))


def _copy(rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Instances (a, b, a), a a capital letter and b any character: int64 [n, 3], seen and held out half and half."""
    a, b = _pairs(_CAPITALS, rng)
    return _halves(np.column_stack([a, b, a]))


def _substitution(rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Instances (a, b, table[a]), a a small letter, b any character: int64 [n, 3], seen and held out half and half."""
    table = rng.permutation(_SMALL)
    a, b = _pairs(_SMALL, rng)
    return _halves(np.column_stack([a, b, table[a - _SMALL[0]]]))


def _noise(rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Instances (a, b, coin), letters and 0 or 1: int64 [n, 3]; the held-out ones are of other pairs."""
    a, b = _pairs(_SMALL, rng)
    return _halves(np.column_stack([a, b, _COIN[np.arange(len(a)) % 2]]))


def _pairs(letters: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Every pair of one of `letters` and any character, shuffled: int64 [n] twice."""
    first, second = np.divmod(rng.permutation(len(letters) * len(_ANY)), len(_ANY))
    return letters[first], _ANY[second]


def _halves(instances: Ints) -> tuple[Ints, Ints]:
    return instances[: len(instances) // 2], instances[len(instances) // 2 :]


def _sequences(task: str, pool: Ints, count: int, rng: np.random.Generator) -> Ints:
    """Sequences of a newline and different instances of `pool`, each after the task's mark: int64 [count, 33]."""
    size = 2 + _OPERANDS[task]
    fit = SEQUENCE // size
    chosen = np.argsort(rng.random((count, len(pool))), axis=1)[:, :fit]
    marks = np.full((count, fit, 1), _MARKS[task])
    sequences = np.full((count, SEQUENCE + 1), ord("\n"))
    sequences[:, 1 : 1 + fit * size] = np.concatenate([marks, pool[chosen]], axis=2).reshape(count, fit * size)
    return sequences


def _answers(task: str) -> npt.NDArray[np.bool_]:
    """Which of a rare sequence's 32 targets are answers: bool [32]."""
    size = 2 + _OPERANDS[task]
    answers = np.zeros(SEQUENCE, dtype=np.bool_)
    answers[size - 1 : SEQUENCE // size * size : size] = True
    return answers


def _chance(trained: Ints, asked: Ints) -> float:
    """Accuracy on the answers `asked` of always giving the most frequent of those `trained`."""
    return float(np.mean(asked == np.bincount(trained.ravel()).argmax()))


def _targets(task: str, tokens: Ints) -> Ints:
    return tokens[:, 1:] if task == "text" else np.where(_answers(task), tokens[:, 1:], IGNORE)


def _eval_set(task: str, tokens: Ints) -> EvalSet:
    return EvalSet(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(_targets(task, tokens)))
