"""One ledger on all ranks: rank 0's entries are taken, and ranks that differ stop."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .._gloo_exit import wait_at_exit
from .arrays import IntArray
from .engine.quota import ONE

if TYPE_CHECKING:
    import torch.distributed as dist

_TOLERANCE = ONE >> 20  # what rounding on another machine may make of the same report
_HEAD = 6  # numbers before the weights: digest (4), whether there is a decision, calls until the next agreement

_LEDGER, _DECISION, _WEIGHTS = 1, 2, 3
_DIFFERS = {
    _LEDGER: "other arguments, other data or another loaded state",
    _DECISION: "a decision where rank 0 has none, or none where it has one: other reports, or another update()",
    _WEIGHTS: "other weights from the same policy: other reports",
}


class Agreed(NamedTuple):
    """``weights`` int64 [T] of rank 0, or ``None``; the most batches ``drawn`` by any rank; ``after`` how many calls
    the ranks agree again."""

    weights: IntArray | None
    drawn: int
    after: int


class Agreement:
    """The ranks that draw the parts of one stream; ``rank``: whose part this one draws."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int) -> None:
        import torch
        import torch.distributed as dist

        self._group, self._rank = group, rank
        wait_at_exit()
        on_host = "cpu" in dist.get_backend_config(group)
        self._device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())

    def agree(self, own: str, tasks: int, weights: IntArray | None, consumed: int, drawn: int, after: int) -> Agreed:
        """A collective call. ``own``: what must be the same on all ranks, of any length; ``weights`` int64 [T]: the
        decision to be entered now, if there is one; ``after``: rank 0's counts.

        Raises RuntimeError, on every rank, where one has other data, another decision or count, or another's part.
        """
        import torch
        import torch.distributed as dist

        mine = np.zeros(_HEAD + tasks, dtype=np.int64)
        mine[:4] = np.frombuffer(hashlib.sha256(own.encode()).digest(), dtype="<i8")
        mine[5] = after
        if weights is not None:
            mine[4], mine[_HEAD:] = 1, weights
        packet = torch.from_numpy(mine.copy()).to(self._device)
        dist.broadcast(packet, group=self._group, group_src=0)
        first = packet.cpu().numpy()
        said = torch.tensor([_differs(mine, first), consumed, drawn, self._rank], device=self._device)
        ranks = dist.get_world_size(self._group)
        found = torch.empty(ranks * len(said), dtype=said.dtype, device=self._device)
        dist.all_gather_into_tensor(found, said, group=self._group)
        said_by = found.view(ranks, -1).tolist()
        _refuse([each[0] for each in said_by], [each[1] for each in said_by], [each[3] for each in said_by])
        agreed = np.array(first[_HEAD:]) if first[4] else None
        return Agreed(agreed, max(each[2] for each in said_by), int(first[5]))


def _differs(mine: IntArray, first: IntArray) -> int:
    if not np.array_equal(mine[:4], first[:4]):
        return _LEDGER
    if mine[4] != first[4]:
        return _DECISION
    return _WEIGHTS if np.abs(mine[_HEAD:] - first[_HEAD:]).max() > _TOLERANCE else 0


def _refuse(differs: list[int], consumed: list[int], parts: list[int]) -> None:
    if sorted(parts) != list(range(len(parts))):
        raise RuntimeError(f"the ranks draw the parts {parts} of the global batch: give each sampler a rank of its own")
    if len(set(consumed)) > 1:
        raise RuntimeError(
            f"the ranks have counted {consumed} batches: every rank must count every batch of its loader; for one "
            "without a tracker.batch() (an empty part, say) call sampler.advance() there"
        )
    wrong = {rank: _DIFFERS[kind] for rank, kind in enumerate(differs) if kind}
    if wrong:
        raise RuntimeError(
            f"the samplers of some ranks differ from rank 0's ({wrong}): build them alike, load the same state on "
            "every rank, and give track() the process_group of these ranks"
        )
