"""``segments_hold``: whether ``order`` and ``offsets`` are what an op needs, and what is done where they are not.

Segment s of the E entries is ``order[offsets[s]:offsets[s + 1]]``, for every op alike. On a CPU malformed ones raise.
On a GPU values are not waited for. Kernels keep every offset and index inside of its tensor, so malformed ones read and
write nothing else; the public functions put NaN into the whole result then (``fault_on_gpu``), which is a
flag that cannot be overlooked and costs no synchronisation. ``torch.ops.taskgrad`` trusts its caller with that: its
result is undefined.

The same stem is in ``csrc/ops`` (CPU) and ``tests/ops``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check
from ._register import Values, register


def within(index: Tensor, size: int) -> Tensor:
    """``index`` as it is on a CPU, where it was checked; on a GPU forced into [0, size): torch would abort the whole
    CUDA context over a value that is not."""
    return index if index.is_cpu else index.clamp(0, max(size - 1, 0))


def segment_of_entries(order: Tensor | None, offsets: Tensor, entries: int) -> Tensor:
    """Segment of every entry [E], in the order in which they were given."""
    positions = torch.arange(entries, dtype=offsets.dtype, device=offsets.device)
    segment = torch.searchsorted(offsets[1:].contiguous(), positions, right=True)
    segment.clamp_(max=max(offsets.shape[0] - 2, 0))  # entries behind malformed offsets are nobody's
    if order is None:
        return segment
    segment = segment.to(order.device, non_blocking=True)
    return torch.zeros_like(segment).index_copy_(0, within(order, entries), segment)


def fault(order: Tensor | None, offsets: Tensor, entries: int) -> Tensor:
    """Scalar bool: whether ``offsets`` or ``order`` are not what ``check_values`` wants. Nothing waits for it."""
    wrong = (offsets[0] != 0) | (offsets[-1] != entries) | (offsets[1:] < offsets[:-1]).any()
    if order is None:
        return wrong
    inside = torch.where((order >= 0) & (order < entries), order, entries)
    seen = torch.zeros(entries + 1, dtype=torch.bool, device=order.device).index_fill_(0, inside, True)
    return wrong.to(order.device, non_blocking=True) | ~seen[:entries].all()


def fault_on_gpu(order: Tensor | None, offsets: Tensor, entries: int) -> Tensor | None:
    """``fault`` where any of it is on a GPU, else ``None``: then it was checked."""
    if offsets.is_cpu and (order is None or order.is_cpu):
        return None
    return fault(order, offsets, entries)


def segments_at(order: int | None, offsets: int) -> Values:
    """What is asked of the values of ``order`` and ``offsets``, for an op that has them in these places and whose first
    argument has the entries in its first dimension."""

    def check(*args: Any) -> None:
        _check.check_values(None if order is None else args[order], args[offsets], args[0].shape[0])

    def fault_of(*args: Any) -> Tensor | None:
        return fault_on_gpu(None if order is None else args[order], args[offsets], args[0].shape[0])

    return Values(check, fault_of)


def _check_arguments(order: Tensor | None, offsets: Tensor, entries: int) -> None:
    _check.check_operand("offsets", offsets, (torch.int64, torch.int32))
    if order is not None:
        _check.check_operand("order", order, (torch.int64,))
    _check.check_segment_shapes(order, offsets, entries)


register(
    "segments_hold(Tensor? order, Tensor offsets, SymInt entries) -> bool",
    check=_check_arguments,
    fake=lambda order, offsets, entries: True,  # nobody knows yet; the op asks when it runs
    reference=lambda order, offsets, entries: not bool(fault(order, offsets, entries)),
    native=True,
)
