"""From reports to ledger entries: the policy, its state, the guards, and what waits to take effect."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from .._text import printable
from .arrays import FloatArray, IntArray, frozen_floats
from .change import WIDTH, described, next_mix
from .guards import check_shares
from .index import IndexEngine
from .ledger import Ledger
from .policies.base import PolicyState
from .quota import from_units, to_units
from .settings import Settings


@dataclass(frozen=True)
class Realised:
    """What was drawn up to a batch, against what was intended; arrays [T].

    ``examples`` int64; ``share`` of all examples; ``intended``: mean of the weights over the same batches;
    ``epochs``: passes over each task's examples; ``probes`` int64: slots that ``probe_every`` took; ``capped``: tasks
    drawn ``max_epochs`` times, which get no more.
    """

    tasks: tuple[str, ...]
    batches: int
    examples: IntArray
    share: FloatArray
    intended: FloatArray
    epochs: FloatArray
    probes: IntArray
    capped: tuple[str, ...]

    def __str__(self) -> str:
        names = [printable(task, 40) for task in self.tasks]
        width = max(4, *(len(name) for name in names))
        lines = [f"{self.batches} batches", f"{'task':<{width}}  examples   share  intended  epochs  probes"]
        for t, task in enumerate(self.tasks):
            lines.append(
                f"{names[t]:<{width}}  {self.examples[t]:>8}  {self.share[t]:.4f}    {self.intended[t]:.4f}  "
                f"{self.epochs[t]:>6.2f}  {self.probes[t]:>6}" + ("  capped" if task in self.capped else "")
            )
        return "\n".join(lines)


def _name(policy: Any) -> str:
    inner = getattr(policy, "policy", None)
    return type(policy).__name__ + ("" if inner is None else f"({_name(inner)})")


@dataclass(frozen=True)
class _Decision:
    effective_at: int
    shares: FloatArray
    cause: str
    why: str


class Control:
    """Owns ledger and engine. A decision waits until a batch that it is for is drawn, or one for a later batch comes:
    of the reports that count for the same batch, the last one wins, and entries are appended in order."""

    def __init__(self, settings: Settings, policy: Any, tasks: tuple[str, ...]) -> None:
        self.settings = settings
        self.policy = policy
        self.tasks = tasks
        self.eval_losses: dict[str, float] | None = None
        self.evaluations = 0
        self.open_era(Ledger(settings.sizes, data=settings.data))

    @property
    def policy_name(self) -> str:
        """Class name of the policy, with that of the policy it wraps: their memories must not be mistaken."""
        return _name(self.policy)

    def open_era(self, ledger: Ledger) -> None:
        """Start an empty ledger with the policy's first weights and its schedule, and an empty policy memory."""
        self.memory: dict[str, Any] = {}
        self.eval_losses = None
        self.evaluations = 0
        self._waiting: _Decision | None = None
        self._last_step: int | None = None
        self._newest: int | None = None  # after a load a tracker may count its steps from 0 again
        self.ledger = ledger
        self.engine = self._new_engine()
        state = self._policy_state(ledger.start - 1, None, self.settings.natural)
        first = self.policy.initial(state) if hasattr(self.policy, "initial") else state.natural
        self._commit(ledger.start, check_shares(first, self.tasks, self.policy_name), "initial")
        changes = self.policy.changes(state) if hasattr(self.policy, "changes") else ()
        for batch in changes:
            if batch > ledger.start:
                self._enter_change(batch, replace(state, step=batch - 1))

    def _enter_change(self, batch: int, state: PolicyState) -> None:
        """Enter a scheduled change, in as many steps as ``max_change`` makes of it."""
        shares = check_shares(self.policy.weights(None, state), self.tasks, self.policy_name)
        every = self.settings.update_every
        at = max(-(-batch // every) * every, self.ledger[-1].effective_at + 1)
        while True:
            entries = len(self.ledger)
            self._commit(at, shares, "schedule")
            if len(self.ledger) == entries or "max_change" not in self.ledger[-1].bound:
                return
            at += every

    def observe(self, eval_losses: dict[str, float]) -> None:
        """Keep evaluation losses for the next decisions."""
        self.eval_losses = eval_losses
        self.evaluations += 1

    def decide(self, report: Any, batch: int, drawn: int, lr: float | None) -> None:
        """Ask the policy about the report on ``batch``; ``drawn`` batches are out of reach already."""
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
        every = self.settings.update_every
        effective = max(batch + 1 + self.settings.delay, self.ledger[-1].effective_at + 1)
        effective = -(-effective // every) * every
        if effective < drawn:
            raise ValueError(
                f"the change from the report on batch {batch} takes effect at batch {effective}, but {drawn} batches "
                f"are already drawn: build the sampler with delay={drawn - batch - 1} or more (a DataLoader draws "
                "num_workers x prefetch_factor batches ahead; Accelerate and Lightning may add one), or call update() "
                "once for every batch of the loader, micro-batches included"
            )
        self.enter_before(effective)
        state = self._policy_state(batch, lr, from_units(self.ledger.at(batch).weights))
        shares = check_shares(self.policy.weights(report, state), self.tasks, self.policy_name)
        self._waiting = _Decision(effective, shares, f"report on batch {batch}", self._why(shares, state))
        self._last_step = step

    def enter_before(self, batch: int) -> None:
        """Enter the waiting decision if it is for a batch before ``batch``."""
        waiting = self._waiting
        if waiting is not None and waiting.effective_at < batch:
            self._waiting = None
            self._commit(waiting.effective_at, waiting.shares, waiting.cause, waiting.why, exact=False)

    def realised(self, stop: int) -> Realised:
        """Drawn against intended mix in this era's batches before ``stop``."""
        settings, start = self.settings, self.ledger.start
        examples = self.engine.totals(stop)
        used_up = examples >= settings.max_draws if settings.max_draws is not None else np.zeros(len(examples), bool)
        return Realised(
            tasks=self.tasks,
            batches=stop - start,
            examples=examples.copy(),
            share=examples / max(int(examples.sum()), 1),
            intended=self.ledger.mean(start, stop),
            epochs=examples / settings.sizes,
            probes=self.engine.probes(stop).copy(),
            capped=tuple(self.tasks[t] for t in np.flatnonzero(used_up)),
        )

    def to_dict(self, consumed: int) -> dict[str, Any]:
        """JSON-able state after ``consumed`` batches. Raises TypeError where the policy's memory is not JSON-able, and
        ValueError where it holds NaN or infinity, which JSON does not have.

        ``snapshots`` are the engine's nearest below the batches that a resumed run may start at. They follow from the
        rest and may be missing; without them the first batch is found by replaying the quotas of all before it.
        """
        try:
            memory = json.loads(json.dumps(self.memory, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.policy_name} keeps in state.memory what JSON cannot hold: {error}") from None
        waiting = self._waiting
        return {
            "ledger": self.ledger.to_dict(),
            "waiting": waiting and [waiting.effective_at, waiting.shares.tolist(), waiting.cause, waiting.why],
            "memory": memory,
            "eval_losses": self.eval_losses,
            "evaluations": self.evaluations,
            "last_step": self._last_step,
            "snapshots": self._snapshots(consumed),
        }

    def _snapshots(self, consumed: int) -> list[dict[str, Any]]:
        start, length = self.ledger.start, self.settings.length
        batches = {consumed}
        if self.settings.resume == "replay":
            batches.add(consumed - (consumed - start) % length)
        found = {snapshot["batch"]: snapshot for snapshot in map(self.engine.snapshot, sorted(batches))}
        return [snapshot for batch, snapshot in found.items() if batch > start]

    def restore(self, state: Mapping[str, Any], ledger: Ledger) -> None:
        """Take over what ``to_dict`` wrote; ``ledger`` is its ledger, checked by the caller."""
        self.ledger = ledger
        self.engine = self._new_engine()
        for entry in ledger:
            self.engine.commit(entry.effective_at, entry.weights)
        for snapshot in state.get("snapshots", []):
            self.engine.restore(snapshot)
        waiting = state["waiting"]
        self._waiting = waiting and _Decision(waiting[0], frozen_floats(waiting[1]), *waiting[2:])
        self.memory = copy.deepcopy(state["memory"])
        self.eval_losses = copy.copy(state["eval_losses"])
        self.evaluations = state["evaluations"]
        self._last_step = state["last_step"]
        self._newest = None

    def _new_engine(self) -> IndexEngine:
        settings = self.settings
        return IndexEngine(
            settings.seed,
            settings.sizes,
            settings.batch_size,
            first_batch=self.ledger.start,
            era=self.ledger.era,
            probe_every=settings.probe_every,
            max_draws=settings.max_draws,
        )

    def _commit(self, effective_at: int, shares: FloatArray, cause: str, why: str = "", exact: bool = True) -> None:
        """Enter what the guards make of ``shares``, if that changes anything; what a policy follows from report to
        report is not ``exact``: of it only what moves a task noticeably."""
        units, bound = self._next(shares, exact)
        last = self.ledger[-1].weights if len(self.ledger) else None
        if last is None or not np.array_equal(units, last):
            before = to_units(self.settings.natural) if last is None else last
            why = why or described(self.tasks, before, units) or "the natural mix"
            self.ledger.append(effective_at, units, cause, bound, why)
            self.engine.commit(effective_at, units)

    def _next(self, shares: FloatArray, exact: bool) -> tuple[IntArray, tuple[str, ...]]:
        """The mix int64 [T] that would follow the last entry, and the guards that changed something."""
        last = self.ledger[-1].weights if len(self.ledger) else None
        weights, bound = self.settings.guards.apply(shares, None if last is None else from_units(last))
        units = to_units(weights)
        return units if exact or last is None else next_mix(units, last, self.settings.guards), bound

    def _why(self, shares: FloatArray, state: PolicyState) -> str:
        """The policy's line on the change, if there is one and it has any; printable, at most 120 characters."""
        last = self.ledger[-1].weights
        units, _ = self._next(shares, exact=False)
        if not hasattr(self.policy, "why") or np.array_equal(units, last):
            return ""
        weights, proposed = frozen_floats(from_units(last)), frozen_floats(from_units(units))
        why = self.policy.why(replace(state, weights=weights, proposed=proposed))
        if not isinstance(why, str):
            raise TypeError(f"{self.policy_name}.why must return text, got {why!r}")
        return printable(why, WIDTH)

    def _policy_state(self, batch: int, lr: float | None, weights: FloatArray) -> PolicyState:
        settings = self.settings
        drawn = self.engine.totals(batch + 1)
        return PolicyState(
            tasks=self.tasks,
            sizes=settings.sizes,
            natural=settings.natural,
            importance=settings.importance,
            critical=settings.critical,
            batch_size=settings.batch_size,
            horizon=settings.horizon,
            lr=lr,
            step=batch,
            budget=settings.guards.budget,
            realised=frozen_floats(drawn / max(int(drawn.sum()), 1)),
            epochs=frozen_floats(drawn / settings.sizes),
            weights=frozen_floats(weights),
            eval_losses=None if self.eval_losses is None else MappingProxyType(self.eval_losses),
            memory=self.memory,
            evaluations=self.evaluations,
        )
