"""Which parameters are left out of the numbers, and why."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

from .._text import printable
from ..capture import Probe

AGAIN = "; if the next comparison agrees it counts again"
NAMED = 8  # parameters that a warning names of one cause


class LeftOut:
    """The bookkeeping of it, by name.

    Attributes:
        reasons: left out of every number, and why.
        suspects: left out of a step's numbers, not yet for good, and why.
        unfit: the part of ``reasons`` that no step can change.
        warned: named already.
    """

    def __init__(self, unfit: Mapping[str, str]) -> None:
        self.unfit = dict(unfit)
        self.reasons = dict(unfit)
        self.suspects: dict[str, str] = {}
        self.warned: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether parameter ``name`` is left out of every number."""
        return name in self.reasons

    def resume(self, reasons: Mapping[str, str], suspects: Mapping[str, str]) -> None:
        """What a state says, and what no tracker could take."""
        self.reasons = {**reasons, **self.unfit}
        self.suspects = dict(suspects)

    def add(self, name: str, reason: str) -> bool:
        """Leave parameter ``name`` out from now on; whether it was not yet."""
        if name in self.reasons:
            return False
        self.reasons[name] = reason
        self.suspects.pop(name, None)
        return True

    def drop(self, name: str, reason: str) -> None:
        """Leave parameter ``name`` out of every number from now on, and say so once."""
        if self.add(name, reason):
            self.warn({name: reason} if name not in self.warned else {})

    def suspect(self, probes: Sequence[Probe], reason: str) -> list[Probe]:
        """Parameters that a comparison contradicts: left out of this step, and for good if the last comparison
        contradicted them too. Returns the latter."""
        again = [p for p in probes if p.name in self.suspects]
        for probe in probes:
            if probe.name not in self.suspects:
                self.suspects[probe.name] = reason + AGAIN
        self.warn({p.name: reason for p in probes if p.name not in self.warned})
        for probe in again:
            self.drop(probe.name, reason)
        return again

    def acquit(self, names: Collection[str]) -> None:
        """A comparison confirmed these parameters."""
        for name in names:
            self.suspects.pop(name, None)

    def warn(self, missing: Mapping[str, str]) -> None:
        """Name parameters that no number covers, with the reasons."""
        self.warned.update(missing)
        by_reason: dict[str, list[str]] = {}
        for name, reason in missing.items():
            by_reason.setdefault(_cause(reason), []).append(name)
        if by_reason:
            said = []
            for reason, names in by_reason.items():
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                said.append(f"{', '.join(names[:NAMED])}{more} ({reason})")
            text = printable("; ".join(said))
            warnings.warn(f"taskgrad: left out of every number, see tracker.coverage(): {text}", stacklevel=2)


def _cause(reason: str) -> str:
    """A reason without the place that it names, where the rest says the same of many."""
    place, colon, rest = reason.partition(": ")
    return rest if colon and " " not in place and rest.startswith("no rule for") else reason
