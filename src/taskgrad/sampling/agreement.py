"""One ledger on all ranks: rank 0's entries are taken, and ranks whose ledgers differ stop."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from .arrays import IntArray
from .quota import ONE

_TOLERANCE = ONE >> 20  # what rounding on another machine may make of the same report

_DIFFERS = {
    1: "another ledger: other arguments, data or loaded states",
    2: "a decision where rank 0 has none, or none where it has one: other reports, or update() called otherwise",
    3: "other weights from the same policy: other reports",
}


def world(group: dist.ProcessGroup | None = None) -> int:
    """Ranks of ``group`` (``None``: of the default one), 1 without any."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class Agreement:
    """The ranks that draw the parts of one stream. Every method is a collective call."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        on_host = "cpu" in str(dist.get_backend_config(group))
        self._device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())

    def agree(self, digest: str, weights: IntArray | None, drawn: int, tasks: int) -> tuple[IntArray | None, int]:
        """Rank 0's ``weights`` int64 [T] (``None``: nothing to enter), and the most batches drawn by any rank.

        ``digest``: of this rank's ledger. Raises RuntimeError, on every rank, where one has another ledger or decision.
        """
        own = np.zeros(5 + tasks, dtype=np.int64)
        own[:4] = np.frombuffer(bytes.fromhex(digest), dtype="<i8")
        if weights is not None:
            own[4], own[5:] = 1, weights
        packet = torch.from_numpy(own.copy()).to(self._device)
        dist.broadcast(packet, group=self._group, group_src=0)
        first = packet.cpu().numpy()
        differs = 0
        if not np.array_equal(own[:4], first[:4]):
            differs = 1
        elif own[4] != first[4]:
            differs = 2
        elif np.abs(own[5:] - first[5:]).max() > _TOLERANCE:
            differs = 3
        mine = torch.tensor([drawn, differs], dtype=torch.int64, device=self._device)
        ranks = dist.get_world_size(self._group)
        found = torch.empty(2 * ranks, dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(found, mine, group=self._group)
        pairs = found.view(ranks, 2).tolist()
        wrong = {rank: _DIFFERS[kind] for rank, (_, kind) in enumerate(pairs) if kind}
        if wrong:
            raise RuntimeError(
                f"the samplers of the ranks differ from rank 0's ({wrong}): build them alike, load the same state on "
                "every rank, and give track() the process_group of these ranks"
            )
        agreed = None if not first[4] else np.array(first[5:])
        return agreed, max(pair[0] for pair in pairs)
