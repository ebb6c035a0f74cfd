"""The index engine: batch k as a pure function of seed, sizes, batch size, engine guards, weights and k.

Integers in, integers out, no torch. ``csrc/index_engine`` computes it in C++, ``index_numpy`` in NumPy, bit for bit the
same; ``native`` says which one is in force. State is derived: a snapshot of it, O(T), is kept every 1,024 batches, and
going to any batch replays the quotas (not the permutations) from the nearest one. A saved snapshot only spares a
resumed run the replay from the start; ``check`` proves it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..arrays import IntArray
from . import native
from .index_numpy import ALGORITHM, MAX_BATCH_SIZE, MAX_BATCHES, MAX_EXAMPLES, State
from .quota import ONE
from .replicas import MAX_DEVIATION, MAX_DEVIATIONS

MAX_TASKS = 1 << 20

_MASK = (1 << 64) - 1


class Draw(NamedTuple):
    """One batch, sorted by task: ``counts`` int64 [T]; ``positions`` int64 [batch size], each in range(size of its
    task), the first counts[0] of them belonging to task 0 and so on. Replica r of n gets the rows
    ``(r + offset) % n :: n``."""

    counts: IntArray
    positions: IntArray
    offset: int


class IndexEngine:
    """Draws batches ``first_batch, first_batch + 1, ...``; nothing has been drawn of any task before.

    ``sizes`` int64 [T], all positive; ``probe_every``: no task stays unseen for more than this many batches;
    ``max_draws`` int64 [T]: most examples ever drawn of each task; ``era`` enters the keys of the permutations.
    ``num_replicas``: the rows of each batch are dealt out to so many, see ``replicas``; ``batch_size`` counts the rows
    of all of them. The batches are the same for any number.
    ``commit`` must have given weights for ``first_batch`` before the first draw. Safe to call from several threads;
    the C++ engine lets go of the interpreter's lock while it computes.
    """

    def __init__(
        self,
        seed: int,
        sizes: IntArray,
        batch_size: int,
        *,
        first_batch: int = 0,
        era: int = 0,
        probe_every: int | None = None,
        max_draws: IntArray | None = None,
        num_replicas: int = 1,
    ) -> None:
        sizes = _integers("sizes", sizes, None)
        tasks = len(sizes)
        if not 1 <= tasks <= MAX_TASKS:
            raise ValueError(f"there must be between 1 and {MAX_TASKS} tasks, got {tasks}")
        if int(sizes.min()) < 1 or sizes.sum(dtype=np.float64) > MAX_EXAMPLES:
            raise ValueError(
                f"sizes must be positive and sum to at most 2**48, got {int(sizes.min())} to {int(sizes.max())}"
            )
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise ValueError(f"batch_size must be between 1 and {MAX_BATCH_SIZE}, got {batch_size}")
        if not 0 <= first_batch < MAX_BATCHES:
            raise ValueError(f"first_batch must be between 0 and 2**40 - 1, got {first_batch}")
        if probe_every is not None and not tasks <= probe_every * batch_size:
            least = -(-tasks // batch_size)
            raise ValueError(
                f"probe_every={probe_every} is too small: {tasks} tasks do not fit into {probe_every} batches of "
                f"{batch_size}; it must be at least {least}, and well above that to leave slots for the mix"
            )
        if max_draws is not None:
            max_draws = _integers("max_draws", max_draws, tasks)
            if int(max_draws.min()) < 0:
                raise ValueError(f"max_draws must not be negative, got {int(max_draws.min())}")
        if num_replicas < 1 or batch_size % num_replicas:
            raise ValueError(
                f"batch_size must be a multiple of num_replicas, got {batch_size} rows for {num_replicas} replicas"
            )
        if num_replicas > 1 and num_replicas * tasks > MAX_DEVIATIONS:
            raise ValueError(f"num_replicas x tasks must be at most 2**24, got {num_replicas} x {tasks}")
        self._tasks = tasks
        self._batch_size = batch_size
        self._first = first_batch
        self._arguments = (int(seed) & _MASK, sizes, int(batch_size), int(first_batch), int(era) & _MASK)
        self._guards = (min(int(probe_every or 0), MAX_BATCHES), max_draws)
        self._replicas = int(num_replicas)
        self._changes: list[tuple[int, IntArray]] = []
        self._core = native.engine_class()(*self._arguments, *self._guards, self._replicas)

    def commit(self, effective_at: int, weights: IntArray) -> None:
        """Weights int64 [T], summing to 2**40, for batches from ``effective_at`` on. Derived states after it go."""
        weights = _integers("weights", weights, self._tasks)
        if int(weights.min()) < 0 or int(weights.max()) > ONE or int(weights.sum()) != ONE:
            raise ValueError(f"weights must not be negative and must sum to 2**40, got a sum of {int(weights.sum())}")
        if self._changes and effective_at <= self._changes[-1][0]:
            raise ValueError(f"batch {effective_at} is not after the last change, at batch {self._changes[-1][0]}")
        if not self._changes and effective_at != self._first:
            raise ValueError(f"the first weights must be for batch {self._first}, got batch {effective_at}")
        self._changes.append((int(effective_at), weights.copy()))
        self._core.commit(int(effective_at), weights)

    def draw(self, k: int) -> Draw:
        """Batch ``k``. Raises RuntimeError when every task with any weight has been drawn ``max_draws`` times."""
        return Draw(*self._core.draw(self._reachable(k, drawing=True)))

    def counts(self, k: int) -> tuple[IntArray, int]:
        """Counts int64 [T] and offset of batch ``k``; computes no positions. Raises as ``draw`` does."""
        counts, offset = self._core.counts(self._reachable(k, drawing=True))
        return counts, offset

    def examples(self, k: int, starts: IntArray, order: npt.NDArray[Any] | None = None, rank: int = 0) -> list[int]:
        """The rows of batch ``k`` that replica ``rank`` gets, as indices of a data set: ``order[start of the row's task
        + position]``, or without ``order`` that sum itself.

        ``starts`` int64 [T]; ``order``: uint32 or uint64, [examples], contiguous. Raises as ``draw`` does, IndexError
        where a sum lies outside of ``order``, ValueError for a ``rank`` that is none.
        """
        if not 0 <= rank < self._replicas:
            raise ValueError(f"rank must be between 0 and {self._replicas - 1}, got {rank}")
        found: list[int] = self._core.examples(self._reachable(k, drawing=True), starts, order, rank)
        return found

    def totals(self, k: int) -> IntArray:
        """Examples of each task in the batches before ``k``, int64 [T]."""
        totals: IntArray = self._core.totals(self._reachable(k))
        return totals

    def probes(self, k: int) -> IntArray:
        """Slots that ``probe_every`` took for each task in the batches before ``k``, int64 [T]."""
        probes: IntArray = self._core.probes(self._reachable(k))
        return probes

    def snapshot(self, k: int) -> dict[str, Any]:
        """The nearest snapshot at batch ``k`` or before, JSON-able: integers, and a digest of them and of all that
        they follow from."""
        batch = self._core.snapshot_at(self._reachable(k))
        return self._to_dict(batch)

    def restore(self, snapshot: Mapping[str, Any]) -> bool:
        """Take over what ``snapshot`` gave, so that batches after it need no replay of those before.

        False, with nothing taken over, for a snapshot of the same stream that was taken with another ``num_replicas``:
        who got which rows is then found by replaying all batches. Raises ValueError where it was changed or belongs to
        another stream; ``check`` does not even trust its digest.
        """
        batch, replicas, arrays = self._from_dict(snapshot)
        if replicas != self._replicas:
            return False
        self._core.restore(batch, *arrays)
        return True

    def check(self, snapshot: Mapping[str, Any]) -> None:
        """Raises ValueError unless replaying all batches before it, on a fresh engine, gives this very snapshot."""
        batch, replicas, _ = self._from_dict(snapshot)
        fresh = _rebuild(self._arguments, self._guards, replicas, self._changes)
        if fresh._to_dict(batch) != dict(snapshot):
            raise ValueError(f"the snapshot of batch {batch} is not what replaying the batches before it gives")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._arguments, self._guards, self._replicas, self._changes)

    def _reachable(self, k: int, drawing: bool = False) -> int:
        if k < self._first:
            raise ValueError(f"batch {k} lies before batch {self._first}, where this data's ledger begins")
        if k > MAX_BATCHES:
            raise ValueError(f"batch {k} is beyond the limit of 2**40 batches")
        if not self._changes and k + drawing > self._first:
            raise RuntimeError(f"no weights are committed for batch {self._first} yet")
        return int(k)

    def _names(self, replicas: int) -> list[str]:
        names = ["credit", "drawn"]
        if self._guards[0]:
            names += ["last_seen", "probes"]
        if replicas > 1:
            names.append("deviations")
        return names

    def _to_dict(self, batch: int) -> dict[str, Any]:
        state = State(*self._core.state(batch))._asdict()
        arrays = {name: state[name] for name in self._names(self._replicas)}
        out: dict[str, Any] = {"batch": batch, **{name: values.tolist() for name, values in arrays.items()}}
        if self._replicas > 1:
            out["replicas"] = self._replicas
        return {**out, "digest": self._digest(batch, self._replicas, list(arrays.values()))}

    def _from_dict(self, snapshot: Mapping[str, Any]) -> tuple[int, int, State]:
        """Batch, number of replicas and state."""
        wrong = "the snapshot in the saved state was changed or belongs to another stream: {}; delete it to replay"
        replicas = snapshot.get("replicas", 1)
        if type(replicas) is not int or replicas < 1 or self._batch_size % replicas:
            raise ValueError(wrong.format(f"it is of {replicas!r} replicas, batch_size is {self._batch_size}"))
        names = self._names(replicas)
        if set(snapshot) != {"batch", "digest", *names, *(["replicas"] if replicas > 1 else [])}:
            raise ValueError(wrong.format(f"its keys are {sorted(snapshot)}"))
        batch = self._reachable(snapshot["batch"])
        arrays: dict[str, IntArray] = {}
        try:
            for name in names:
                length = self._tasks * (replicas if name == "deviations" else 1)
                arrays[name] = _integers(name, np.array(snapshot[name], dtype=np.int64), length)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(wrong.format(error)) from None
        if self._digest(batch, replicas, list(arrays.values())) != snapshot["digest"]:
            raise ValueError(wrong.format("its digest does not match"))
        arrays.setdefault("last_seen", np.full(self._tasks, self._first - 1, dtype=np.int64))
        arrays.setdefault("probes", np.zeros(self._tasks, dtype=np.int64))
        arrays.setdefault("deviations", np.empty(0, dtype=np.int64))
        state = State(**arrays)
        if not self._plausible(batch, replicas, state):
            raise ValueError(wrong.format("its counts do not add up"))
        return batch, replicas, state

    def _plausible(self, batch: int, replicas: int, state: State) -> bool:
        done = batch - self._first
        most = ONE * (self._batch_size + 1 + math.log(self._tasks))
        fine = (
            _within(state.credit, most)
            and int(state.credit.sum()) == 0
            and int(state.drawn.min()) >= 0
            and int(state.drawn.max()) <= done * self._batch_size
            and int(state.drawn.sum()) == done * self._batch_size
            and self._first - 1 <= int(state.last_seen.min())
            and int(state.last_seen.max()) < batch
            and int(state.probes.min()) >= 0
            and int(state.probes.max()) <= done
        )
        if fine and replicas > 1:
            # n times the rows of each task and replica: whole rows, none of them negative, and every replica has its
            # part of every batch.
            deviations = state.deviations.reshape(-1, replicas)
            rows = deviations + state.drawn[:, None]
            fine = (
                _within(deviations, MAX_DEVIATION)
                and int(rows.min()) >= 0
                and not (rows % replicas).any()
                and not deviations.sum(axis=0).any()
                and not deviations.sum(axis=1).any()
            )
        return fine

    def _digest(self, batch: int, replicas: int, arrays: list[IntArray]) -> str:
        seed, sizes, batch_size, first, era = self._arguments
        probe_every, max_draws = self._guards
        digest = hashlib.sha256(f"{ALGORITHM} {seed} {batch_size} {first} {era} {probe_every} {batch}".encode())
        if replicas > 1:
            digest.update(f" {replicas}".encode())
        for values in (sizes, np.empty(0, np.int64) if max_draws is None else max_draws, *arrays):
            digest.update(values.astype("<i8").tobytes())
        for effective_at, weights in self._changes:
            if effective_at < batch:
                digest.update(effective_at.to_bytes(8, "little") + weights.astype("<i8").tobytes())
        return digest.hexdigest()


def _within(values: IntArray, most: float) -> bool:
    return -most <= int(values.min()) and int(values.max()) <= most


def _rebuild(
    arguments: tuple[Any, ...], guards: tuple[Any, ...], replicas: int, changes: list[tuple[int, IntArray]]
) -> IndexEngine:
    # Everything else is derived from these.
    seed, sizes, batch_size, first_batch, era = arguments
    engine = IndexEngine(
        seed,
        sizes,
        batch_size,
        first_batch=first_batch,
        era=era,
        probe_every=guards[0] or None,
        max_draws=guards[1],
        num_replicas=replicas,
    )
    for effective_at, weights in changes:
        engine.commit(effective_at, weights)
    return engine


def _integers(name: str, values: IntArray, tasks: int | None) -> IntArray:
    if values.dtype != np.int64 or values.ndim != 1 or tasks not in (None, len(values)):
        want = "one per task" if tasks is None else f"shape ({tasks},)"
        raise ValueError(f"{name} must be int64, {want}, got {values.dtype} of shape {values.shape}")
    return np.ascontiguousarray(values)
