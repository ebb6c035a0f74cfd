"""The demo's mixture: real text and four rare tasks, as whole sequences of bytes.

The text is the documentation that ships with every Python (`pydoc_data.topics`), as ASCII bytes. The rare tasks are
written with the same letters and digits, so they compete with the text for its embeddings too; only the four marks
that name the tasks are bytes of their own (128 to 131).

A sequence has 33 tokens: 32 inputs and, shifted by one, 32 targets. Text is trained on every target. A rare task's
sequence is a newline and eight instances (mark, a, b, answer), and is trained on the answers alone, as in supervised
fine-tuning:

- ``comparison``: which of two of 24 letters comes later in a hidden order; half of the pairs never occur in training,
- ``addition``: the last digit of the sum of two digits; a fifth of the sums never occur in training,
- ``copy``: the first of two capital letters again; half of the pairs never occur in training,
- ``noise``: a coin, tossed again each time the sequence is drawn: there is nothing to learn beyond the two answers
  being equally likely, and nothing to memorise.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TASKS = ("text", "comparison", "addition", "copy", "noise")
RARE = TASKS[1:]
LEARNABLE = ("comparison", "addition", "copy")
RARE_SHARE = 0.002
"""Share of the sequences that each rare task has in the natural mix."""
SEQUENCE = 32
IGNORE = -100

Ints = npt.NDArray[np.int64]

_INSTANCES = (SEQUENCE + 1) // 4
_LETTERS = ord("a")
_CAPITALS = ord("A")
_OPERANDS = 24
_MODULUS = 10
_DIGITS = ord("0")
_MARKS = {task: 128 + number for number, task in enumerate(RARE)}
_EVAL_SEQUENCES = 96
_EVAL_WINDOWS = 512

_ANSWERS = np.arange(SEQUENCE) % 4 == 3
"""Which of a rare sequence's 32 targets are answers."""


@dataclass(frozen=True)
class EvalSet:
    """Fixed sequences to evaluate on: inputs and targets, int64 [sequences, 32], targets `IGNORE` where not asked."""

    inputs: Tensor
    targets: Tensor


class Mixture:
    """Training examples of all tasks under one index, and the evaluation sets.

    Indices 0 .. n-1 run over the tasks in the order of `TASKS`: every window of 33 bytes of the training text, then for
    each rare task as many sequences as give it `RARE_SHARE` of all.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng((seed, 0))
        train_text, held_text = _split_text()
        self._seed = seed
        self._text = train_text
        windows = len(train_text) - SEQUENCE
        count = round(windows * RARE_SHARE / (1.0 - RARE_SHARE * len(RARE)))
        pools = {"comparison": _comparison(rng), "addition": _addition(rng), "copy": _copy(rng), "noise": _noise(rng)}
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
                drawn[:, 4::4] = _DIGITS + coins.integers(2, size=(len(rows), _INSTANCES))
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


def _comparison(rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Instances (a, b, label), label 1 where a ranks above b: int64 [n, 3], seen and held out.

    Both orders of a pair are on the same side of the split, so that a held-out pair can only be told by the order
    inferred from others. Neighbours in the order stay in training: without them it would not be determined.
    """
    rank = rng.permutation(_OPERANDS)
    pairs = [(a, b) for a in range(_OPERANDS) for b in range(a)]
    far = [pair for pair in pairs if abs(rank[pair[0]] - rank[pair[1]]) > 1]
    near = [pair for pair in pairs if abs(rank[pair[0]] - rank[pair[1]]) == 1]
    order = rng.permutation(len(far))
    held = len(pairs) // 2
    sides = [near + [far[i] for i in order[held:]], [far[i] for i in order[:held]]]
    pools = []
    for side in sides:
        ordered = np.array(side + [(b, a) for a, b in side])
        label = rank[ordered[:, 0]] > rank[ordered[:, 1]]
        pools.append(np.column_stack([_LETTERS + ordered, _DIGITS + label]))
    return pools[0], pools[1]


def _addition(rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Instances (a, b, a + b mod p): int64 [n, 3], seen and held out."""
    a, b = np.divmod(rng.permutation(_MODULUS**2), _MODULUS)
    instances = _DIGITS + np.column_stack([a, b, (a + b) % _MODULUS])
    held = len(instances) // 5
    return instances[held:], instances[:held]


def _copy(rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Instances (a, b, a): int64 [n, 3], seen and held out half and half."""
    a, b = np.divmod(rng.permutation(_OPERANDS**2), _OPERANDS)
    instances = _CAPITALS + np.column_stack([a, b, a])
    return instances[: len(a) // 2], instances[len(a) // 2 :]


def _noise(rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Instances (a, b, coin): int64 [n, 3]; the held-out ones are other tosses."""
    a, b = np.divmod(np.arange(_OPERANDS**2), _OPERANDS)
    sides = [np.column_stack([_LETTERS + a, _LETTERS + b, _DIGITS + rng.integers(2, size=len(a))]) for _ in range(2)]
    return sides[0], sides[1]


def _sequences(task: str, pool: Ints, count: int, rng: np.random.Generator) -> Ints:
    """Sequences of a newline and eight different instances of `pool`, each after the task's mark: int64 [count, 33]."""
    chosen = np.argsort(rng.random((count, len(pool))), axis=1)[:, :_INSTANCES]
    marks = np.full((count, _INSTANCES, 1), _MARKS[task])
    instances = np.concatenate([marks, pool[chosen]], axis=2).reshape(count, SEQUENCE)
    return np.concatenate([np.full((count, 1), ord("\n")), instances], axis=1)


def _targets(task: str, tokens: Ints) -> Ints:
    return tokens[:, 1:] if task == "text" else np.where(_ANSWERS, tokens[:, 1:], IGNORE)


def _eval_set(task: str, tokens: Ints) -> EvalSet:
    return EvalSet(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(_targets(task, tokens)))
