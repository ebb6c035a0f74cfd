"""Where a run is in its stream of batches, and what is handed to loaders.

All counters are in global batches of the whole run, from 0:

- drawn: batches handed to a loader. A DataLoader with W workers and prefetch factor P is W x P batches ahead of the
  training loop; Accelerate, Lightning and transformers' Trainer may add one.
- consumed: batches trained on. Nobody but the training loop knows, so it has to be counted (``follow``, ``update``);
  without that, what was drawn is taken for consumed.

An iteration goes from the first batch not consumed through as many as an epoch has.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

from . import loaders
from .epochs import Epochs
from .told import Told

if TYPE_CHECKING:
    from .drawing import Drawing

_FIRST, _EVERY, _UNLIKE = 16, 8, 3  # batches of an iteration that are compared, and how many may differ
_UNCOUNTED = 2


class _Left(NamedTuple):
    """An iteration: it ``began`` at a batch, has ``reached`` another, goes on to ``stop``, and may have ``ended``
    there. Its loader's workers draw up to ``ahead`` batches before the loop gets them."""

    began: int
    reached: int
    stop: int
    ahead: int
    ended: bool


class Stream:
    """Counters of one sampler. ``length``: batches in an epoch; ``replay``: the first iteration after a load in the
    middle of an epoch goes through all of that epoch again."""

    def __init__(self, start: int, length: int, *, first_epoch: int = 0, replay: bool = False) -> None:
        self.lock = RLock()  # loaders may draw in a thread of their own
        self.length, self.replay = length, replay
        self.epochs = Epochs(first_epoch, start, length)
        self.counting = False
        self.drawn = start
        self.most = start  # batches ever consumed: more than are consumed now where an epoch is run through again
        self.fresh = False  # whether the batch counted last was never counted before
        self.followed = False  # whether a tracker counts
        self._consumed = self._yielded = self._finished = self._base = start
        self._epoch, self._start, self._stop = first_epoch, start, start + length
        self._resumed = False  # nothing was consumed since a load in the middle of an epoch
        self._drawings: list[weakref.ref[Drawing]] = []  # the one that drew last comes last
        self.jumps = 0  # how often the position was set from outside
        self._left: _Left | None = None
        self._first_ahead: int | None = None  # batches that the loader draws ahead, as seen at the first count
        self._uncounted = 0  # iterations in a row that were run through and of which nothing was counted
        self._compares = self._unlike = 0
        self.told = Told()

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
        for drawing in reversed(alive):
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
        self.jump()

    def jump(self) -> None:
        """The position was set from outside: iterations that are under way are not of it."""
        self.jumps += 1
        self._drawings.clear()
        self._left = None
        self.fresh = False

    # -- what loaders draw --------------------------------------------------------------------------------------------

    def begin(self, drawing: Drawing) -> int:
        """An iteration asks for its first batch: which one that is."""
        self._check(drawing.asking)
        at = self._look_back()
        epoch, start, stop = self.span()
        self._base = at
        if self._resumed:
            drawing.epoch, drawing.start, drawing.stop = epoch, start, stop
        else:
            drawing.epoch, drawing.start, drawing.stop = epoch + (at > start), at, at + self.length
        self._enter(drawing)
        return start if self._resumed and self.replay else at

    def _check(self, asking: loaders.Asking) -> None:
        if loaders.in_worker():
            raise RuntimeError(
                "the sampler is drawn from in a worker process of a DataLoader, where every worker has a copy that "
                "draws the same: pass it to the DataLoader as batch_sampler"
            )
        if self.counting and not asking.in_order:
            raise RuntimeError(
                "in_order=False hands batches out in another order than they were drawn in, so that nobody can say "
                "which ones were trained on: build the DataLoader with in_order=True"
            )
        if self._resumed and asking.skips and not self.replay:
            raise RuntimeError(
                f"the loader is about to skip {asking.skips} batches of the epoch, and the sampler has gone on behind "
                'them already: build it with resume="replay", or do not skip (transformers: ignore_data_skip=True)'
            )

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
        self._compares = self._unlike = 0
        drawing.began, drawing.jumps = self._base, self.jumps
        self._drawings.append(weakref.ref(drawing))
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
        drew = weakref.ref(drawing)
        if self._drawings and self._drawings[-1] != drew:  # a second one beside it looked at the data
            self._drawings = [*(ref for ref in self._drawings if ref != drew), drew]
            self.span()
        self._left = _Left(drawing.began, batch + 1, drawing.stop, drawing.asking.ahead, False)

    def ended(self, drawing: Drawing) -> None:
        """More was asked for than the iteration has."""
        if self._left is not None and self._drawings and self._drawings[-1]() is drawing:
            self._left = self._left._replace(ended=True)

    def _look_back(self) -> int:
        """Where the next iteration begins, by what the one before it left behind; tells what nobody counts."""
        stop, left, at = self.span()[2], self._left, self.consumed
        if left is None or (self.counting and at >= stop):
            return at
        if not self.counting:
            if left.reached < left.stop and left.ahead and not self._drawings:
                self.told.say("left", ahead=left.ahead)
            return at
        counted = at - left.began
        given = left.reached - left.began - left.ahead  # to the loop, at least
        if left.ended and not left.ahead and left.stop - at <= min(self._first_ahead or 0, counted):
            return left.stop  # the others are on their way, through something that runs ahead of the loop
        if counted:
            if given > counted + 1:  # one may have been given back
                self.told.say("uncounted", batches=given - counted)
        elif given > 1:  # more than a look at the first
            self._uncounted += 1
            if not self.followed and (self._first_ahead is None or self._uncounted == _UNCOUNTED):
                self.stop_counting()
                self._consumed = self._yielded = at = left.reached
                self.told.say("nobody")
            elif self.followed and self._uncounted == _UNCOUNTED:
                self.told.say("nothing")
        return at

    # -- what was trained on ------------------------------------------------------------------------------------------

    def start_counting(self, *, by_hand: bool) -> None:
        """From now on batches are counted. By hand: from the first batch of the iteration under way. Else from the end
        of the last one that was run through: what was drawn since was only looked at."""
        if not self.counting:
            self.counting = True
            self._consumed = self._base if by_hand else self._finished
            self._left = None  # what was drawn before nobody could count

    def stop_counting(self) -> None:
        """Nobody counts any more: what is drawn from now on is taken for consumed."""
        if self.counting:
            self._yielded = self._finished = self._base = self._consumed
            self.counting = self.followed = False

    def may_count(self) -> bool:
        """Whether there is a batch to count; tells where there is none, or another was due."""
        due = self.consumed
        if self._resumed and self.replay and self._left is not None and self._left.reached <= due:
            self.told.say("replay", trained=self._left.reached - 1, due=due)
        elif due >= self.drawn:
            self.told.say("beyond", drawn=self.drawn)
        return due < self.drawn

    def count(self, batch: int) -> None:
        """All batches up to ``batch`` were trained on."""
        if self._first_ahead is None:
            self._first_ahead = self.drawn - batch - 1
        self.fresh = batch >= self.most
        self._consumed = batch + 1
        self._resumed = False
        self._uncounted = 0
        self.most = max(self.most, batch + 1)
        if self._consumed >= self._stop:
            self.span()  # the iteration that this leads into may be over when somebody asks

    def looks_closer(self) -> bool:
        """Asked for every batch: whether the rows trained on are to be compared with those of the batch that is
        counted. Where an iteration begins, since that is where loops and loaders part, and now and then."""
        self._compares += 1
        return self._compares <= _FIRST or self._compares % _EVERY == 0

    def compare(self, alike: bool) -> None:
        """Whether they have the same tasks."""
        self._unlike += not alike
        if self._unlike == _UNLIKE:
            self.told.say("unlike", batches=_UNLIKE)

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

    # -- saved and loaded ---------------------------------------------------------------------------------------------

    def tell_of_drawn(self) -> None:
        """Where nobody counts, and a loader draws ahead, a state is not of what was trained on."""
        if not self.counting and self._left is not None and self._left.ahead and self._left.reached < self._left.stop:
            self.told.say("not counted", ahead=self._left.ahead, drawn=self.drawn)

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
        self.epochs = Epochs.resumed(state["epochs"])
        self._epoch, self._start, self._stop = state["epoch"]
        self.counting = state["counting"]
        self.followed, self._first_ahead, self._uncounted = False, None, 0
        self.drawn = self._consumed = self._yielded = self._finished = self._base = consumed
        self.most = state["most"]
        self._resumed = self._start < consumed < self._stop
        self.jump()
