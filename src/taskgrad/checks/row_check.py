"""Does row i of every layer belong to example i? Asked by perturbation, before a number is believed.

Shapes cannot tell: ``pe(arange(S))`` looks like a batch where S = B, so do sequence-first activations and permuted
windows. So just before the first tracked forward the model runs twice more, without gradients and with the random
numbers that the forward will have: once with a random half of the examples exchanged among themselves, once with the
other half. What the layers see is compared with what they see in the forward of training itself, row by row:

- a row that stood still must not change: else its rows are not the batch's, or examples mix;
- of the rows that moved one must change, where they can be told apart at all: else the rows are not the batch's;
- the rows that moved must not come out in another order among themselves.

Where BatchNorm trains (``batch_norm`` says why) or parts of the model are compiled, a third pass, in eager mode,
takes the place of training's forward. With an id per token two more passes ask whether the row of a token changes with
the token. Layers that see every example alike (a branch that is zero at the start, one position for all) cannot be told
and pass; so does what depends on the batch as a whole (BatchNorm in training mode): that is row attribution.

A layer that is first called later (position embeddings used where S = B, a head of one kind of batch) is checked then:
until its rows were seen its calls are noted (``unchecked``), and the next batches, three at most, are tried too. What
they do not tell of is left out.

The number of passes depends on the model and the number of the ids' dimensions alone: on several ranks a forward may
hold collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from .._ranks import world_size
from ..capture.accumulation import in_backward
from ..capture.root_hooks import RootHooks
from ..capture.site import Owner, Site
from ..capture.task_rows import Rows
from .batch_norm import BatchStatistics, batch_norm_trains
from .fingerprint import Trace, extra_pass
from .moves import Move, apply, example_moves, token_moves
from .traced import traced
from .trial import Trial
from .unchecked import Unchecked
from .undisturbed import Snapshot

TRIES = 3

NOT_TRIED = "no tracked batch has been checked yet"
NOT_CALLED = "the model was not called as model(...) in eager mode"
FAILED = "the forward raised"
RAISED = "a pass of the model on the batch with examples exchanged raised"
UNJUDGED = "what the layers saw cannot be compared"
NOT_PUT_BACK = "what a pass changed cannot be put back"
LAZY = "the model has parameters that are not initialised yet"
TRACED = "the model was traced, or ran under a TorchDispatchMode"
LATE = "first called after the rows of the layers were checked"
DOUBTFUL = "layers failed, but one of the inputs of shape (B,) or (B, B) may not be the batch's"


class RowCheck:
    """Tries on the first tracked batches, three at most, until one could tell; three more at most for layers that are
    first called after that.

    On several ranks these are what the ranks must agree on before the next batch: whether there is a next try depends
    on ``attempts``, ``verified``, ``wanted`` and ``more`` alone.

    Attributes:
        attempts: batches on which a try was made before one could tell.
        verified: a batch could tell.
        late: names of the layers that were called since, but not before.
        wanted: some layer is late, on any rank.
        more: batches that were tried for such layers.
        told: whether the last one could.
        failing: site name -> why its rows are not the batch's; complete once ``verified`` or given up.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: Owner,
        sites: Sequence[Site],
        enabled: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.owner, self.sites, self.enabled, self.group = model, owner, sites, enabled, group
        self.attempts = 0
        self.verified = False
        self.told = False
        self.late: set[str] = set()
        self.wanted = False
        self.more = 0
        self._why = NOT_TRIED  # not verified
        self.failing: dict[str, str] = {}
        self._known: set[str] = set()  # layers whose rows were seen
        self._suspects: dict[str, str] | None = None  # failed while a doubtful tensor was moved
        self._rows: Rows | None = None  # of the batch that is open, if it is to be tried
        self._again = False  # it is tried for layers that are late
        self._called = False  # the model, in that batch, whether gradients were on or not
        self._tried = False
        self._trial: Trial | None = None  # not settled yet
        self._busy = False  # with passes of its own
        self._depth = 0  # of calls of the model inside the forward that is observed
        self._hooks = RootHooks(model, self._before, self._after)

    @property
    def due(self) -> bool:
        tries_left = self.wanted and self.more < TRIES if self.verified else self.attempts < TRIES
        return self.enabled and tries_left

    @property
    def given_up(self) -> bool:
        return self.enabled and not self.verified and self.attempts == TRIES

    @property
    def reason(self) -> str | None:
        """Why the rows are not verified, ``None`` if they are."""
        if not self.verified:
            return self._why
        return f"{LATE}: {', '.join(sorted(self.late))}" if self.late else None

    @property
    def standing(self) -> list[bool]:
        """What ranks tell each other: whether it is verified, whether some layer is late, whether a 1st, 2nd, ... try
        was made, and a 1st, 2nd, ... for late layers."""
        tries = [count > n for count in (self.attempts, self.more) for n in range(TRIES)]
        return [self.verified, bool(self.late), *tries]

    def agree(self, standing: Sequence[bool]) -> None:
        """Go on where all ranks stand: ``standing`` of any of them. What failed on one rank is left out on all by the
        step itself."""
        verified, wanted, *tries = standing
        if verified and not self.verified:
            self.resume(True)
        self.wanted, self.attempts, self.more = wanted, sum(tries[:TRIES]), sum(tries[TRIES:])

    def resume(self, verified: bool) -> None:
        """Whether it was verified before: then of the layers whose parameters a step has used."""
        self.verified, self._why = verified, NOT_TRIED
        self.late.clear()
        self._known.clear()
        self.wanted = False
        if verified:
            used = (s.name for s in self.sites if s.gauges and all(p.seen for p in s.gauges.values()))
            self._checked(set(used))

    def _checked(self, names: Collection[str]) -> None:
        """The rows of these layers have been seen; calls of the others that were not yet are noted from now on."""
        self.late -= set(names)
        self._known.update(names)
        for site in self.sites:
            known = site.name in self._known
            if isinstance(site.capture, Unchecked):
                site.capture = site.capture.capture if known else site.capture
            elif not known:
                site.capture = Unchecked(site.capture, partial(self._note, site.name))

    def _note(self, name: str) -> None:
        if not self.owner.regrouped:  # else the ids were given for these very rows
            self.late.add(name)

    def enter(self, rows: Rows) -> None:
        """A tracked batch begins: until ``leave``, hooks on the model wait for its forward."""
        if self.due:
            self._rows, self._called, self._tried, self._again = rows, False, False, self.verified
            self._hooks.put()

    def leave(self, failed: bool) -> bool:
        """The batch is over; ``failed``: by an exception. True if it was a try."""
        rows, self._rows = self._rows, None
        trial, self._trial = self._trial, None
        self._hooks.take_away()
        self._depth, self.owner.observer = 0, None
        tried = rows is not None and self._try_ends(trial, failed)
        if tried and self._again:
            self.more += 1
        elif tried:
            self.attempts += 1
        if world_size(self.group) == 1:
            self.wanted = bool(self.late)
        ended = self.more == TRIES if self.verified else self.given_up
        if ended and self.enabled:
            self._leave_out({**dict.fromkeys(self.late, LATE), **(self._suspects or {})})
            self.late.clear()
        return tried

    def _try_ends(self, trial: Trial | None, failed: bool) -> bool:
        """Whether the batch was a try; ``trial``: what of it is not settled."""
        if not self._tried:
            verified_by_hand = self.verified and not self._again
            if verified_by_hand or failed or self._called or not torch.is_grad_enabled():
                return False  # by hand, or an evaluation, or not to be tried yet
            self.told, self._why = False, NOT_CALLED
        elif trial is not None and failed:
            self.told, self._why = False, FAILED
        elif trial is not None:
            self._settle(trial)
        return True

    def by_hand(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same at once, with a pass of its own instead of the forward of training."""
        for _ in range(2):
            self._settle(self._perturb(self.model, rows, args, kwargs, by_hand=True))
            if self.told or self._suspects is None:
                return

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._busy or torch.compiler.is_compiling():
            return
        self._called = True
        settled = self.verified and not self._again
        if self._depth:
            self._depth += 1
        elif self._rows is None or self._tried or settled or not torch.is_grad_enabled() or in_backward():
            return
        elif (obstacle := self._obstacle()) is not None:
            self._why = obstacle
        else:
            # not by model(...): the hooks that have run already would run again
            trial = self._try(self._rows, args, kwargs)
            self._tried = True
            if trial.error is not None or self._own_base():
                self._settle(trial)
            else:
                self._trial, self._depth, self.owner.observer = trial, 1, trial.base

    def _try(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trial:
        """Nothing that goes wrong here may reach training's forward."""
        try:
            # not by model(...): the hooks that have run already would run again. Inside of DistributedDataParallel:
            # what it does around a forward may be a collective, and another rank may have no batch to check
            call = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model.forward
            return self._perturb(call, rows, args, kwargs)
        except Exception as error:
            return Trial(Trace(self.owner, rows.shape), error=f"{RAISED} {type(error).__name__}: {error}")

    def _obstacle(self) -> str | None:
        """Why this call cannot be looked at, though another may be."""
        if traced():
            return TRACED
        lazy = any(is_lazy(t) for t in (*self.model.parameters(), *self.model.buffers()))
        return LAZY if lazy else None

    def _after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._busy or torch.compiler.is_compiling() or not self._depth:
            return
        self._depth -= 1
        if not self._depth:
            self.owner.observer = None
            if self._trial is not None and output is not None:  # None: it may have raised, ``leave`` knows
                trial, self._trial = self._trial, None
                self._settle(trial)

    def _perturb(
        self,
        call: Callable[..., Any],
        rows: Rows,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        by_hand: bool = False,
    ) -> Trial:
        """The passes on moved inputs, and one on the inputs as they are where training's forward cannot serve."""
        shape, hidden = rows.shape, rows.hidden
        generator = torch.Generator("cpu").manual_seed(self.attempts)
        moves = example_moves(shape[0], generator)
        if len(shape) == 2:
            moves += token_moves(shape[1], generator)
        trial = Trial(base=Trace(self.owner, shape))
        plan = [(move, Trace(self.owner, shape)) for move in moves]
        statistics: BatchStatistics | nullcontext[None] = nullcontext()
        if batch_norm_trains(self.model):
            statistics = BatchStatistics()
        if by_hand or self._own_base():
            plan.insert(0, (Move(torch.arange(shape[0], device="cpu")), trial.base))
        leave_doubtful = self._suspects is not None

        def run(move: Move, trace: Trace) -> None:
            try:
                with torch.no_grad(), self._eager(), statistics:
                    moved = apply(move, args, kwargs, shape, leave_doubtful)
                    self._observe(trace, lambda: call(*moved.args, **moved.kwargs))
                moved.args, moved.kwargs = (), {}  # what the pass was for is in the trace
                if trace is not trial.base:
                    trial.passes.append((move, moved, trace))
            except Exception as error:
                if by_hand and trace is trial.base:
                    raise
                # if it is the model's fault, the forward of training will raise it
                trial.error = f"{RAISED} {type(error).__name__}: {error}"
            finally:
                try:
                    snapshot.restore()
                except Exception as error:
                    trial.error = f"{NOT_PUT_BACK}: {type(error).__name__}: {error}"

        try:
            snapshot = Snapshot(self.model)
        except Exception as error:  # no room, or a tensor of an unknown kind
            trial.error = f"the model's tensors cannot be copied: {type(error).__name__}: {error}"
            return trial
        for move, trace in plan:
            run(move, trace)
        rows.hidden = hidden  # the passes were without gradients
        return trial

    def _own_base(self) -> bool:
        """Whether training's forward cannot be compared with, or not be looked into."""
        return self._compiled() or batch_norm_trains(self.model)

    def _compiled(self) -> bool:
        """Whether the model, or a part of it, was compiled in place or is a ``torch.compile`` of a module."""
        return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in self.model.modules())

    def _eager(self) -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("force_eager") if self._compiled() else nullcontext()

    def _observe(self, trace: Trace, run: Callable[[], object]) -> None:
        self._busy, self.owner.observer = True, trace
        try:
            with extra_pass(trace):
                run()
        finally:
            self._busy, self.owner.observer = False, None

    def _settle(self, trial: Trial) -> None:
        try:
            reason, failing = trial.verdict(), trial.failing
        except Exception as error:  # no room, a kind of tensor that has no such op: nothing that training has to know
            reason, failing = f"{UNJUDGED}: {type(error).__name__}: {error}", {}
        if reason is None and failing and trial.doubtful:
            self._suspects, reason = failing, DOUBTFUL
        elif reason is None:
            suspects = failing if self._suspects is None else self._suspects
            self._leave_out({name: why for name, why in failing.items() if name in suspects})
            self.verified, self._suspects = True, None
            self._checked(trial.seen)
            called = {name for name, _ in trial.base.rows} - self._known
            self.late |= {site.name for site in self.sites if site.gauges and site.name in called}
        self.told = reason is None
        if reason is not None:
            self._why = reason

    def _leave_out(self, failing: dict[str, str]) -> None:
        self.failing |= failing
        for site in self.sites:
            if site.reason is None:
                site.reason = failing.get(site.name)
