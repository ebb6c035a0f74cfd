"""``conv_sketch``: the weight gradient of a convolution and, per task, its sketch, one task's gradient at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import _check
from ._register import register
from .segment_sum import stat_dtype
from .segments import segments_at, within


def conv_sketch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Convolution weight gradient and its unscaled sketch per task.

    The weight-gradient product is split by task, so it is done once in all. G_t is seen as a matrix [C_out, C_in/groups
    · kernel] and sketched as soon as it is there: one extra gradient of the weight's size, whatever the number of
    tasks.

    Args:
        dy: [B, C_out, *out], gradient of the output; one task id per entry of the batch.
        x: [B, C_in, *in], input, same dtype as ``dy``.
        weight: [C_out, C_in / groups, *kernel], of the dtype of ``dy``, for its shape.
        stride, padding, dilation, groups: of the convolution.
        order, offsets: the entries sorted by task, see ``wgrad_sketch``.
        left: [C_out, r0] or ``None`` for the identity.
        right: [C_in / groups · kernel, r1] or ``None`` for the identity.

    Returns:
        dW in the shape and dtype of ``weight`` and S [T + 1, r0, r1], float64 for float64 and float32 otherwise.

    Raises:
        TypeError: a dtype or a device that is not supported.
        ValueError: a shape that is not, options of the convolution that do not lead from ``x`` to ``dy``, or the values
            of ``offsets``, and of ``order`` on a CPU. NaN throughout where ``order`` on a GPU is malformed.
    """
    dw, stats = _OP(dy, x, weight, stride, padding, dilation, groups, order, offsets, left, right)
    return dw, stats


def _check_arguments(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
) -> None:
    _check.check_operand("dy", dy)
    _check.check_like("x", x, "dy", dy)
    _check.check_like("weight", weight, "dy", dy)
    _check.check_segments(order, offsets, "dy", dy)
    _check.check_map("left", left, "dy", dy)
    _check.check_map("right", right, "dy", dy)
    dims = weight.dim() - 2
    if dims not in (1, 2, 3) or dy.dim() != dims + 2 or x.dim() != dims + 2 or x.shape[0] != dy.shape[0]:
        raise ValueError(
            "dy, x and weight must have shapes [B, C_out, *out], [B, C_in, *in] and [C_out, C_in / groups, *kernel], "
            f"1 to 3 dimensions in space, got {list(dy.shape)}, {list(x.shape)} and {list(weight.shape)}"
        )
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != dims or min(values) < least:
            raise ValueError(f"{name} must be {dims} numbers of at least {least}, got {list(values)}")
    if groups < 1 or weight.shape[0] % groups or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"groups must divide C_out = {weight.shape[0]} and be {x.shape[1]} / {weight.shape[1]}, got {groups}"
        )
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    out = [(n + 2 * p - span) // s + 1 for n, p, span, s in zip(x.shape[2:], padding, spans, stride, strict=True)]
    if min(weight.shape[2:]) < 1 or min(out) < 1 or list(dy.shape[1:]) != [weight.shape[0], *out]:
        raise ValueError(
            f"dy must have shape [B, {', '.join(map(str, [weight.shape[0], *out]))}], which the convolution of x with "
            f"weight gives, got {list(dy.shape)}"
        )
    _check.check_segment_shapes(order, offsets, dy.shape[0])
    _check.check_map_shape("left", left, weight.shape[0])
    _check.check_map_shape("right", right, math.prod(weight.shape[1:]))


def _sketches(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not offsets.is_cpu:
        offsets = offsets.cpu()  # this waits
        _check.check_values(None, offsets, dy.shape[0])
    dtype = stat_dtype(dy)
    if order is not None:
        order = within(order, dy.shape[0])
        dy, x = dy.index_select(0, order), x.index_select(0, order)
    bounds = offsets.tolist()
    dw = torch.zeros_like(weight, dtype=dtype)
    stats = _empty(dy, weight, offsets, left, right).zero_()
    zeros = [0] * len(stride)
    for t, (start, end) in enumerate(pairwise(bounds)):
        if end == start:
            continue
        grad = torch.ops.aten.convolution_backward(
            dy[start:end],
            x[start:end],
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            zeros,
            groups,
            [False, True, False],
        )[1].to(dtype)
        dw += grad
        matrix = grad.flatten(1)
        if left is not None:
            matrix = left.to(dtype).mT @ matrix
        if right is not None:
            matrix = matrix @ right.to(dtype)
        stats[t] = matrix
    return dw.to(weight.dtype), stats


def _fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    order: Tensor | None,
    offsets: Tensor,
    left: Tensor | None,
    right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), _empty(dy, weight, offsets, left, right)


def _empty(dy: Tensor, weight: Tensor, offsets: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    r0 = weight.shape[0] if left is None else left.shape[1]
    r1 = math.prod(weight.shape[1:]) if right is None else right.shape[1]
    return dy.new_empty(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))


_OP = register(
    "conv_sketch(Tensor dy, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " SymInt groups, Tensor? order, Tensor offsets, Tensor? left, Tensor? right) -> (Tensor dw, Tensor stats)",
    check=_check_arguments,
    values=segments_at(order=7, offsets=8),
    fake=_fake,
    reference=_sketches,
)
