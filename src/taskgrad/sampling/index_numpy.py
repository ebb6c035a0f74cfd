"""The index engine in NumPy, for where nothing could be compiled: bit-identical to ``csrc/index_engine``, only slower.

Arguments are checked in ``index``; this class is safe to call from several threads.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import IntArray
from .permutation import SORTED_UP_TO, derive_key, fold, fold_each, permute, sorted_order
from .quota import ONE_BITS, allocate, due, rates, spread

ALGORITHM = 1
"""Version of the stream: raised whenever the same input would give another one."""

MAX_BATCH_SIZE = 1 << 20
SNAPSHOT_EVERY = 1024
SNAPSHOT_BYTES = 256 << 20
"""Snapshots are thinned out (every second one goes) before they take more than this."""

_CURSORS = 4
_UNBOUNDED = 2 * MAX_BATCH_SIZE  # no credit ever reaches so many examples


class State(NamedTuple):
    """Int64 [T] each, before some batch: credit (2**-40 examples), examples drawn, the last batch each task was in,
    slots taken by probes."""

    credit: IntArray
    drawn: IntArray
    last_seen: IntArray
    probes: IntArray


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
    ) -> None:
        tasks = len(sizes)
        self._sizes = sizes.copy()
        self._batch_size = batch_size
        self._first = first_batch
        self._probe_every = probe_every
        self._max_draws = None if max_draws is None else max_draws.copy()
        passes_key = np.full(tasks, derive_key(ALGORITHM, seed, era, 1), dtype=np.uint64)
        self._task_keys = fold_each(passes_key, np.arange(tasks))
        self._tie_key = derive_key(ALGORITHM, seed, era, 2)
        self._starts: list[int] = []
        self._accruals: list[IntArray] = []
        self._live: tuple[int, bytes, IntArray] | None = None
        self._orders: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
        zero = np.zeros(tasks, dtype=np.int64)
        start = State(zero, zero, np.full(tasks, first_batch - 1, dtype=np.int64), zero)
        self._stride = SNAPSHOT_EVERY
        self._snapshots = {first_batch: start}
        self._cursors: dict[int, State] = {}
        self._lock = threading.Lock()

    def commit(self, effective_at: int, weights: IntArray) -> None:
        with self._lock:
            self._starts.append(effective_at)
            self._accruals.append(weights * self._batch_size)
            for states in (self._snapshots, self._cursors):
                for k in [k for k in states if k > effective_at]:
                    del states[k]

    def draw(self, k: int) -> tuple[IntArray, IntArray]:
        with self._lock:
            before = self._state(k)
            after = self._step(k, before)
            del self._cursors[k]
            self._keep_snapshot(k + 1, after)
            self._keep_cursor(k + 1, after)
            counts = after.drawn - before.drawn
            return counts, self._positions(before.drawn, counts)

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

    def state(self, k: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Credit, drawn, last seen and probes before batch ``k``."""
        with self._lock:
            credit, drawn, last_seen, probes = self._state(k)
            return credit.copy(), drawn.copy(), last_seen.copy(), probes.copy()

    def restore(self, k: int, credit: IntArray, drawn: IntArray, last_seen: IntArray, probes: IntArray) -> None:
        """Take over what ``state(k)`` gave, as a snapshot."""
        with self._lock:
            self._snapshots[k] = State(credit.copy(), drawn.copy(), last_seen.copy(), probes.copy())

    def _state(self, k: int) -> State:
        """Moves the nearest cursor to ``k``, or makes one from the nearest snapshot."""
        at = max((c for c in self._cursors if c <= k), default=-1)
        covered = k - (k - self._first) % self._stride
        if at < covered:
            at = covered if covered in self._snapshots else max(at, *(s for s in self._snapshots if s <= k))
        state = self._cursors.pop(at, None) or self._snapshots[at]
        try:
            while at < k:
                state = self._step(at, state)
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
        if len(self._snapshots) > max(SNAPSHOT_BYTES // (32 * len(self._sizes)), 16):
            self._stride *= 2
            for s in [s for s in self._snapshots if (s - self._first) % self._stride]:
                del self._snapshots[s]

    def _step(self, k: int, state: State) -> State:
        credit, drawn, last_seen, probes = state
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
                # A probe is an example drawn early as far as the task's own share will pay for it; the rest is taken
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
        return State(credit, drawn + counts, last_seen, probes)

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

    def _positions(self, drawn: IntArray, counts: IntArray) -> IntArray:
        """Where the next ``counts`` int64 [T] examples of tasks lie, sorted by task, int64 [batch size]."""
        task = np.repeat(np.arange(len(counts)), counts)
        index = np.arange(len(task)) - np.repeat(np.cumsum(counts) - counts, counts) + drawn[task]
        sizes = self._sizes[task]
        passes, positions = np.divmod(index, sizes)
        out = np.zeros_like(positions)
        large = sizes > SORTED_UP_TO
        if large.any():
            keys = fold_each(self._task_keys[task[large]], passes[large])
            out[large] = permute(sizes[large], keys, positions[large])
        for i in np.flatnonzero(~large):
            out[i] = self._order(int(task[i]), int(passes[i]))[positions[i]]
        return out

    def _order(self, task: int, done: int) -> npt.NDArray[np.uint8]:
        kept = self._orders.get(task)
        if kept is None or kept[0] != done:
            key = fold(int(self._task_keys[task]), done)
            kept = self._orders[task] = (done, sorted_order(int(self._sizes[task]), key))
        return kept[1]
