"""What a loader holds of a sampler: one iteration over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from . import loaders
from .stream import Stream


class Drawing(Iterator[list[int]]):
    """One iteration. It begins when its first batch is asked for: a DataLoader with workers makes two and uses one.

    ``epoch``, ``start``, ``stop``: the epoch it goes through. Its state says what was drawn, which a loader that
    snapshots itself (torchdata) keeps beside the sampler's, which says what was consumed.
    """

    epoch = start = stop = began = jumps = 0
    asking = loaders.Asking(0, True, 0, None)

    def __init__(self, stream: Stream, draw: Callable[[int], list[int]]) -> None:
        self._stream, self._draw = stream, draw
        self._at: int | None = None

    def __iter__(self) -> Drawing:
        return self

    def __next__(self) -> list[int]:
        with self._stream.lock:
            if self._at is None:
                self.asking = loaders.asking()
                self._at = self._stream.begin(self)
            if self.jumps != self._stream.jumps:
                raise RuntimeError(
                    "the sampler was loaded, rewound or rebased while this iteration over it was under way: leave the "
                    "loop and begin a new one, iter(loader), which goes on where the sampler is now"
                )
            if self._at >= self.stop:
                self._stream.ended(self)
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
        self.asking = loaders.asking()
        self._at = self._stream.resume(self, at)
        if self._at == self.stop:
            self._at = None  # that epoch is over: this is the next one


class Examples(Iterator[int]):
    """The same, one example at a time."""

    def __init__(self, drawing: Drawing, batch_size: int) -> None:
        self._drawing, self._size = drawing, batch_size
        self._batch: list[int] = []
        self._given = 0

    def __iter__(self) -> Examples:
        return self

    def __next__(self) -> int:
        if self._given == len(self._batch):
            self._batch, self._given = next(self._drawing), 0
            asked = self._drawing.asking.batch_size
            if asked not in (None, self._size):
                raise ValueError(
                    f"the loader makes batches of {asked} examples, the sampler of {self._size}: give both the same "
                    "batch_size"
                )
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
