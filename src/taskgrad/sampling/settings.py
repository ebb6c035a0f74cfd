"""What a sampler is built with: checked once, fixed for its life, compared when a state is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .adapted import AdaptedPolicy
from .arrays import BoolArray, FloatArray, IntArray, ReadOnlyArrays, frozen_flags, frozen_floats, frozen_ints
from .data.shares import TaskShares
from .data.task_index import TaskIndex
from .engine.index_numpy import ALGORITHM, MAX_BATCHES
from .guards import Guards
from .inputs import count_of, known, per_task

DELAY = 64
"""Batches between a report and its effect where neither the user nor a short run says otherwise: more than loaders
usually draw ahead."""


@dataclass(frozen=True)
class Settings(ReadOnlyArrays):
    """Arrays are [T], read-only: ``sizes`` and ``max_draws`` int64, ``natural`` and ``importance`` float64,
    ``critical`` bool. ``fresh``: no size is known, every example is a new one; then ``sizes`` holds ones."""

    seed: int
    global_batch_size: int
    num_replicas: int
    length: int
    update_every: int
    delay: int
    horizon: int | None
    resume: str
    sizes: IntArray
    data: str
    fresh: bool
    natural: FloatArray
    importance: FloatArray
    critical: BoolArray
    guards: Guards
    probe_every: int | None
    max_epochs: float | None
    max_draws: IntArray | None

    @classmethod
    def build(
        cls,
        index: TaskIndex | TaskShares,
        policy: AdaptedPolicy,
        *,
        seed: int,
        batch_size: int,
        num_replicas: int,
        num_batches: int | None,
        update_every: int,
        delay: int | None,
        horizon: int | None,
        resume: str,
        importance: Any,
        critical: str | Collection[str],
        budget: float | None,
        probe_every: int | None,
        min_weight: Any,
        max_weight: Any,
        max_change: float | None,
        max_epochs: float | None,
        pinned: str | Collection[str],
    ) -> Settings:
        """Check the arguments of a sampler; guards not given are the policy's ``guard_defaults``, else off."""
        if resume not in ("seek", "replay"):
            raise ValueError(f"resume must be 'seek' or 'replay', got {resume!r}")
        tasks = index.tasks
        given = {
            "budget": budget,
            "probe_every": probe_every,
            "min_weight": min_weight,
            "max_weight": max_weight,
            "max_change": max_change,
            "max_epochs": max_epochs,
        }
        defaults = policy.guard_defaults
        unknown = sorted(set(defaults) - set(given))
        if unknown:
            raise ValueError(f"{policy.kind}.guard_defaults names {unknown}; guards are {sorted(given)}")
        wanted: dict[str, Any] = {name: defaults.get(name) if v is None else v for name, v in given.items()}

        fresh = isinstance(index, TaskShares)
        sizes = np.ones(len(tasks), dtype=np.int64) if isinstance(index, TaskShares) else index.sizes
        natural = index.natural if isinstance(index, TaskShares) else frozen_floats(sizes / int(sizes.sum()))
        batch_size = count_of("batch_size", batch_size, 1) * num_replicas
        if fresh and num_batches is None:
            raise ValueError("with shares an epoch has no length of its own: pass num_batches=, batches in an epoch")
        if fresh and wanted["max_epochs"] is not None:
            raise ValueError(
                "max_epochs counts passes over a task's examples, whose number is not known with shares: leave it out"
            )
        length = -(-int(sizes.sum()) // batch_size) if num_batches is None else _batches("num_batches", num_batches, 1)
        horizon = None if horizon is None else count_of("horizon", horizon, 1)
        if delay is None:
            delay = DELAY if horizon is None else min(DELAY, max(8, horizon // 16))
        weights_of_tasks = per_task("importance", importance, tasks, 1.0)
        if not (weights_of_tasks > 0).all():
            raise ValueError(
                f"importance must be positive, got {weights_of_tasks.tolist()}: 1 is an ordinary task; for one that no "
                "policy may raise there is pinned"
            )
        if wanted["probe_every"] is not None:
            _check_probes(count_of("probe_every", wanted["probe_every"], 1), batch_size, len(tasks))
        return cls(
            seed=count_of("seed", seed, 0),
            global_batch_size=batch_size,
            num_replicas=num_replicas,
            length=length,
            update_every=_batches("update_every", update_every, 1),
            delay=_batches("delay", delay, 0),
            horizon=horizon,
            resume=resume,
            sizes=frozen_ints(sizes),
            data=index.digest,
            fresh=fresh,
            natural=natural,
            importance=frozen_floats(weights_of_tasks),
            critical=_marked("critical", critical, tasks),
            guards=Guards(
                natural,
                _number("budget", wanted["budget"]),
                frozen_floats(per_task("min_weight", wanted["min_weight"], tasks, 0.0)),
                frozen_floats(per_task("max_weight", wanted["max_weight"], tasks, 1.0)),
                _number("max_change", wanted["max_change"]),
                _marked("pinned", pinned, tasks),
            ),
            probe_every=(None if wanted["probe_every"] is None else count_of("probe_every", wanted["probe_every"], 1)),
            max_epochs=_number("max_epochs", wanted["max_epochs"]),
            max_draws=_max_draws(_number("max_epochs", wanted["max_epochs"]), sizes, length, batch_size),
        )

    def to_dict(self) -> dict[str, Any]:
        """What a saved state must agree on: everything that the stream depends on, but for sizes, which the ledger
        holds: the global batch, whatever ranks it is spread over. Importance, critical tasks and horizon only speak to
        the policy, about what is still to come."""
        return {
            "algorithm": ALGORITHM,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "num_batches": self.length,
            "budget": self.guards.budget,
            "probe_every": self.probe_every,
            "min_weight": self.guards.min_weight.tolist(),
            "max_weight": self.guards.max_weight.tolist(),
            "max_change": self.guards.max_change,
            "max_epochs": self.max_epochs,
            "pinned": self.guards.pinned.tolist(),
        }


def _check_probes(probe_every: int, batch_size: int, tasks: int) -> None:
    """Probes may take half of the batches at most: beyond that the mix is theirs rather than the policy's."""
    if 2 * tasks > probe_every * batch_size:
        least = -(-2 * tasks // batch_size)
        raise ValueError(
            f"probe_every={probe_every} is too small: one example of each of {tasks} tasks would take more than half "
            f"of {probe_every} batches of {batch_size}; pass probe_every={least} or more, or larger batches"
        )


def _batches(name: str, value: Any, least: int) -> int:
    """A number of batches that a run can have."""
    number = count_of(name, value, least)
    if number > MAX_BATCHES:
        raise ValueError(f"{name} must be at most 2**40, which is more batches than any run has, got {number}")
    return number


def _marked(name: str, given: str | Collection[str], tasks: Sequence[str]) -> BoolArray:
    """Which tasks were named, bool [T], read-only."""
    named = set(known(name, [given] if isinstance(given, str) else given, tasks))
    return frozen_flags([task in named for task in tasks])


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _max_draws(max_epochs: float | None, sizes: IntArray, length: int, batch_size: int) -> IntArray | None:
    if max_epochs is None:
        return None
    if not 1 <= max_epochs < np.inf:
        raise ValueError(f"max_epochs must be a finite number of passes, at least 1, got {max_epochs}")
    draws = frozen_ints(np.floor(sizes * max_epochs))
    if int(draws.sum()) < length * batch_size:
        raise ValueError(
            f"max_epochs={max_epochs:g} allows {int(draws.sum())} draws, but one epoch of {length} batches of "
            f"{batch_size} takes {length * batch_size}: raise max_epochs, or pass a smaller num_batches"
        )
    return draws
