"""From reports to ledger entries: the policy, its state, the guards, and what waits to take effect.

What is decided on batch j enters the stream at the first multiple of ``update_every`` that is at least j + 1 +
``delay`` (j counted from 0, so j + 1 batches are consumed by then). Neither number is read from the loader, so the
stream does not depend on it, as long as the loader draws at most ``delay`` batches ahead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from .._text import printable
from .adapted import AdaptedPolicy
from .agreement import Agreement
from .arrays import FloatArray, IntArray, frozen_floats
from .change import WIDTH, described, next_mix
from .engine.index import IndexEngine
from .engine.quota import from_units, to_units
from .ledger import Ledger
from .loading.stream import Stream
from .policies.base import PolicyState
from .saved.resume import new_engine, snapshots
from .settings import Settings


@dataclass(frozen=True)
class _Decision:
    effective_at: int
    wanted: FloatArray
    cause: str
    why: str


class Decisions:
    """Owns ledger and engine. A decision waits until no report can replace it, or a batch that it is for is drawn: of
    the reports that count for the same batch, the last one wins, and entries are appended in order."""

    def __init__(
        self, settings: Settings, policy: AdaptedPolicy, tasks: tuple[str, ...], ledger: Ledger | None = None
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.tasks = tasks
        self.agreement: Agreement | None = None
        self._open_era(Ledger(settings.sizes, data=settings.data) if ledger is None else ledger)

    def _open_era(self, ledger: Ledger) -> None:
        """Start an empty ledger with the policy's first weights and its schedule, and an empty policy memory."""
        self.memory: dict[str, Any] = {}
        self.eval_losses: dict[str, float] | None = None
        self.evaluations = 0
        self._waiting: list[_Decision] = []
        self._asked = ledger.start  # the batch of the last report that the policy was asked about
        self._last_step: int | None = None
        self._newest: int | None = None  # after a load a tracker may count its steps from 0 again
        self.ledger = ledger
        self.engine = new_engine(self.settings, ledger)
        state = self._policy_state(ledger.start - 1, None, self.settings.natural)
        self._commit(ledger.start, self.policy.initial(state), "initial")
        for batch in self.policy.changes(state):
            if batch > ledger.start:
                self._enter_change(batch, replace(state, step=batch - 1))

    def _enter_change(self, batch: int, state: PolicyState) -> None:
        """Enter a scheduled change, in as many steps as ``max_change`` makes of it."""
        wanted = self.policy.weights(None, state)
        every = self.settings.update_every
        at = max(-(-batch // every) * every, self.ledger[-1].effective_at + 1)
        while True:
            entries = len(self.ledger)
            self._commit(at, wanted, "schedule")
            if len(self.ledger) == entries or "max_change" not in self.ledger[-1].bound:
                return
            at += every

    def observe(self, eval_losses: dict[str, float]) -> None:
        """Keep evaluation losses for the next decisions."""
        self.eval_losses = eval_losses
        self.evaluations += 1

    def decide(self, report: Any, batch: int, lr: float | None, stream: Stream, drawn: int) -> None:
        """Ask the policy about the report on ``batch``, given when ``drawn`` batches were out of reach already."""
        if not report.valid:
            return
        due = self._due(batch)
        effective = self._after_waiting(due)
        if effective < drawn and self.agreement is None:
            effective = self._slot(drawn)
            _tell_late(stream, batch, due, effective)
        self._ask(report, batch, lr, effective, due)

    def decide_by_hand(self, report: Any, batch: int, lr: float | None, stream: Stream) -> None:
        """The same for a report that was handed in; raises ValueError where the change comes too late."""
        step = getattr(report, "step", None)
        if step is not None:
            if self._newest is not None and step < self._newest:
                raise ValueError(
                    f"the report is of step {step}, after one of step {self._newest}: update the sampler with the "
                    "reports of one tracker only, the one that follows the training it samples for"
                )
            self._newest = step
        if not report.valid or (step is not None and step == self._last_step):
            return
        due = self._due(batch)
        if due < stream.drawn:
            raise ValueError(
                f"the change from the report on batch {batch} takes effect at batch {due}, but {stream.drawn} batches "
                f"are already drawn{stream.why_ahead(batch)}"
            )
        self._ask(report, batch, lr, self._after_waiting(due), due)
        self._last_step = step

    def _after_waiting(self, due: int) -> int:
        """Not before what waits: that was late, or was decided where ``delay`` or ``update_every`` was longer."""
        return max([due, *(decision.effective_at for decision in self._waiting)])

    def _due(self, batch: int) -> int:
        return self._slot(max(batch + 1 + self.settings.delay, self.ledger[-1].effective_at + 1))

    def _slot(self, batch: int) -> int:
        """The first batch from ``batch`` on at which weights may change."""
        every = self.settings.update_every
        return -(-batch // every) * every

    def _ask(self, report: Any, batch: int, lr: float | None, effective: int, due: int) -> None:
        self.enter_before(effective)
        state = self._policy_state(batch, lr, from_units(self.ledger.at(batch).weights))
        wanted = self.policy.weights(report, state)
        late = "" if effective == due else f", late: due at {due}"
        if self._waiting and self._waiting[-1].effective_at == effective:
            self._waiting.pop()
        gap = max(batch - self._asked, 1)  # between reports, as far as one can see
        is_last = self._slot(batch + gap + 1 + self.settings.delay) > effective  # else another will take its place
        self._asked = batch
        why = self._why(wanted, state) if is_last else ""
        self._waiting.append(_Decision(effective, wanted, f"report on batch {batch}{late}", why))

    def enter_before(self, batch: int) -> None:
        """Enter what waits for batches before ``batch``. Several ranks have to agree first."""
        while self.agreement is None and self._waiting and self._waiting[0].effective_at < batch:
            decision = self._waiting.pop(0)
            units, bound = self._after(self.ledger[-1].weights, decision.wanted)
            self._enter(decision.effective_at, units, decision.cause, bound, decision.why)

    def weights_at(self, batch: int) -> FloatArray:
        """Probabilities [T] in force at ``batch``, also where they still wait to be entered."""
        units = self.ledger.at(batch).weights
        for decision in self._waiting:
            if decision.effective_at <= batch:
                units, _ = self._after(units, decision.wanted)
        return from_units(units)

    # -- several ranks ------------------------------------------------------------------------------------------------

    def agree_with(self, agreement: Agreement, consumed: int) -> None:
        """From now on decisions are entered as the ranks agree."""
        self.agreement = agreement
        self._calls, self._until, self._agreed_at = 0, 1, consumed

    def settle(self, stream: Stream, hand_over: Callable[[int], None]) -> None:
        """A step has closed (or ``update`` was called), which all ranks do together.

        A decision is agreed on once so many batches are consumed that no report can change it, and a few more, so that
        nobody waits for a device. Whatever else the ranks' loaders draw or look at, they agree at the same calls.
        """
        if self.agreement is None:
            return
        self._calls += 1
        if self._calls < self._until:
            return
        every, delay = self.settings.update_every, self.settings.delay
        reach = delay - min(delay // 8, 8)
        slot = (stream.consumed + reach) // every * every
        hand_over(slot - 1 - delay)
        decision = self._waiting[0] if self._waiting and self._waiting[0].effective_at <= slot else None
        units, bound = (None, ()) if decision is None else self._after(self.ledger[-1].weights, decision.wanted)
        more = len(self._waiting) > 1 and self._waiting[1].effective_at <= slot
        batches = max(1, (stream.consumed - self._agreed_at) // self._calls)  # a call
        after = 1 if more else max(1, -(-(slot + every - reach - stream.consumed) // batches))
        own = f"{json.dumps(self.settings.to_dict())} {self.policy.name} {self.ledger.digest()}"
        agreed = self.agreement.agree(own, len(self.tasks), units, stream.consumed, stream.drawn, after)
        self._calls, self._until, self._agreed_at = 0, agreed.after, stream.consumed
        if decision is None or agreed.weights is None:
            return
        del self._waiting[0]
        due, cause = decision.effective_at, decision.cause
        effective = max(due, self._slot(self.ledger[-1].effective_at + 1))  # after what came late before
        if agreed.drawn > effective:
            effective = self._slot(agreed.drawn)
        if effective > due:
            _tell_late(stream, slot - 1 - delay, due, effective)
            cause = f"{cause}, late: due at {due}"
        self._enter(effective, agreed.weights, cause, bound, decision.why)

    def to_dict(self, consumed: int, epoch_start: int) -> dict[str, Any]:
        """JSON-able state after ``consumed`` batches, in an epoch that began at ``epoch_start``.

        Raises TypeError where the policy's memory is not JSON-able, and ValueError where it holds NaN or infinity,
        which JSON does not have.
        """
        try:
            memory = json.loads(json.dumps(self.memory, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.policy.name} keeps in state.memory what JSON cannot hold: {error}") from None
        return {
            "ledger": self.ledger.to_dict(),
            "waiting": [[d.effective_at, d.wanted.tolist(), d.cause, d.why] for d in self._waiting],
            "memory": memory,
            "eval_losses": self.eval_losses,
            "evaluations": self.evaluations,
            "last_step": self._last_step,
            "snapshots": snapshots(self.engine, self.ledger, self.settings, consumed, epoch_start),
        }

    def restore(self, state: Mapping[str, Any], ledger: Ledger, engine: IndexEngine) -> None:
        """Take over what ``to_dict`` wrote, checked by the caller; ``engine`` is from ``engine_at``."""
        self.ledger, self.engine = ledger, engine
        self._waiting = []
        # of several ranks, that had yet to agree: where one goes on alone, no batch that was drawn may change
        late = any(at < state["consumed"] for at, *_ in state["waiting"])
        first = self._slot(state["consumed"]) if late else 0
        for at, wanted, *said in state["waiting"]:
            if at <= first and self._waiting:
                self._waiting.pop()
            self._waiting.append(_Decision(max(at, first), frozen_floats(wanted), *said))
        self.memory = state["memory"]
        self.eval_losses = state["eval_losses"]
        self.evaluations = state["evaluations"]
        self._last_step = state["last_step"]
        self._newest = None
        self._asked = state["consumed"]
        self.agreement = None

    def _commit(self, effective_at: int, wanted: FloatArray, cause: str) -> None:
        """Enter exactly what the guards make of ``wanted``: a policy's first weights, or its schedule."""
        last = from_units(self.ledger[-1].weights) if len(self.ledger) else None
        weights, bound = self.settings.guards.apply(wanted, last)
        self._enter(effective_at, to_units(weights), cause, bound, "")

    def _after(self, last: IntArray, wanted: FloatArray) -> tuple[IntArray, tuple[str, ...]]:
        """The mix int64 [T] that follows ``last``, and the guards that changed something. Of what a policy follows from
        report to report, only what moves a task noticeably."""
        weights, bound = self.settings.guards.apply(wanted, from_units(last))
        return next_mix(to_units(weights), last, self.settings.guards), bound

    def _enter(self, effective_at: int, units: IntArray, cause: str, bound: tuple[str, ...], why: str) -> None:
        last = self.ledger[-1].weights if len(self.ledger) else None
        if last is None or not np.array_equal(units, last):
            before = to_units(self.settings.natural) if last is None else last
            why = why or described(self.tasks, before, units) or "the natural mix"
            self.ledger.append(effective_at, units, cause, bound, why)
            self.engine.commit(effective_at, units)

    def _why(self, wanted: FloatArray, state: PolicyState) -> str:
        """The policy's line on the change, if there is one and it has any; printable, at most 120 characters."""
        last = self.ledger[-1].weights
        units, _ = self._after(last, wanted)
        if np.array_equal(units, last):
            return ""
        weights, proposed = frozen_floats(from_units(last)), frozen_floats(from_units(units))
        return printable(self.policy.why(replace(state, weights=weights, proposed=proposed)), WIDTH)

    def _policy_state(self, batch: int, lr: float | None, weights: FloatArray) -> PolicyState:
        settings = self.settings
        drawn = self.engine.totals(batch + 1)
        return PolicyState(
            tasks=self.tasks,
            sizes=None if settings.fresh else settings.sizes,
            natural=settings.natural,
            importance=settings.importance,
            critical=settings.critical,
            batch_size=settings.global_batch_size,
            horizon=settings.horizon,
            lr=lr,
            step=batch,
            budget=settings.guards.budget,
            realised=frozen_floats(drawn / max(int(drawn.sum()), 1)),
            epochs=None if settings.fresh else frozen_floats(drawn / settings.sizes),
            weights=frozen_floats(weights),
            eval_losses=None if self.eval_losses is None else MappingProxyType(self.eval_losses),
            memory=self.memory,
            evaluations=self.evaluations,
        )


def _tell_late(stream: Stream, batch: int, due: int, entered: int) -> None:
    stream.told.say("late", batch=batch, due=due, drawn=stream.drawn, entered=entered, delay=stream.drawn - batch - 1)
