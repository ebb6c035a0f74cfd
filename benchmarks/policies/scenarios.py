"""Random scenarios that policies are compared on, family by family.

A family is a function that draws a ``Scenario`` from a random generator; what it returns is checked when it is made, so
writing one more is a function and its name in ``FAMILIES``. ``scenario(family, seed)`` draws one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
World = Callable[[np.random.Generator, int], tuple[Floats, Floats]]
"""(generator, n) -> x [n, inputs] and y [T, n], the label that each task gives to each of the n rows: a class from 0,
or a number for regression. What defines the tasks (their bits, their label maps) is drawn from the generator too."""


@dataclass(frozen=True)
class Scenario:
    """What to learn, from what, and with what; T tasks, those below a share of 1 / T are rare.

    - ``natural`` [T]: the natural mix. ``noise`` bool [T]: tasks whose label is drawn anew at every showing; rare ones.
    - ``world``: the data. ``classes``: outputs of the network; 1 for regression.
    - ``rows``: examples of the whole data set, shown again and again; None where every example is a fresh one.
    - ``budget``, ``steps``, ``batch``: of the run. ``width``, ``adam``, ``rate``: hidden layer, Adam or SGD, learning
      rate. ``scale``: of the task code in the input.
    - ``start_gain``: factor on the output layer's first weights; above 1 the losses begin inflated.
    """

    natural: Floats
    noise: Flags
    world: World
    classes: int
    budget: float
    steps: int
    batch: int
    width: int
    adam: bool
    rate: float
    rows: int | None = None
    scale: float = 1.0
    start_gain: float = 1.0
    family: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.natural.shape != self.noise.shape or self.natural.ndim != 1 or not np.isclose(self.natural.sum(), 1):
            raise ValueError("natural must hold one share per task and sum to 1, noise one flag per task")
        if not (self.rare & ~self.noise).any() or (self.noise & ~self.rare).any():
            raise ValueError("noise tasks must be rare ones, and some rare task must be none")

    @property
    def rare(self) -> Flags:
        """Tasks below an equal share, bool [T]."""
        return np.asarray(self.natural < 1.0 / len(self.natural))

    @property
    def regression(self) -> bool:
        return self.classes == 1


def scenario(family: str, seed: int) -> Scenario:
    """The scenario number ``seed`` of a family."""
    rng = np.random.default_rng((zlib.crc32(family.encode()), seed))
    return replace(FAMILIES[family](rng), family=family, seed=seed)


# -- what families have in common --------------------------------------------------------------------------------------


def _log(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _usual(
    rng: np.random.Generator, world: World, classes: int, tasks: int, frequent: int, thin: float = 1.0, **fixed: Any
) -> Scenario:
    """6 to 32 tasks of which the first ``frequent`` are frequent and the last up to 30 % of the rare ones noise; a
    budget of 3 to 30 %, SGD or Adam. ``thin``: factor on the rare tasks' shares; ``fixed``: what the family says."""
    rare = tasks - frequent
    noise = round(rng.uniform(0, 0.3) * rare) if rng.random() < 0.75 else 0
    shares = np.exp(rng.normal(0, rng.uniform(0, 0.6), rare))
    shares = thin * np.minimum(shares / shares.sum() * rng.uniform(0.04, 0.25), 0.8 / tasks)
    natural = np.concatenate([np.full(frequent, (1 - shares.sum()) / frequent), shares])
    adam = bool(rng.random() < 0.7)
    drawn: dict[str, Any] = {
        "budget": _log(rng, 0.03, 0.30),
        "steps": int(rng.choice([2000, 3000, 4000])),
        "batch": int(rng.choice([64, 96, 128, 192])),
        "width": int(rng.choice([32, 48, 64])),
        "adam": adam,
        "rate": _log(rng, 1e-3, 5e-3) if adam else _log(rng, 0.02, 0.2),
        "scale": float(rng.choice([1.0, 3.0])),
    }
    return Scenario(natural, np.arange(tasks) >= tasks - noise, world, classes, **{**drawn, **fixed})


def _tasks(rng: np.random.Generator) -> tuple[int, int]:
    """How many tasks, and how many of them frequent."""
    tasks = int(_log(rng, 6, 33))
    return tasks, max(1, min(int(rng.integers(1, 6)), tasks - 4))


def _parities(bits: int, ks: list[int]) -> World:
    """The label is the parity of k of the bits, each task's own ones."""

    def world(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        x = rng.integers(0, 2, (n, bits)) * 2.0 - 1.0
        chosen = [rng.choice(bits, k, replace=False) for k in ks]
        return x, np.array([x[:, c].prod(1) * rng.choice([-1, 1]) > 0 for c in chosen], dtype=np.float64)

    return world


def _label_maps(inputs: int, classes: int, per_class: int, spread: float, tasks: int, size: float = 1.0) -> World:
    """Clusters that all tasks share; each task has a map of its own from cluster to class."""

    def world(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        centres = rng.normal(size=(classes * per_class, inputs)) * size
        of = rng.integers(0, len(centres), n)
        x = centres[of] + rng.normal(size=(n, inputs)) * spread
        return x, np.array([rng.permutation(classes)[of % classes] for _ in range(tasks)], dtype=np.float64)

    return world


# -- the families ------------------------------------------------------------------------------------------------------


def parity(rng: np.random.Generator) -> Scenario:
    """Sparse parities of one to three bits, mostly two: learned one after the other."""
    tasks, frequent = _tasks(rng)
    ks = [2] * frequent + rng.choice([1, 2, 3], tasks - frequent, p=[0.25, 0.6, 0.15]).tolist()
    return _usual(
        rng, _parities(int(rng.integers(10, 17)), ks), 2, tasks, frequent, adam=True, rate=_log(rng, 1e-3, 3e-3),
        steps=int(rng.choice([3000, 4000, 6000])), budget=float(rng.uniform(0.08, 0.3)),
    )  # fmt: skip


def plateau(rng: np.random.Generator) -> Scenario:
    """Mostly parities of three bits: long without progress, then learned at once."""
    tasks, frequent = _tasks(rng)
    ks = [1] * frequent + rng.choice([1, 2, 3], tasks - frequent, p=[0.2, 0.2, 0.6]).tolist()
    return _usual(
        rng, _parities(int(rng.integers(8, 12)), ks), 2, tasks, frequent, adam=True, rate=_log(rng, 1e-3, 4e-3),
        width=64, steps=int(rng.choice([4000, 6000])), budget=float(rng.uniform(0.08, 0.3)),
    )  # fmt: skip


def fresh(rng: np.random.Generator) -> Scenario:
    """Conflicting label maps, every example a fresh one."""
    tasks, frequent = _tasks(rng)
    classes, inputs = int(rng.integers(5, 11)), int(rng.integers(10, 21))
    adam = bool(rng.random() < 0.7)
    return _usual(
        rng, _label_maps(inputs, classes, 2, 0.9, tasks), classes, tasks, frequent, thin=rng.uniform(0.25, 0.6),
        adam=adam, rate=_log(rng, 2e-3, 6e-3) if adam else _log(rng, 0.05, 0.3), width=int(rng.choice([24, 32, 48])),
        steps=int(rng.choice([2000, 3000])),
    )  # fmt: skip


def few(rng: np.random.Generator) -> Scenario:
    """As ``fresh``, but from 40 to 250 examples of a rare task, repeated."""
    drawn = fresh(rng)
    return replace(drawn, rows=int(_log(rng, 40, 250) / drawn.natural[drawn.rare].mean()))


def memo(rng: np.random.Generator) -> Scenario:
    """Rows that are memorised: few, of many inputs, repeated, while held-out accuracy goes on rising."""
    tasks, frequent = int(rng.integers(8, 18)), int(rng.integers(2, 5))
    rare = tasks - frequent
    noise = int(rng.integers(1, max(2, rare // 4 + 1)))
    shares = np.full(rare, rng.uniform(0.006, 0.015))
    natural = np.concatenate([np.full(frequent, (1 - shares.sum()) / frequent), shares])
    classes, inputs = int(rng.integers(6, 11)), int(rng.integers(24, 49))
    return Scenario(
        natural, np.arange(tasks) >= tasks - noise, _label_maps(inputs, classes, 2, 0.63, tasks, size=0.56), classes,
        budget=float(rng.uniform(0.08, 0.25)), steps=3000, batch=128, width=int(rng.choice([48, 64])), adam=True,
        rate=float(rng.uniform(1e-3, 3e-3)), rows=int(rng.uniform(40, 150) / shares[0]), scale=3.0,
    )  # fmt: skip


def regress(rng: np.random.Generator) -> Scenario:
    """Regression on teachers that pull against each other, half of them nonlinear; labels are noisy."""
    tasks, frequent = _tasks(rng)
    inputs, adam, spread = int(rng.integers(10, 21)), bool(rng.random() < 0.7), float(rng.uniform(0.05, 0.6))

    def world(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        x, shared, sign = rng.normal(size=(n, inputs)), rng.normal(size=inputs), rng.choice([-1, 1], tasks)
        y = np.zeros((tasks, n))
        for t in range(tasks):
            w = 0.5 * sign[t] * shared + rng.normal(size=inputs)
            u = x @ (w / np.linalg.norm(w))
            u = u if t % 2 else np.sin(1.5 * u)
            y[t] = u / u.std() + spread * rng.normal(size=n)
        return x, y

    return _usual(
        rng, world, 1, tasks, frequent, thin=rng.uniform(0.25, 0.6), adam=adam,
        rate=_log(rng, 2e-3, 6e-3) if adam else _log(rng, 0.02, 0.12), width=int(rng.choice([24, 32, 48])),
        steps=int(rng.choice([2000, 3000])),
    )  # fmt: skip


def easy(rng: np.random.Generator) -> Scenario:
    """Wide enough, long enough: everything is learned early, whatever the split."""
    tasks = int(rng.integers(6, 13))
    frequent = int(rng.integers(1, min(6, tasks - 3)))
    drawn = _usual(
        rng, _label_maps(int(rng.integers(10, 21)), 3, 1, 0.6, tasks), 3, tasks, frequent, adam=True, rate=3e-3,
        width=128, steps=4000,
    )  # fmt: skip
    shares = np.full(tasks - frequent, min(0.8 / tasks, rng.uniform(0.015, 0.05)))
    natural = np.concatenate([np.full(frequent, (1 - shares.sum()) / frequent), shares])
    return replace(drawn, natural=natural, noise=drawn.noise & (rng.random() < 0.4))


def zipf(rng: np.random.Generator) -> Scenario:
    """Shares by Zipf's law, tasks are related teachers; sometimes some 100 rows of a rare task, repeated."""
    tasks, _ = _tasks(rng)
    natural = (np.arange(tasks) + 1.0) ** -rng.uniform(0.8, 1.6)
    natural /= natural.sum()
    classes, inputs = int(rng.integers(3, 6)), int(rng.integers(10, 21))

    def world(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        x, shared = rng.normal(size=(n, inputs)), rng.normal(size=(inputs, 24))
        y = np.zeros((tasks, n))
        for t in range(tasks):
            hidden = (0.6 * shared + 0.8 * rng.normal(size=(inputs, 24))) / inputs**0.5
            out = np.maximum(x @ hidden, 0) @ rng.normal(size=(24, classes))
            y[t] = (out - out.mean(0)).argmax(1)
        return x, y

    drawn = _usual(rng, world, classes, tasks, 1, width=64)
    rare = np.flatnonzero(natural < 1 / tasks)
    noise = np.zeros(tasks, dtype=bool)
    noise[rng.choice(rare, min(int(drawn.noise.sum()), len(rare) - 2), replace=False)] = True
    rows = int(100 / natural[rare].mean()) if rng.random() < 1 / 3 else None
    return replace(drawn, natural=natural, noise=noise, rows=rows)


def inflated(rng: np.random.Generator) -> Scenario:
    """Label maps or parities whose losses begin far too high: their fall at the start is no learning."""
    drawn = fresh(rng) if rng.random() < 0.6 else parity(rng)
    return replace(drawn, start_gain=float(rng.uniform(3, 8)))


def ladder(rng: np.random.Generator) -> Scenario:
    """Ladders of tasks: each rung bends the score of the rung below by one more direction, and its label is the
    quantile that score falls in, read up or down; frequent tasks are low rungs, rare ones any, so that learning one
    helps the next or, read the other way, stands against it. Half the tasks have 10 to 30 % of their labels wrong."""
    tasks, frequent = _tasks(rng)
    inputs, classes, top = int(rng.integers(8, 13)), int(rng.integers(2, 6)), int(rng.integers(2, 4))
    ladders, wrong = int(rng.integers(1, max(2, tasks // 4) + 1)), float(rng.uniform(0.1, 0.3))
    rung = np.concatenate([rng.integers(1, 3, frequent), 1 + np.arange(tasks - frequent) % top])
    rung[frequent:] = rng.permutation(rung[frequent:])
    adam = bool(rng.random() < 0.7)

    def world(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        x, y = rng.normal(size=(n, inputs)), np.zeros((tasks, n))
        axes = [np.linalg.qr(rng.normal(size=(inputs, top)))[0] for _ in range(ladders)]
        for t in range(tasks):
            along = x @ axes[rng.integers(ladders)]
            score = along[:, 0].copy()
            for r in range(1, rung[t]):
                score += along[:, r - 1] * along[:, r]
            place = (score * rng.choice([-1, 1])).argsort().argsort() * classes // n
            slip = rng.random(n) < (wrong if t % 2 else 0.0)
            y[t] = (place + slip * rng.integers(1, classes, n)) % classes
        return x, y

    return _usual(
        rng, world, classes, tasks, frequent, thin=rng.uniform(0.05, 0.2), adam=adam,
        rate=_log(rng, 2e-3, 6e-3) if adam else _log(rng, 0.1, 0.4), width=int(rng.choice([48, 64])),
        steps=int(rng.choice([3000, 4000, 6000])), budget=float(rng.uniform(0.05, 0.3)),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[np.random.Generator], Scenario]] = {
    "parity": parity,
    "plateau": plateau,
    "fresh": fresh,
    "few": few,
    "memo": memo,
    "regress": regress,
    "easy": easy,
    "zipf": zipf,
    "inflated": inflated,
    "ladder": ladder,
}
