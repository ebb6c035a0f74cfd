"""States, copies and pickles of a sampler, and runs that go on from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from .adapted import AdaptedPolicy
from .counting import Counting
from .decisions import Decisions
from .follow import Following
from .inputs import count_of
from .ledger import Ledger
from .loading import loaders
from .loading.stream import Stream
from .saved.live_state import LiveState
from .saved.resume import check_built_alike, check_same_data, engine_at
from .saved.state import check, seal
from .settings import Settings

_Self = TypeVar("_Self", bound="Saving")


class Saving(Counting):
    """Everything that a run changes is made in ``_begin`` and replaced where a state is taken over."""

    def _begin(self, settings: Settings) -> None:
        self._settings = settings
        self._decisions = self._new_decisions()
        self._stream = self._new_stream(self._decisions.ledger.start, 0)
        self._following = Following(self._stream, self._decisions, self.task_ids)
        self._warned = False

    def _new_decisions(self, ledger: Ledger | None = None) -> Decisions:
        return Decisions(self._settings, AdaptedPolicy(self.policy), self._index.tasks, ledger)

    def _new_stream(self, start: int, first_epoch: int) -> Stream:
        settings = self._settings
        return Stream(start, settings.length, first_epoch=first_epoch, replay=settings.resume == "replay")

    def state_dict(self, *, consumed: int | None = None) -> dict[str, Any]:
        """JSON-able state after the consumed batches, whatever a loader has drawn beyond them.

        Where nobody counts, the sampler only knows what was drawn: call ``follow`` (or ``update()`` after each batch)
        before, or pass ``consumed``, the number of batches trained on.

        ``torch.distributed.checkpoint`` fills only the keys that a state has already: give it ``json.dumps(state)``.
        """
        if consumed is None and loaders.keeps_state():
            return LiveState(self._state)
        return self._state(consumed)

    def _state(self, consumed: int | None = None) -> dict[str, Any]:
        with self._stream.lock:
            self._following.flush()
            at = self.consumed if consumed is None else count_of("consumed", consumed, self.ledger.start)
            if at > self._stream.drawn:
                raise ValueError(f"consumed is {at}, but only {self._stream.drawn} batches were drawn")
            if consumed is None:
                self._stream.tell_of_drawn()
            position = self._stream.to_dict(at)
            return seal(
                {
                    "settings": self._settings.to_dict(),
                    "policy": self._decisions.policy.name,
                    "tasks": list(self.tasks),
                    "named": self._index.named,
                    **position,
                    **self._decisions.to_dict(at, position["epoch"][1]),
                }
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; see ``resume`` for where the next ``iter()`` begins.

        ``delay``, ``update_every``, ``horizon``, ``importance`` and ``critical`` may differ from the saved sampler's,
        and ``num_replicas`` while the global batch stays; anything else raises ValueError. A schedule that is in the
        ledger already stays. For other data or tasks there is ``rebase``.

        Raises:
            TypeError, KeyError, ValueError: a field is missing, damaged, changed since it was saved, or of a sampler
                built otherwise; the message names it. The sampler is then as it was.
        """
        state, ledger = check(state)
        check_same_data(state, ledger, self._settings, self.tasks, self._index.named)
        check_built_alike(state, self._settings, self._decisions.policy.name)
        engine = engine_at(state, ledger, self._settings)
        with self._stream.lock:
            if state["named"]:
                self._rename(tuple(state["tasks"]))
            self._decisions.restore(state, ledger, engine)
            self._stream.restore(state)
            self._following.restart()
        tracker = self._following.tracker
        if tracker is not None:
            self._stream.start_counting(by_hand=False)
            self._stream.followed = True
        if self._stream.counting:
            self._join_ranks(None if tracker is None else tracker.process_group)

    def rebase(self, state: Mapping[str, Any]) -> None:
        """Take over a run whose tasks or sizes differ from this sampler's data, at its first batch not consumed.

        Opens a new ledger era that keeps the earlier ones on record. A new epoch begins there; passes, ``max_epochs``
        and the policy start afresh, and batches before it can no longer be drawn again. Raises what
        ``load_state_dict`` does for a damaged state.
        """
        state, ledger = check(state)
        consumed: int = state["consumed"]
        epoch, start, _ = state["epoch"]
        past = [*ledger.past, {**ledger.to_dict(), "past": [], "tasks": list(state["tasks"])}]
        settings = self._settings
        new = Ledger(settings.sizes, data=settings.data, start=consumed, era=ledger.era + 1, past=past)
        following = self._following
        self._decisions = self._new_decisions(new)
        self._stream.jump()
        self._stream = self._new_stream(consumed, epoch + (consumed > start))
        self._following = Following(self._stream, self._decisions, self.task_ids)
        if following.tracker is not None:
            following.tracker.unsubscribe(following)
            self.follow(following.tracker)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which go on where this sampler is and follow no tracker."""
        made_anew = ("_decisions", "_stream", "_following", "_warned")
        kept = {name: value for name, value in self.__dict__.items() if name not in made_anew}
        return {**kept, "_saved": self._state()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in kept.items() if name != "_saved"})
        self._begin(self._settings)
        self.load_state_dict(kept["_saved"])

    def __copy__(self: _Self) -> _Self:
        twin = type(self).__new__(type(self))
        # whatever a policy of the user's keeps outside of its memory is not shared; the data's index is never changed
        twin.__setstate__({**self.__getstate__(), "policy": copy.deepcopy(self.policy)})
        return twin
