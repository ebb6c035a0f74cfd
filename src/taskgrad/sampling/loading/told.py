"""What a sampler tells its user where loop, loader and counts do not fit together: each once, and what to do."""

from __future__ import annotations

import warnings
from typing import Any

TEXTS = {
    "left": (
        "the last iteration was left before its end, and what its workers had drawn ahead (up to {ahead} batches) is "
        "skipped: call sampler.follow(tracker) (or update() after each batch) before training, and every batch is "
        "trained on"
    ),
    "uncounted": (
        "the last iteration was run through, but {batches} of its batches were not counted, so they come again: every "
        "batch of the loader needs a tracker.batch() (or update()); for those without one there is sampler.advance(n)"
    ),
    "nobody": (
        "an iteration was run through, and nobody counted its batches: from now on those drawn are taken for trained "
        "on, and no report reaches the policy. Call sampler.follow(tracker), also after loading or copying a sampler "
        "(or update() after each batch)"
    ),
    "nothing": (
        "the last two iterations were run through and none of their batches counted, so the same ones come again. "
        "Were they trained on? Then the tracker that the sampler follows is not that of the model that trains, or "
        "gradients are off where tracker.batch() is entered, or something draws whole epochs ahead of the loop (a "
        "thread, an endless generator), which cannot be followed: give it one long epoch, num_batches="
    ),
    "replay": (
        'resume="replay" is for loops that draw an epoch again and skip what was trained on, but this one trained on '
        'batch {trained} where batch {due} was due: build the sampler with resume="seek"'
    ),
    "unlike": (
        "the tasks of {batches} batches trained on are not those of the batches counted: a batch of the loader was "
        "taken and not trained on (iter() of a DataLoader with persistent_workers restarts a loop that is under way), "
        "one was counted twice (tried again after an error), or tasks or rows were changed on the way. Count what was "
        "only taken with sampler.advance(n), enter what is tried again with tracker.batch(ids, advance=False), and "
        "pass the ids that the sampler was built with"
    ),
    "beyond": (
        "tracker.batch() was left more often than batches were drawn from this sampler ({drawn}): the count stays "
        "there. Several on one batch of the loader? Pass tracker.batch(ids, advance=False) for the further ones. "
        "Batches that were kept and are given again (itertools.cycle, a list)? Iterate over the loader anew. A loader "
        "that draws from a copy (deepcopy, a worker's)? Follow with the sampler that it draws from"
    ),
    "late": (
        "the change from the report on batch {batch} was due at batch {due}, but {drawn} batches were drawn by then, "
        "so it enters at batch {entered}; the ledger has it. Build the sampler with delay={delay} or more (a "
        "DataLoader draws num_workers x prefetch_factor batches ahead, Accelerate one more and times the processes), "
        "or count every batch of the loader (sampler.advance)"
    ),
    "not counted": (
        "the state is of what a loader that draws {ahead} ahead has drawn, {drawn} batches, and not of what was "
        "trained on: call sampler.follow(tracker) before training (or update() after each batch), or pass "
        "state_dict(consumed=)"
    ),
    "replaced": (
        "another sampler follows this sampler's tracker now: this one takes what is drawn for trained on, and no "
        "report reaches its policy. A tracker tells one sampler: give each loader's model a tracker of its own"
    ),
}


class Told:
    """Warns of each thing once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, what: str, **details: Any) -> None:
        """Warn of ``what``, a key of ``TEXTS``, with its ``details``."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"taskgrad: {TEXTS[what].format(**details)}", stacklevel=3)
