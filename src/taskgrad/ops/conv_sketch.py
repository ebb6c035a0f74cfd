"""``conv_sketch``: the weight gradient of a convolution and, per task, its sketch, one task's gradient at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .segment_sum import stat_dtype


@torch.library.custom_op("taskgrad::conv_sketch", mutates_args=())
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
        weight: [C_out, C_in / groups, *kernel], for its shape and dtype.
        stride, padding, dilation, groups: of the convolution.
        order, offsets: the entries sorted by task, see ``wgrad_sketch``.
        left: [C_out, r0] or ``None`` for the identity.
        right: [C_in / groups · kernel, r1] or ``None`` for the identity.

    Returns:
        dW in the shape and dtype of ``weight`` and S [T + 1, r0, r1], float64 for float64 and float32 otherwise.
    """
    dtype = stat_dtype(dy)
    if order is not None:
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


@conv_sketch.register_fake
def _(
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
    r1 = weight[0].numel() if right is None else right.shape[1]
    return dy.new_empty(offsets.shape[0] - 1, r0, r1, dtype=stat_dtype(dy))
