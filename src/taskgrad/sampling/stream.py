"""Where a run is in its stream of batches, and what is handed to loaders.

All counters are in global batches of the whole run, from 0:

- drawn: batches handed to a loader. A DataLoader with W workers and prefetch factor P is W x P batches ahead of the
  training loop; Accelerate, Lightning and transformers' Trainer may add one.
- consumed: batches trained on. Nobody but the training loop knows, so it has to be counted (``follow``, ``update``);
  without that, what was drawn is taken for consumed.

An iteration goes from the first batch not consumed through as many as an epoch has.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from . import loaders
from .epochs import Epochs

_COMPARES, _UNLIKE = 16, 3


class Stream:
    """Counters of one sampler. ``length``: batches in an epoch; ``replay``: the first iteration after a load in the
    middle of an epoch goes through all of that epoch again."""

    def __init__(self, start: int, length: int, *, first_epoch: int = 0, replay: bool = False) -> None:
        self.length, self.replay = length, replay
        self.epochs = Epochs(first_epoch, start, length)
        self.counting = False
        self.drawn = start
        self.most = start  # batches ever consumed: more than are consumed now where an epoch is run through again
        self._consumed = self._yielded = self._finished = self._base = start
        self._epoch, self._start, self._stop = first_epoch, start, start + length
        self._resumed = False  # nothing was consumed since a load in the middle of an epoch
        self._drawings: list[weakref.ref[Drawing]] = []
        self._last: weakref.ref[Drawing] | None = None
        self._left: tuple[int, int, int, int] | None = None
        self._first_ahead: int | None = None  # batches that the loader draws ahead, as seen at the first count
        self.compares = 0
        self._unlike = 0
        self._said: set[str] = set()

    @property
    def consumed(self) -> int:
        return self._consumed if self.counting else self._yielded

    @property
    def uncounted(self) -> int:
        """The first batch that ``update`` has not counted."""
        return self._consumed if self.counting else self._base

    # -- epochs -------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch under way, or the one that was run through last."""
        return self.span()[0]

    def span(self) -> tuple[int, int, int]:
        """The epoch under way: its number, first batch, and the one after its last."""
        at = self.consumed
        alive = [drawing for ref in self._drawings if (drawing := ref()) is not None]
        self._drawings = [weakref.ref(drawing) for drawing in alive]
        # the oldest that is still there: a second iteration beside it only looks
        for drawing in alive:
            if drawing.start <= at < drawing.stop:
                if (drawing.start, drawing.stop) != (self._start, self._stop):
                    self._epoch, self._start, self._stop = drawing.epoch, drawing.start, drawing.stop
                    self.epochs.begin(self._epoch, self._start)
                break
        else:
            if at > self._stop:  # counted beyond it, by whom is not known any more
                further = -(-(at - self._stop) // self.length)
                self._epoch += further
                self._start = self._stop + (further - 1) * self.length
                self._stop = self._start + self.length
                self.epochs.begin(self._epoch, self._start)
        return self._epoch, self._start, self._stop

    def rewind(self, epoch: int) -> None:
        """The next iteration runs through ``epoch``, from its start."""
        now = self.span()[0]
        if epoch < self.epochs.first:
            raise ValueError(f"epoch {epoch} was drawn from other data: since rebase, the first is {self.epochs.first}")
        if epoch > now:
            raise ValueError(f"rewind goes back, but epoch {epoch} has not begun yet: the run is in epoch {now}")
        start = self.epochs.start(epoch)
        self._consumed = self._yielded = self._finished = self._base = start
        self._epoch, self._start, self._stop = epoch, start, start + self.length
        self._resumed = False
        self._drawings.clear()
        self._last = None

    # -- what loaders draw --------------------------------------------------------------------------------------------

    def begin(self, drawing: Drawing) -> int:
        """An iteration asks for its first batch: which one that is."""
        epoch, start, stop = self.span()
        at = self.consumed
        self._look_back(at, start)
        self._base = at
        if self._resumed:
            drawing.epoch, drawing.start, drawing.stop = epoch, start, stop
        else:
            drawing.epoch, drawing.start, drawing.stop = epoch + (at > start), at, at + self.length
        self._enter(drawing)
        return start if self._resumed and self.replay else at

    def resume(self, drawing: Drawing, at: int) -> int:
        """An iteration goes on where its own saved state says, ``at``, or, if they are counted, at the first batch not
        consumed; at which it does."""
        if self.counting:
            if not drawing.start <= self._consumed <= drawing.stop:
                raise ValueError(
                    f"the loader's state is of an epoch from batch {drawing.start} to {drawing.stop}, the sampler's of "
                    f"batch {self._consumed}: load states that were saved together"
                )
            at = self._consumed - loaders.skipped()
        else:
            self._yielded = at
        if at < drawing.stop:
            self._base = at
            self._enter(drawing)
        return at

    def _enter(self, drawing: Drawing) -> None:
        self.compares, self._unlike = _COMPARES, 0
        self._drawings.append(weakref.ref(drawing))
        self._last = weakref.ref(drawing)
        self._left = None
        self.span()

    def drew(self, drawing: Drawing, batch: int) -> None:
        """``batch`` was handed to a loader."""
        self.drawn = max(self.drawn, batch + 1)
        if batch >= self._yielded:
            self._yielded = batch + 1
            self._resumed = self._resumed and self.counting
        if batch + 1 == drawing.stop:
            self._finished = max(self._finished, drawing.stop)
        if self._last is not None and self._last() is drawing:
            self._left = (drawing.start, batch + 1, drawing.stop, drawing.workers)

    def _look_back(self, at: int, start: int) -> None:
        """Tell what the iteration before this one left behind, if nobody counts it."""
        if self._left is None:
            return
        began, reached, stop, workers = self._left
        if not self.counting:
            there = self._last is not None and self._last() is not None
            if reached < stop and workers and not there:
                self._say(
                    "left",
                    f"the last iteration was left at batch {reached - began} of {stop - began}, and what its "
                    f"{workers} workers had drawn ahead is skipped: call sampler.follow(tracker) (or update() after "
                    "each batch) before training, and every batch is trained on",
                )
        elif reached == stop and start < at < stop:
            self._say(
                "uncounted",
                f"the last epoch was run through, but only {at - start} of its {stop - start} batches were counted, so "
                "the others come again: every batch of the loader needs a tracker.batch() (or update()); for those "
                "without one there is sampler.advance(n)",
            )

    # -- what was trained on ------------------------------------------------------------------------------------------

    def start_counting(self, *, by_hand: bool) -> None:
        """From now on batches are counted. By hand: from the first batch of the iteration under way. Else from the end
        of the last one that was run through: what was drawn since was only looked at."""
        if not self.counting:
            self.counting = True
            self._consumed = self._base if by_hand else self._finished

    def count(self, batch: int) -> None:
        """All batches up to ``batch`` were trained on."""
        if self._first_ahead is None:
            self._first_ahead = self.drawn - batch - 1
        self._consumed = batch + 1
        self._resumed = False
        self.most = max(self.most, batch + 1)

    def compare(self, alike: bool) -> None:
        """Whether the rows trained on have the tasks of the batch that is counted: looked at where an iteration begins,
        since that is where loops and loaders part."""
        self.compares -= 1
        self._unlike += not alike
        if self._unlike == _UNLIKE:
            self._say(
                "unlike",
                f"the tasks of {_UNLIKE} of the last {_COMPARES - self.compares} batches trained on are not those of "
                "the batches counted: a batch of the loader was taken and not trained on (iter() of a DataLoader with "
                "persistent_workers restarts a loop that is under way), or tasks or rows were changed on the way. "
                "Count what was taken with sampler.advance(n), and pass the ids that the sampler was built with",
            )

    @property
    def fresh(self) -> bool:
        """Whether the batch counted last was never counted before."""
        return self._consumed == self.most

    def why_ahead(self, batch: int) -> str:
        """What to do where a report on ``batch`` is handed in too late."""
        ahead = self.drawn - batch - 1
        if self._first_ahead is not None and ahead > self._first_ahead + 1:
            return (
                f", {ahead} more than were counted, where it was {self._first_ahead} at first: update() must be called "
                "once for every batch of the loader, micro-batches and skipped ones included, or with batch=, the "
                "number of the last batch of the step; sampler.follow(tracker) counts by itself"
            )
        return (
            f": build the sampler with delay={ahead} or more (a DataLoader draws num_workers x prefetch_factor batches "
            "ahead; Accelerate and Lightning may add one)"
        )

    def overcounted(self) -> None:
        """A batch was counted that no loader has drawn."""
        self._say(
            "beyond",
            f"tracker.batch() was left more often than batches were drawn from the sampler ({self.drawn}): the count "
            "stays there. For further ones on the same batch of the loader pass tracker.batch(ids, advance=False)",
        )

    def late(self, batch: int, due: int, entered: int) -> None:
        """A change could only enter after the batch it was due at."""
        self._say(
            "late",
            f"the change from the report on batch {batch} was due at batch {due}, but {self.drawn} batches were drawn "
            f"by then, so it enters at batch {entered}; the ledger has it. Build the sampler with "
            f"delay={self.drawn - batch - 1} or more (a DataLoader draws num_workers x prefetch_factor batches ahead, "
            "Accelerate one more and times the processes), or count every batch of the loader (sampler.advance)",
        )

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"taskgrad: {text}", stacklevel=2)

    # -- saved and loaded ---------------------------------------------------------------------------------------------

    def to_dict(self, consumed: int) -> dict[str, Any]:
        """JSON-able, as after ``consumed`` batches."""
        epoch, start, stop = self.span()
        if consumed < start:
            epoch = self.epochs.find(consumed)
            start = self.epochs.start(epoch)
            stop = start + self.length
        return {
            "consumed": consumed,
            "most": max(self.most, consumed),
            "counting": self.counting,
            "epoch": [epoch, start, stop],
            "epochs": [list(run) for run in self.epochs.runs],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``to_dict`` wrote, checked by the caller."""
        consumed: int = state["consumed"]
        self.epochs = Epochs.resumed(state["epochs"], self.length)
        self._epoch, self._start, self._stop = state["epoch"]
        self.counting = state["counting"]
        self.drawn = self._consumed = self._yielded = self._finished = self._base = consumed
        self.most = state["most"]
        self._resumed = self._start < consumed < self._stop
        self._drawings.clear()
        self._last = self._left = None


class Drawing(Iterator[list[int]]):
    """One iteration. It begins when its first batch is asked for: a DataLoader with workers makes two and uses one.

    ``epoch``, ``start``, ``stop``: the epoch it goes through. Its state says what was drawn, which a loader that
    snapshots itself (torchdata) keeps beside the sampler's, which says what was consumed.
    """

    epoch = start = stop = 0
    workers = 0

    def __init__(self, stream: Stream, draw: Callable[[int], list[int]]) -> None:
        self._stream, self._draw = stream, draw
        self._at: int | None = None

    def __iter__(self) -> Drawing:
        return self

    def __next__(self) -> list[int]:
        if self._at is None:
            self.workers = loaders.workers()
            self._at = self._stream.begin(self)
        if self._at >= self.stop:
            raise StopIteration
        batch = self._draw(self._at)
        self._stream.drew(self, self._at)
        self._at += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The next batch, and the epoch it belongs to; nothing before the first was drawn."""
        return {} if self._at is None else {"next": self._at, "epoch": [self.epoch, self.start, self.stop]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, or at the first batch not consumed where they are counted."""
        if not state:
            self._at = None
            return
        at = _integers("next", [state.get("next")], 1)[0]
        self.epoch, self.start, self.stop = _integers("epoch", state.get("epoch"), 3)
        if not self.start <= at <= self.stop:
            raise ValueError(f"the loader's state is of batch {at} of an epoch from {self.start} to {self.stop}")
        self._at = self._stream.resume(self, at)
        if self._at == self.stop:
            self._at = None  # that epoch is over: this is the next one


class Examples(Iterator[int]):
    """The same, one example at a time."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing
        self._batch: list[int] = []
        self._given = 0

    def __iter__(self) -> Examples:
        return self

    def __next__(self) -> int:
        if self._given == len(self._batch):
            self._batch, self._given = next(self._drawing), 0
        self._given += 1
        return self._batch[self._given - 1]

    def state_dict(self) -> dict[str, Any]:
        """That of the iteration, at the batch under way, and how many of its examples were given."""
        state = self._drawing.state_dict()
        given = self._given if self._given < len(self._batch) else 0
        if given:
            state["next"] -= 1
        return {**state, "given": given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        state = dict(state)
        (given,) = _integers("given", [state.pop("given", None)], 1)
        self._drawing.load_state_dict(state)
        self._batch, self._given = [], 0
        for _ in range(given):
            next(self)


def _integers(name: str, value: Any, length: int) -> Sequence[int]:
    if not isinstance(value, list | tuple) or len(value) != length or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError(f"the loader's state has {value!r} as {name} of an iteration: load one that it saved")
    return value
