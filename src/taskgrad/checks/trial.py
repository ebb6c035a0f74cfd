"""What one batch says about the rows of every layer: the passes compared, on the device, read once at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fingerprint import Trace, merge
from .moves import Move, Moved

MIXED = "rows of other examples change with an example: its rows are not the batch's, or examples mix"
STUCK = "its rows differ, yet do not move with the examples: they are not the batch's"
SHUFFLED = "its rows are those of the examples in another order"
SHIFTED = "a token's row does not change with the token: its rows are not in the order of the ids"
REASONS = (MIXED, STUCK, SHUFFLED, SHIFTED)

NO_INPUT = "no tensor of the model's input has the shape of the ids as its leading dimensions"
ALIKE = "the batch has too few examples or tokens that differ"
NO_LAYER = "no layer was seen that works on the rows of the batch"

APART = 4  # times rounding: rows that differ by less are not expected to be told apart
SAME = 1e-5  # of the norm: as the same row comes out at another place

Row = tuple[Tensor, Tensor]  # sums and norms, see ``Trace.rows``


@dataclass
class Trial:
    """The passes of one batch.

    Attributes:
        base: the forward on the batch as it is.
        passes: on moved inputs: two with examples moved, and with ids per token two with tokens moved.
        error: a pass could not be run, and why.
        failing: site name -> reason, once ``verdict`` was asked.
        seen: names of the sites whose rows were compared, then.
    """

    base: Trace
    passes: list[tuple[Move, Moved, Trace]] = field(default_factory=list)
    error: str | None = None
    failing: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    @property
    def doubtful(self) -> bool:
        return any(moved.doubtful for _, moved, _ in self.passes)

    def verdict(self) -> str | None:
        """Why this batch cannot tell, or ``None``; then ``failing`` holds what it told. Waits for the device once."""
        if self.error is not None:
            return self.error
        for trace in (self.base, *(trace for _, _, trace in self.passes)):
            if trace.error is not None:
                return trace.error
        base = self.base.rows
        if any(moved.differs is None for _, moved, _ in self.passes):
            return NO_INPUT
        device = next((sums.device for sums, _ in base.values()), torch.device("cpu"))
        comparisons = [self._comparison(move, moved, device) for move, moved, _ in self.passes]
        rounding = max(trace.rounding for trace in (self.base, *(trace for _, _, trace in self.passes)))
        names, faults = [], []
        for key, row in base.items():
            others = [trace.rows.get(key) for _, _, trace in self.passes]
            rows = [other for other in others if other is not None and other[0].shape == row[0].shape]
            if not rows:  # a call that takes place with gradients only
                continue
            if len(rows) < len(others):  # whether it takes place depends on where the examples are
                fault = torch.tensor([True, False, False, False], device=device)
            else:
                examples = [c.examples(row, other, rounding) for c, other in zip(comparisons[:2], rows, strict=False)]
                mixed, told, moved, shuffled = torch.stack(examples).any(0)
                shifted = torch.zeros_like(mixed)
                if len(rows) > 2:
                    shifted = shifted_tokens(row, rows[2:], comparisons[2:], rounding)
                fault = torch.stack([mixed, told & ~moved, shuffled, shifted])
            names.append(key[0])
            faults.append(fault)
        if not faults:
            return NO_LAYER
        told = torch.stack([c.real.any() for c in comparisons]).all()
        found = torch.cat([told.view(1), torch.stack(faults).flatten()]).tolist()
        if not found[0]:
            return ALIKE
        self.seen.update(names)
        for name, fault in zip(
            names, torch.tensor(found[1:], device="cpu").view(-1, len(REASONS)).tolist(), strict=True
        ):
            for reason, wrong in zip(REASONS, fault, strict=True):
                if wrong:
                    self.failing.setdefault(name, reason)
        return None

    def _comparison(self, move: Move, moved: Moved, device: torch.device) -> Comparison:
        assert moved.differs is not None
        places = move.moved.nonzero().squeeze(1)
        distinct = torch.tensor(False, device=device)
        if moved.contents is not None and len(places) > 1:
            mixed = moved.contents[places.to(moved.contents.device)].sum(1).sort().values
            distinct = (mixed.diff() > 1e-9 * mixed.abs().max()).all()
        real = moved.differs
        if move.dim == 1 and len(move.source) == 1:
            real = torch.ones_like(real)  # sequences of one token: nothing to tell
        return Comparison(
            move.source.to(device), move.moved.to(device), places.to(device), real.to(device), distinct.to(device)
        )


@dataclass
class Comparison:
    """What to expect of a pass, on the device of the rows.

    Attributes:
        source, moved: of the ``Move``, [n].
        places: the places that moved.
        real: bool [B], or [B, S] where tokens moved: what came there is not what was there.
        distinct: whether no two examples that moved are the same.
    """

    source: Tensor
    moved: Tensor
    places: Tensor
    real: Tensor
    distinct: Tensor

    def examples(self, base: Row, other: Row, rounding: float) -> Tensor:
        """Bool [4]: a row that stood still changed; rows that moved can be told apart; one of these changed; they came
        out in another order."""
        (before, size), (after, after_size) = merge(*base), merge(*other)
        limit = rounding * torch.maximum(size, after_size)
        changed = (before - after).abs() > limit
        came = before[self.source]
        apart = (came - before).abs() > APART * rounding * torch.maximum(size, size[self.source])
        mixed = (changed & ~self.moved).any()
        # dropout's masks stay where they are, so a right layer's rows need not come out as they were elsewhere; where
        # all of them do, they must do so at the places where their examples are now
        first, second = before[self.places].sort().values, after[self.places].sort().values
        same = ((first - second).abs() <= SAME * size.max()).all()
        wrong = ((after - came).abs() > APART * limit)[self.places].any()
        told, moved = (apart & self.real).any(), (changed & self.real).any()
        return torch.stack([mixed, told, moved, same & wrong & self.distinct])


def shifted_tokens(base: Row, rows: list[Row], comparisons: list[Comparison], rounding: float) -> Tensor:
    """Whether at some place of the sequence most rows change with other tokens but not with their own."""
    sums, norms = base
    first, second = [(sums - other).abs() > rounding * torch.maximum(norms, size) for other, size in rows]
    here, there = comparisons
    own = torch.where(here.moved, first, second)
    others = torch.where(here.moved, second, first)
    real = torch.where(here.moved, here.real, there.real)
    return ((real & ~own & others).sum(0) > (real & own).sum(0)).any()
