"""What a sampler is built with: checked once, fixed for its life, compared when a state is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .adapted import AdaptedPolicy
from .arrays import BoolArray, FloatArray, IntArray, ReadOnlyArrays, frozen_flags, frozen_floats, frozen_ints
from .data.shares import TaskShares
from .data.task_index import TaskIndex
from .engine.index_numpy import ALGORITHM, MAX_BATCHES
from .guards import Guards
from .inputs import count_of, known, per_task
from .options import GUARDS, Options

DELAY = 64
"""Batches between a report and its effect where neither the user nor a short run says otherwise: more than loaders
usually draw ahead."""


@dataclass(frozen=True)
class Settings(ReadOnlyArrays):
    """Arrays are [T], read-only: ``sizes`` and ``max_draws`` int64, ``natural`` and ``importance`` float64,
    ``critical`` bool. ``sharded``: whether the user said how many replicas there are; ``fresh``: no size is known,
    every example is a new one; then ``sizes`` holds ones."""

    seed: int
    global_batch_size: int
    num_replicas: int
    rank: int
    sharded: bool
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
    def build(cls, index: TaskIndex | TaskShares, policy: AdaptedPolicy, options: Options) -> Settings:
        """Check ``options``, but for those that the data are told by; guards not given are the policy's
        ``guard_defaults``, else off. Raises TypeError or ValueError."""
        replicas, rank = _part(options.num_replicas, options.rank)
        if options.resume not in ("seek", "replay"):
            raise ValueError(f"resume must be 'seek' or 'replay', got {options.resume!r}")
        options = _with_defaults(options, policy)
        tasks, fresh = index.tasks, isinstance(index, TaskShares)
        sizes = np.ones(len(tasks), dtype=np.int64) if isinstance(index, TaskShares) else index.sizes
        natural = index.natural if isinstance(index, TaskShares) else frozen_floats(sizes / int(sizes.sum()))
        batch_size = count_of("batch_size", options.batch_size, 1) * replicas
        length = _length(options, sizes, batch_size, fresh)
        horizon = None if options.horizon is None else count_of("horizon", options.horizon, 1)
        importance = _importance(options.importance, tasks)
        probe_every = _probe_every(options.probe_every, batch_size, len(tasks))
        seed = count_of("seed", options.seed, 0)
        update_every = _batches("update_every", options.update_every, 1)
        delay = _delay(options.delay, horizon)
        critical = _marked("critical", options.critical, tasks)
        guards = Guards(
            natural,
            _number("budget", options.budget),
            frozen_floats(per_task("min_weight", options.min_weight, tasks, 0.0)),
            frozen_floats(per_task("max_weight", options.max_weight, tasks, 1.0)),
            _number("max_change", options.max_change),
            _marked("pinned", options.pinned, tasks),
        )
        max_epochs = _number("max_epochs", options.max_epochs)
        return cls(
            seed=seed,
            global_batch_size=batch_size,
            num_replicas=replicas,
            rank=rank,
            sharded=options.num_replicas is not None,
            length=length,
            update_every=update_every,
            delay=delay,
            horizon=horizon,
            resume=options.resume,
            sizes=frozen_ints(sizes),
            data=index.digest,
            fresh=fresh,
            natural=natural,
            importance=importance,
            critical=critical,
            guards=guards,
            probe_every=probe_every,
            max_epochs=max_epochs,
            max_draws=_max_draws(max_epochs, sizes, length, batch_size),
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


def _part(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Ranks that the global batch is spread over, and which of them this one is."""
    if num_replicas is None and rank is None:
        return 1, 0
    if num_replicas is None or rank is None:
        raise TypeError("pass num_replicas and rank together, as to a DistributedSampler, or neither")
    replicas, own = count_of("num_replicas", num_replicas, 1), count_of("rank", rank, 0)
    if own >= replicas:
        raise ValueError(f"rank must be below num_replicas, {replicas}, got {own}")
    return replicas, own


def _with_defaults(options: Options, policy: AdaptedPolicy) -> Options:
    """``options`` with the policy's guards where the user gave none."""
    defaults = policy.guard_defaults
    unknown = sorted(set(defaults) - set(GUARDS))
    if unknown:
        raise ValueError(f"{policy.kind}.guard_defaults names {unknown}; guards are {sorted(GUARDS)}")
    missing: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing)


def _length(options: Options, sizes: IntArray, batch_size: int, fresh: bool) -> int:
    """Batches in an epoch."""
    if fresh and options.num_batches is None:
        raise ValueError("with shares an epoch has no length of its own: pass num_batches=, batches in an epoch")
    if fresh and options.max_epochs is not None:
        raise ValueError(
            "max_epochs counts passes over a task's examples, whose number is not known with shares: leave it out"
        )
    if options.num_batches is None:
        return -(-int(sizes.sum()) // batch_size)
    return _batches("num_batches", options.num_batches, 1)


def _delay(delay: int | None, horizon: int | None) -> int:
    if delay is not None:
        return _batches("delay", delay, 0)
    return DELAY if horizon is None else min(DELAY, max(8, horizon // 16))


def _importance(given: Any, tasks: Sequence[str]) -> FloatArray:
    importance = frozen_floats(per_task("importance", given, tasks, 1.0))
    if not (importance > 0).all():
        raise ValueError(
            f"importance must be positive, got {importance.tolist()}: 1 is an ordinary task; for one that no policy "
            "may raise there is pinned"
        )
    return importance


def _probe_every(given: int | None, batch_size: int, tasks: int) -> int | None:
    """Probes may take half of the batches at most: beyond that the mix is theirs rather than the policy's."""
    if given is None:
        return None
    probe_every = count_of("probe_every", given, 1)
    if 2 * tasks > probe_every * batch_size:
        least = -(-2 * tasks // batch_size)
        raise ValueError(
            f"probe_every={probe_every} is too small: one example of each of {tasks} tasks would take more than half "
            f"of {probe_every} batches of {batch_size}; pass probe_every={least} or more, or larger batches"
        )
    return probe_every


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
