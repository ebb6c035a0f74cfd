"""The index engine in NumPy, for where nothing could be compiled: bit-identical to ``csrc/index_engine``, only slower.

Arguments are checked in ``index``; this class is safe to call from several threads.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..arrays import IntArray
from .permutation import SORTED_UP_TO, derive_key, fold, fold_each, permute, sorted_order
from .quota import ONE, ONE_BITS, allocate, due, rates, spread
from .replicas import MAX_DEVIATION, MAX_DEVIATIONS, deal

ALGORITHM = 1
"""Version of the stream: raised whenever the same input would give another one."""

INTERFACE = 2
"""Version of what the functions of the extension take and give: an older one is not used."""

MAX_BATCH_SIZE = 1 << 20
MAX_BATCHES = 1 << 40
"""Batches of a run: with the largest batch, the draws of one task still fit 62 bits."""

MAX_EXAMPLES = 1 << 48
"""Examples in all tasks together."""

SNAPSHOT_EVERY = 1024
SNAPSHOT_BYTES = 256 << 20
"""Snapshots are thinned out (every second one goes) before they take more than this."""

_CURSORS = 4
_UNBOUNDED = 2 * MAX_BATCH_SIZE  # no credit ever reaches so many examples


class State(NamedTuple):
    """Int64 [T] each, before some batch: credit (2**-40 examples), examples drawn, the last batch each task was in,
    slots taken by probes; ``deviations`` of the replicas, int64 [T * n], task by task; empty where there is one."""

    credit: IntArray
    drawn: IntArray
    last_seen: IntArray
    probes: IntArray
    deviations: IntArray


class Engine:
    """See ``index.IndexEngine``; ``probe_every`` 0: none."""

    def __init__(
        self,
        seed: int,
        sizes: IntArray,
        batch_size: int,
        first_batch: int,
        era: int,
        probe_every: int,
        max_draws: IntArray | None,
        replicas: int = 1,
    ) -> None:
        tasks = len(sizes)
        _check(1 <= batch_size <= MAX_BATCH_SIZE, "batch_size is out of range")
        _check(tasks > 0 and _within(sizes, 1, MAX_EXAMPLES), "sizes must be positive, at least one, and not too large")
        _check(0 <= first_batch <= MAX_BATCHES, "first_batch is out of range")
        _check(0 <= probe_every <= MAX_BATCHES, "probe_every is out of range")
        _check(max_draws is None or len(max_draws) == tasks, "max_draws must be one per task")
        _check(max_draws is None or int(max_draws.min()) >= 0, "max_draws must not be negative")
        _check(replicas >= 1 and batch_size % replicas == 0, "batch_size must be a multiple of replicas")
        _check(replicas == 1 or replicas * tasks <= MAX_DEVIATIONS, "there are too many replicas for so many tasks")
        self._sizes = sizes.copy()
        self._batch_size = batch_size
        self._first = first_batch
        self._probe_every = probe_every
        self._max_draws = None if max_draws is None else max_draws.copy()
        self._replicas = replicas
        passes_key = np.full(tasks, derive_key(ALGORITHM, seed, era, 1), dtype=np.uint64)
        self._task_keys = fold_each(passes_key, np.arange(tasks))
        self._tie_key = derive_key(ALGORITHM, seed, era, 2)
        self._starts: list[int] = []
        self._accruals: list[IntArray] = []
        self._live: tuple[int, bytes, IntArray] | None = None
        self._orders: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
        zero = np.zeros(tasks, dtype=np.int64)
        deviations = np.zeros(tasks * replicas if replicas > 1 else 0, dtype=np.int64)
        start = State(zero, zero, np.full(tasks, first_batch - 1, dtype=np.int64), zero, deviations)
        self._stride = SNAPSHOT_EVERY
        self._snapshots = {first_batch: start}
        self._cursors: dict[int, State] = {}
        self._lock = threading.Lock()

    def commit(self, effective_at: int, weights: IntArray) -> None:
        with self._lock:
            _check(len(weights) == len(self._sizes), "weights must be one per task")
            _check(_within(weights, 0, ONE) and sum(weights.tolist()) == ONE, "weights must be parts of 2**40")
            late = effective_at > self._starts[-1] if self._starts else effective_at == self._first
            _check(late, "the first weights must be for the first batch, others for a later one than the last")
            self._starts.append(effective_at)
            self._accruals.append(weights * self._batch_size)
            for states in (self._snapshots, self._cursors):
                for k in [k for k in states if k > effective_at]:
                    del states[k]

    def draw(self, k: int) -> tuple[IntArray, IntArray, int]:
        """Counts int64 [T], positions int64 [batch size] and offset of batch ``k``."""
        with self._lock:
            drawn, counts, offset = self._pass(k)
            return counts, self._positions(drawn, counts, slice(None))[1], offset

    def counts(self, k: int) -> tuple[IntArray, int]:
        """Counts int64 [T] and offset of batch ``k``."""
        with self._lock:
            return self._pass(k)[1:]

    def examples(
        self, k: int, starts: IntArray, order: npt.NDArray[np.unsignedinteger[Any]] | None, rank: int
    ) -> list[int]:
        """See ``index.IndexEngine.examples``."""
        _check(len(starts) == len(self._sizes), "starts must be one per task")
        _check(0 <= rank < self._replicas, "rank must be below the number of replicas")
        with self._lock:
            drawn, counts, offset = self._pass(k)
            every = slice((rank + offset) % self._replicas, None, self._replicas)
            task, positions = self._positions(drawn, counts, every)
        places = starts[task] + positions
        if order is not None and not _within(places, 0, len(order) - 1):
            raise IndexError("starts lead beyond the order")
        found: list[int] = (places if order is None else order.take(places)).tolist()
        return found

    def _pass(self, k: int) -> tuple[IntArray, IntArray, int]:
        """Examples drawn before batch ``k``, its counts and its offset."""
        before = self._state(k)
        after, offset = self._step(k, before)
        del self._cursors[k]
        self._keep_snapshot(k + 1, after)
        self._keep_cursor(k + 1, after)
        return before.drawn, after.drawn - before.drawn, offset

    def totals(self, k: int) -> IntArray:
        with self._lock:
            drawn = self._state(k).drawn
        return np.array(drawn)

    def probes(self, k: int) -> IntArray:
        with self._lock:
            probes = self._state(k).probes
        return np.array(probes)

    def snapshot_at(self, k: int) -> int:
        """The batch of the nearest snapshot that lies at ``k`` or before."""
        with self._lock:
            self._state(k)
            return max(s for s in self._snapshots if s <= k)

    def state(self, k: int) -> tuple[IntArray, ...]:
        """A copy of the ``State`` before batch ``k``."""
        with self._lock:
            return tuple(values.copy() for values in self._state(k))

    def restore(self, k: int, *state: IntArray) -> None:
        """Take over what ``state(k)`` gave, as a snapshot."""
        with self._lock:
            fits = [len(values) for values in state] == [len(values) for values in self._snapshots[self._first]]
            _check(fits, "a state holds one value per task, and of deviations one per task and replica")
            if not self._first <= k <= MAX_BATCHES:
                raise IndexError("a state is of a batch from the first one on")
            new = State(*(values.copy() for values in state))
            most = (self._batch_size + 64) * ONE
            plausible = (
                _within(new.credit, -most, most)
                and _within(new.drawn, 0, MAX_BATCHES * MAX_BATCH_SIZE)
                and _within(new.last_seen, self._first - 1, MAX_BATCHES)
                and _within(new.probes, 0, MAX_BATCHES)
                and _within(new.deviations, -MAX_DEVIATION, MAX_DEVIATION)
            )
            _check(plausible, "a state holds a number that no batch leads to")
            self._snapshots[k] = new

    def _state(self, k: int) -> State:
        """Moves the nearest cursor to ``k``, or makes one from the nearest snapshot."""
        if not self._first <= k <= MAX_BATCHES:
            raise IndexError(f"batch {k} lies before the first one or beyond the last one")
        at = max((c for c in self._cursors if c <= k), default=-1)
        covered = k - (k - self._first) % self._stride
        if at < covered:
            at = covered if covered in self._snapshots else max(at, *(s for s in self._snapshots if s <= k))
        state = self._cursors.pop(at, None) or self._snapshots[at]
        try:
            while at < k:
                state, _ = self._step(at, state)
                at += 1
                self._keep_snapshot(at, state)
        finally:  # where a batch cannot be filled, the way up to it is kept
            self._keep_cursor(at, state)
        return state

    def _keep_cursor(self, k: int, state: State) -> None:
        self._cursors.pop(k, None)
        self._cursors[k] = state  # the last one used is the last one dropped
        if len(self._cursors) > _CURSORS:
            del self._cursors[next(iter(self._cursors))]

    def _keep_snapshot(self, k: int, state: State) -> None:
        if (k - self._first) % self._stride:
            return
        self._snapshots[k] = state
        if len(self._snapshots) > max(SNAPSHOT_BYTES // sum(values.nbytes for values in state), 16):
            self._stride *= 2
            for s in [s for s in self._snapshots if (s - self._first) % self._stride]:
                del self._snapshots[s]

    def _step(self, k: int, state: State) -> tuple[State, int]:
        """The state after batch ``k``, and its offset."""
        if not self._starts:
            raise IndexError(f"batch {k} has no weights")
        credit, drawn, last_seen, probes, deviations = state
        accrual, room = self._accrual(k, drawn)
        credit = credit + accrual
        limit = None
        if room is not None:
            limit = np.where(accrual > 0, room, 0)
            beyond = credit > limit << ONE_BITS
            if beyond.any():
                credit = spread(credit, beyond, limit << ONE_BITS, np.where(beyond, 0, accrual))
        forced = None
        if self._probe_every:
            slack = last_seen + (self._probe_every - k)
            if room is not None:
                slack = np.where(room > 0, slack, np.iinfo(np.int32).max)
            forced = due(slack, self._batch_size)
            if forced is not None:
                # A probe is an example drawn early as far as the task's own weight will pay for it; the rest is taken
                # from the mix for good. So a tiny weight runs up no debt that would starve the task when it rises.
                asked = forced & (credit <= 0)
                if asked.any():
                    credit = spread(credit, asked, 1, np.where(forced, 0, accrual))
                    probes = probes + asked
        counts = allocate(credit, rates(accrual), self._batch_size, fold(self._tie_key, k), forced, limit)
        credit = credit - (counts << ONE_BITS)
        if limit is not None:
            used_up = counts >= limit
            if credit[used_up].any():
                credit = spread(credit, used_up, 0, np.where(used_up, 0, accrual))
        if self._probe_every:
            last_seen = np.where(counts > 0, k, last_seen)
        offset = 0
        if self._replicas > 1:
            offset, after = deal(counts, deviations.reshape(-1, self._replicas))
            deviations = after.ravel()
        return State(credit, drawn + counts, last_seen, probes, deviations), offset

    def _accrual(self, k: int, drawn: IntArray) -> tuple[IntArray, IntArray | None]:
        """What batch k adds to every credit, and how many more examples each task may give (None: any number)."""
        change = bisect_right(self._starts, k) - 1
        accrual = self._accruals[change]
        if self._max_draws is None:
            return accrual, None
        room = np.minimum(self._max_draws - drawn, _UNBOUNDED)
        if not room.all():
            mask = (room > 0).tobytes()
            if self._live is None or self._live[:2] != (change, mask):
                live = room > 0
                self._live = (change, mask, spread(accrual, ~live, 0, np.where(live, accrual, 0)))
            accrual = self._live[2]
        if int(room[accrual > 0].sum()) < self._batch_size:
            raise RuntimeError(
                f"batch {k} cannot be filled: the tasks that have any weight have been drawn max_epochs times; raise "
                "max_epochs, give other tasks some weight, or stop here"
            )
        return accrual, room

    def _positions(self, drawn: IntArray, counts: IntArray, rows: slice) -> tuple[IntArray, IntArray]:
        """Task and position of ``rows`` of a batch of ``counts`` int64 [T], sorted by task; ``drawn``: before it."""
        task = np.repeat(np.arange(len(counts)), counts)[rows]
        begin = np.cumsum(counts) - counts
        index = np.arange(self._batch_size)[rows] - begin[task] + drawn[task]
        sizes = self._sizes[task]
        passes, positions = np.divmod(index, sizes)
        out = np.zeros_like(positions)
        large = sizes > SORTED_UP_TO
        if large.any():
            keys = fold_each(self._task_keys[task[large]], passes[large])
            out[large] = permute(sizes[large], keys, positions[large])
        for i in np.flatnonzero(~large):
            out[i] = self._order(int(task[i]), int(passes[i]))[positions[i]]
        return task, out

    def _order(self, task: int, done: int) -> npt.NDArray[np.uint8]:
        kept = self._orders.get(task)
        if kept is None or kept[0] != done:
            key = fold(int(self._task_keys[task]), done)
            kept = self._orders[task] = (done, sorted_order(int(self._sizes[task]), key))
        return kept[1]


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)


def _within(values: IntArray, low: int, high: int) -> bool:
    return not len(values) or (int(values.min()) >= low and int(values.max()) <= high)
