"""What the numbers of a tracker are about."""

from __future__ import annotations

from dataclasses import dataclass

from .._text import printable


@dataclass(frozen=True)
class Coverage:
    """Which trainable parameters the numbers cover.

    Attributes:
        attributed: names of the parameters whose gradient is split by task.
        unattributed: name of every other trainable parameter, and the reason.
        fraction: share of the trainable numbers (elements) that is attributed.
        unverified: why the rows of the layers were not checked by perturbation (``tracker.verify``); ``None`` where
            they were.
    """

    attributed: tuple[str, ...]
    unattributed: dict[str, str]
    fraction: float
    unverified: str | None

    @property
    def verified(self) -> bool:
        """Whether the rows of every layer were checked by perturbation."""
        return self.unverified is None

    def __str__(self) -> str:
        head = f"{self.fraction:.1%} of the trainable elements attributed, in {len(self.attributed)} parameters"
        lines = [head + ("" if self.verified else f"; rows not verified: {printable(self.unverified or '')}")]
        lines += [f"  not attributed: {printable(f'{name}: {reason}')}" for name, reason in self.unattributed.items()]
        return "\n".join(lines)
