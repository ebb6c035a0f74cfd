"""Two gloo processes: whatever one rank does alone, the reports are the same on both and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import taskgrad as tg
from tests.utils.ranks import on_two_ranks

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.slow,
]

STEPS = 5


def plain(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    with tracker.batch(ids) as b:
        loss = forward()
        b.losses(loss)
        loss.mean().backward()


def no_batch_on_one(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    """Its forward has no gradient of its own: an empty shard, kept in step by a loss of zero."""
    if rank == 1 and step % 2:
        (0 * forward().mean()).backward()
    else:
        plain(rank, step, forward, tracker, ids)


def untracked_on_one(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    if rank == 1 and step == 2:
        forward().mean().backward()
    else:
        plain(rank, step, forward, tracker, ids)


def never_tracked_on_one(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    if rank == 1:
        (0 * forward().mean()).backward()
    else:
        plain(rank, step, forward, tracker, ids)


def losses_on_one(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    with tracker.batch(ids) as b:
        loss = forward()
        if rank == 0 or step == STEPS - 1:
            b.losses(loss)
        loss.mean().backward()


def bad_ids_on_one(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    if rank == 1 and step == 1:
        with pytest.raises(ValueError, match="ids must lie"):
            tracker.batch(ids + 7)
        (0 * forward().mean()).backward()
    else:
        plain(rank, step, forward, tracker, ids)


def unattributed_on_one(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    """Ids that fit nothing."""
    plain_ids = torch.cat([ids, ids]) if rank == 1 and step == 1 else ids
    with tracker.batch(plain_ids):
        forward().mean().backward()


def tasks_of_their_own(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    plain(rank, step, forward, tracker, torch.full_like(ids, rank))


def micro_batches(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    for _ in range(2):
        plain(rank, step, forward, tracker, ids)


def clipped_on_one(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    plain(rank, step, forward, tracker, ids)
    if rank == 1 and step == 2:
        torch.nn.utils.clip_grad_value_(tracker.model.parameters(), 1e-4)


LOOPS = {
    f.__name__: f
    for f in (
        plain, no_batch_on_one, untracked_on_one, never_tracked_on_one, losses_on_one, bad_ids_on_one,
        unattributed_on_one, tasks_of_their_own, micro_batches, clipped_on_one,
    )
}  # fmt: skip


def thawed(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    """A layer thawed on both ranks in a step in which one of them enters no batch."""
    if rank == 1 and step == 2:
        (0 * forward().mean()).backward()
    else:
        plain(rank, step, forward, tracker, ids)


def no_first_batch(rank: int, step: int, forward: Callable[..., Any], tracker: Any, ids: torch.Tensor) -> None:
    """The other rank checks its rows meanwhile."""
    if rank == 1 and step == 0:
        (0 * forward().mean()).backward()
    else:
        plain(rank, step, forward, tracker, ids)


LOOPS |= {f.__name__: f for f in (thawed, no_first_batch)}


def train(rank: int, loop: str, view: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """``view`` also tells whether the wrapper is tracked or what is in it."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5).eval(), nn.Tanh(), nn.Linear(5, 3)).double()
    model.requires_grad_(True)
    model[1].requires_grad_(False)  # type: ignore[index]
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    wrapped = DistributedDataParallel(
        model, gradient_as_bucket_view=view, find_unused_parameters=loop in ("no_batch_on_one",)
    )
    if loop == "thawed":
        model[3].requires_grad_(False)  # type: ignore[index]
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    tracker = tg.track(wrapped if view else model, ["a", "b"], optimizer)
    reports = []
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        x, ids = torch.randn(6, 4, dtype=torch.float64), torch.randint(-1, 2, (6,))
        if loop == "thawed" and step == 2:
            model[3].requires_grad_(True)  # type: ignore[index]
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        LOOPS[loop](rank, step, lambda x=x, wrapped=wrapped: wrapped(x).square().sum(1), tracker, ids)
        optimizer.step()
        reports.append({**tracker.report().to_dict(), "unattributed": sorted(tracker.coverage().unattributed)})
        optimizer.zero_grad()
    return reports, sorted(tracker.coverage().unattributed)


def every_loop(rank: int) -> dict[str, Any]:
    return {f"{loop}/{view}": train(rank, loop, view) for loop in LOOPS for view in (False, True)}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_two_ranks(every_loop)


@pytest.mark.parametrize("view", [False, True], ids=["buckets", "views"])
@pytest.mark.parametrize("loop", LOOPS)
def test_both_ranks_say_the_same(found: list[dict[str, Any]], loop: str, view: bool) -> None:
    (reports, out), (others, others_out) = (f[f"{loop}/{view}"] for f in found)
    if loop == "clipped_on_one":  # from then on the ranks have other parameters
        for report in [*reports, *others]:
            for name in report.keys() - {"valid", "reason", "gram", "loss", "examples"}:
                report[name] = None
    assert reports == others and out == others_out
    valid = [r["valid"] for r in reports]
    if loop in ("untracked_on_one", "clipped_on_one"):
        assert valid == [True, True, False, True, True], reports[2]["reason"]
    elif loop == "unattributed_on_one":
        assert valid == [True, False, True, True, True], reports[1]["reason"]
    else:
        assert all(valid), [r["reason"] for r in reports]
    assert out == []
    given = [r["loss"] is not None for r in reports]
    if loop == "losses_on_one":
        assert given == [False] * (STEPS - 1) + [True]
    if loop == "tasks_of_their_own":
        assert reports[-1]["examples"] == [6, 6] and reports[-1]["gram"][0][1] != 0
