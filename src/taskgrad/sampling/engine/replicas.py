"""Which rows of a batch each replica gets, so that every replica sees every task about equally often.

Of batch k, sorted by task, replica r of n takes the rows i with i mod n == (r + o_k) mod n. A fixed offset o would hand
the only row of a rare task to the same replica every time, and o = k would too where the task comes every n-th batch.
So o_k is the one that leaves the smallest sum of squared deviations from equal counts, over tasks and replicas, this
batch included; the smallest of several such.

With R[t, r] the rows of task t that replica r got so far, D[t, r] = n R[t, r] - sum over r of R[t, r] holds n times the
deviations, in integers. Of a task's c rows every full n give each replica one; the e = c mod n others go to
consecutive replicas, from (s - o) mod n on, s the task's first row. That adds n to their D and takes e from all n, so,
the D of a task summing to 0, the squares grow by 2n times the sum of D over those e replicas, and by what no offset
changes. Between offsets o and o + 1 such a window moves by one replica, which changes its sum by two terms; the e of
one task ends where that of the next begins. ``csrc/index_engine/replicas.cpp`` agrees to the bit.

How far apart replicas come is measured, not proved. With T tasks and n up to 16 the counts of a task differed by about
2 + T / 2 + log2 n rows at most, over 10**4 batches. The hardest are few tasks whose shares are small ratios, and many
replicas, and there the gap still grows, slowly: at T = 8, n = 64, the worst of 150 runs had 10 rows after 10**3
batches, 16 after 10**4, 19 after 10**5 (the mean: 6, 8, 9).
"""

from __future__ import annotations

import numpy as np

from ..arrays import IntArray

MAX_DEVIATIONS = 1 << 24
"""Tasks times replicas: each snapshot holds that many numbers."""

MAX_DEVIATION = 1 << 36
"""Far above what any stream leads to; sums of them still fit 64 bits."""


def deal(counts: IntArray, deviations: IntArray) -> tuple[int, IntArray]:
    """The offset of a batch of ``counts`` int64 [T], and the deviations after it; ``deviations`` int64 [T, n]."""
    replicas = deviations.shape[1]
    extra = counts % replicas
    tasks = np.flatnonzero(extra)
    stop = np.cumsum(extra[tasks])
    start = stop - extra[tasks]
    steps = np.arange(replicas - 1)  # from one offset to the next
    uneven, row = deviations[tasks], np.arange(len(tasks))[:, None]
    left = uneven[row, (start[:, None] - 1 - steps) % replicas]
    entered = uneven[row, (stop[:, None] - 1 - steps) % replicas]
    costs = np.concatenate([[0], np.cumsum((left - entered).sum(axis=0))])
    offset = int(costs.argmin())
    gets_more = (np.arange(replicas) + offset - start[:, None]) % replicas < extra[tasks][:, None]
    after = deviations.copy()
    after[tasks] += replicas * gets_more - extra[tasks][:, None]
    return offset, after
