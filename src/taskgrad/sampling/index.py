"""The index engine: batch k as a pure function of seed, sizes, batch size, engine guards, weights and k.

Integers in, integers out, no torch: another engine can stand behind the same interface (``commit``, ``draw``,
``totals``, ``probes``). State is derived, never saved: going to any batch replays the quotas (not the permutations)
from the nearest snapshot, some tens of microseconds a batch.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from .arrays import BoolArray, IntArray
from .permutation import SORTED_UP_TO, derive_key, permutation_window
from .quota import ONE, allocate

ALGORITHM = 1
"""Version of the stream: raised whenever the same input would give another one."""

MAX_BATCH_SIZE = 1 << 20
_WINDOW = 256
_RECENT = 256
_SNAPSHOTS = 512


class Draw(NamedTuple):
    """One batch, sorted by task: ``counts`` int64 [T]; ``positions`` int64 [batch size], each in range(size of its
    task), the first counts[0] of them belonging to task 0 and so on."""

    counts: IntArray
    positions: IntArray


class _State(NamedTuple):
    credit: IntArray
    drawn: IntArray
    last_seen: IntArray
    probes: IntArray


class IndexEngine:
    """Draws batches ``first_batch, first_batch + 1, ...``; nothing has been drawn of any task before.

    ``sizes`` int64 [T], all positive; ``probe_every``: no task stays unseen for more than this many batches;
    ``max_draws`` int64 [T]: most examples ever drawn of each task; ``era`` enters the keys of the permutations.
    ``commit`` must have given weights for ``first_batch`` before the first draw.
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
    ) -> None:
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise ValueError(f"batch_size must be between 1 and {MAX_BATCH_SIZE}, got {batch_size}")
        if probe_every is not None and len(sizes) > probe_every * batch_size:
            least = -(-len(sizes) // batch_size)
            raise ValueError(
                f"probe_every={probe_every} is too small: {len(sizes)} tasks do not fit into {probe_every} batches of "
                f"{batch_size}; it must be at least {least}, and well above that to leave slots for the mix"
            )
        self._sizes = sizes
        self._batch_size = batch_size
        self._first = first_batch
        self._probe_every = probe_every
        self._max_draws = max_draws
        self._pass_keys = [derive_key(ALGORITHM, seed, era, 1, task) for task in range(len(sizes))]
        self._tie_key = derive_key(ALGORITHM, seed, era, 2)
        self._starts: list[int] = []
        self._accruals: list[IntArray] = []
        self._live: tuple[int, bytes, IntArray] | None = None
        self._windows: dict[int, tuple[int, int, IntArray]] = {}
        zero = np.zeros(len(sizes), dtype=np.int64)
        start = _State(zero, zero, np.full(len(sizes), first_batch - 1, dtype=np.int64), zero)
        self._snapshots: dict[int, _State] = {first_batch: start}
        self._recent: dict[int, _State] = {}
        self._stride = 256
        self._furthest = first_batch

    def commit(self, effective_at: int, weights: IntArray) -> None:
        """Weights int64 [T], summing to 2**40, for batches from ``effective_at`` on. Derived states after it go."""
        if self._starts and effective_at <= self._starts[-1]:
            raise ValueError(f"batch {effective_at} is not after the last change, at batch {self._starts[-1]}")
        self._starts.append(effective_at)
        self._accruals.append(weights * self._batch_size)
        if self._furthest > effective_at:
            for states in (self._snapshots, self._recent):
                for k in [k for k in states if k > effective_at]:
                    del states[k]
            self._furthest = effective_at

    def draw(self, k: int) -> Draw:
        """Batch ``k``. Raises RuntimeError when every task with any weight has been drawn ``max_draws`` times."""
        before = self._state(k)
        drawn = self._state(k + 1).drawn
        counts = drawn - before.drawn
        parts = [self._positions(int(t), int(before.drawn[t]), int(counts[t])) for t in np.flatnonzero(counts)]
        return Draw(counts, np.concatenate(parts))

    def totals(self, k: int) -> IntArray:
        """Examples of each task in the batches before ``k``, int64 [T]."""
        return self._state(k).drawn

    def probes(self, k: int) -> IntArray:
        """Slots that ``probe_every`` took for each task in the batches before ``k``, int64 [T]."""
        return self._state(k).probes

    def _state(self, k: int) -> _State:
        found = self._recent.get(k)
        if found is not None:
            return found
        if k < self._first:
            raise ValueError(f"batch {k} lies before batch {self._first}, where this data's ledger begins")
        at = k - 1
        if at not in self._recent:
            at = max(s for states in (self._snapshots, self._recent) for s in states if s <= k)
        state = self._recent[at] if at in self._recent else self._snapshots[at]
        while at < k:
            state = self._step(at, state)
            at += 1
            self._keep(at, state)
        return state

    def _keep(self, k: int, state: _State) -> None:
        self._recent[k] = state
        self._furthest = max(self._furthest, k)
        if len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]
        if (k - self._first) % self._stride == 0:
            self._snapshots[k] = state
            if len(self._snapshots) > _SNAPSHOTS:
                self._stride *= 2
                for s in [s for s in self._snapshots if (s - self._first) % self._stride]:
                    del self._snapshots[s]

    def _step(self, k: int, state: _State) -> _State:
        credit, drawn, last_seen, probes = state
        accrual, room = self._accrual(k, drawn)
        credit = credit + accrual
        limit = None
        if room is not None:
            limit = np.where(accrual > 0, room, 0)
            beyond = credit > limit * ONE
            if beyond.any():
                credit = _set(credit, beyond, limit * ONE, np.where(beyond, 0, accrual))
        forced = None
        if self._probe_every is not None:
            forced = self._due(last_seen + self._probe_every - k, room)
            if forced is not None:
                # A probe is an example drawn early as far as the task's own share will pay for it; the rest is taken
                # from the mix for good. So a tiny weight runs up no debt that would starve the task when it rises.
                asked = forced & (credit <= 0)
                if asked.any():
                    credit = _set(credit, asked, np.ones_like(credit), np.where(forced, 0, accrual))
                    probes = probes + asked
        counts = allocate(credit, accrual, self._batch_size, derive_key(self._tie_key, k), forced, limit)
        credit = credit - counts * ONE
        if limit is not None:
            used_up = counts >= limit
            if credit[used_up].any():
                credit = _set(credit, used_up, np.zeros_like(credit), np.where(used_up, 0, accrual))
        return _State(credit, drawn + counts, np.where(counts > 0, k, last_seen), probes)

    def _accrual(self, k: int, drawn: IntArray) -> tuple[IntArray, IntArray | None]:
        """What batch k adds to every credit, and how many more examples each task may give (None: any number)."""
        change = bisect_right(self._starts, k) - 1
        accrual = self._accruals[change]
        if self._max_draws is None:
            return accrual, None
        room = self._max_draws - drawn
        if not room.all():
            mask = (room > 0).tobytes()
            if self._live is None or self._live[:2] != (change, mask):
                self._live = (change, mask, _without(accrual, room > 0))
            accrual = self._live[2]
        if int(room[accrual > 0].sum()) < self._batch_size:
            raise RuntimeError(
                f"batch {k} cannot be filled: the tasks that have any weight have been drawn max_epochs times; raise "
                "max_epochs, give other tasks some weight, or stop here"
            )
        return accrual, room

    def _due(self, slack: IntArray, room: IntArray | None) -> BoolArray | None:
        """Tasks that must be in this batch, so that every later deadline can be met too."""
        if room is not None:
            slack = np.where(room > 0, slack, np.iinfo(np.int32).max)
        if len(slack) <= self._batch_size:
            due: BoolArray = slack <= 0
            return due if due.any() else None
        order = np.argsort(slack, kind="stable")
        ranks = np.arange(1, len(slack) + 1)
        needed = int((ranks - slack[order] * self._batch_size).max())
        if needed <= 0:
            return None
        due = np.zeros(len(slack), dtype=np.bool_)
        due[order[: min(needed, self._batch_size)]] = True
        return due

    def _positions(self, task: int, start: int, count: int) -> IntArray:
        size = int(self._sizes[task])
        window = size if size <= SORTED_UP_TO else _WINDOW
        parts = []
        while count:
            done, position = divmod(start, size)
            block = position // window
            kept = self._windows.get(task)
            if kept is None or kept[0] != done or kept[1] != block:
                key = derive_key(self._pass_keys[task], done)
                first = block * window
                kept = (done, block, permutation_window(size, key, first, min(first + window, size)))
                self._windows[task] = kept
            offset = position - block * window
            part = kept[2][offset : offset + count]
            parts.append(part)
            start += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _without(accrual: IntArray, live: BoolArray) -> IntArray:
    """The accrual of tasks that are used up, spread over the others in proportion; the sum stays what it was."""
    return _set(accrual, ~live, np.zeros_like(accrual), np.where(live, accrual, 0))


def _set(amounts: IntArray, who: BoolArray, values: IntArray, payers: IntArray) -> IntArray:
    """``amounts`` with ``values`` at ``who``; the difference goes to ``payers`` in proportion, so that the sum stands.

    Where there are no payers nothing changes.
    """
    total = int(payers.sum())
    if total == 0:
        return amounts
    freed = int((amounts - values)[who].sum())
    shares = [int(payer) * freed // total for payer in payers]  # Python integers: the product exceeds 64 bits
    shares[int(payers.argmax())] += freed - sum(shares)
    return np.where(who, values, amounts) + np.array(shares, dtype=np.int64)
