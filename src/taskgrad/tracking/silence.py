"""Silence is a fault: what a user would otherwise not notice is said, once each."""

from __future__ import annotations

import warnings

from ..report import StepReport

WITHOUT_BATCH = 3  # optimizer steps in a row
WITHOUT_NUMBERS = 10  # reports in a row


class Silence:
    """Counts what did not come."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._steps = 0
        self._reports = 0
        self._without_tasks = 0
        self._given_up = 0

    def batch(self) -> None:
        """A step with a tracked batch."""
        self._steps = 0

    def no_batch(self, entered: bool) -> bool:
        """An optimizer step without one; ``entered``: a ``batch()`` was, but no backward pass ran through it. Whether
        this was said now."""
        self._steps += 1
        if self._steps < WITHOUT_BATCH:
            return False
        if entered:
            return self._say(
                "no backward pass",
                f"no backward pass reached a tracked layer in the last {self._steps} optimizer steps, although batch() "
                "was entered: was the model wrapped or replaced after track() (get_peft_model, fully_shard, a copy)? "
                "Call track() after that, on the model that trains",
            )
        return self._say(
            "no batch",
            f"{self._steps} optimizer steps without a tracked batch: nothing is measured. Run the forward inside "
            "`with tracker.batch(ids):`; if the loader drops the column of task ids, keep it (transformers' Trainer: "
            "remove_unused_columns=False)",
        )

    def given_up(self) -> None:
        """A step between two that are measured did not come: its gradients were zeroed before."""
        self._given_up += 1
        if self._given_up == WITHOUT_NUMBERS:
            self._say(
                "given up",
                f"no step closed in the last {WITHOUT_NUMBERS} batches, and their gradients are gone: skipped, "
                "or another optimizer steps than the one that track() was given",
            )

    def closed(self) -> None:
        """A step between closed."""
        self._given_up = 0

    def misfit(self, shape: tuple[int, ...], said: str) -> None:
        """Ids that fitted no layer."""
        self._say(
            "misfit",
            f"ids of shape {shape} fit no layer, so the step is not measured ({said}); pass one id for each row of "
            "what the model is run on (of a batch of pairs: torch.cat([ids, ids]) or ids.repeat_interleave(2))",
        )

    def hear(self, report: StepReport) -> None:
        """The report of a step, each once."""
        self.tasks(bool((report.tokens > 0).any()))
        self.no_step(report)

    def no_step(self, report: StepReport) -> None:
        """The report of a step that did not come, which knows no rows."""
        self._reports = 0 if report.valid else self._reports + 1
        if self._reports == WITHOUT_NUMBERS:
            self._say("no numbers", f"the last {WITHOUT_NUMBERS} reports have no numbers. The newest: {report.reason}")

    def numbers(self) -> None:
        """A step whose report is valid."""
        self._reports = 0

    def tasks(self, any_row: bool) -> None:
        """A step, and whether any of its rows belonged to a task."""
        self._without_tasks = 0 if any_row else self._without_tasks + 1
        if self._without_tasks == WITHOUT_NUMBERS:
            self._say(
                "no tasks",
                f"no row of the last {WITHOUT_NUMBERS} steps belongs to a task (every id is -1), so nothing is said of "
                "any: was the column of task ids lost on the way?",
            )

    def _say(self, kind: str, text: str) -> bool:
        if kind in self._said:
            return False
        self._said.add(kind)
        warnings.warn(f"taskgrad: {text}", stacklevel=2)
        return True
