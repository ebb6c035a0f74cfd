"""Cosines between tasks from a step's Gram, and what sketching adds to their error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..capture.sketch import SketchMap

Floats = npt.NDArray[np.float64]


@np.errstate(all="ignore")
def cosines(gram: Floats) -> tuple[Floats, Floats]:
    """From the Gram of tasks and rest [T + 1, T + 1]: the cosine [T, T] and cos(g − g_t, g_t) [T]; NaN for zero
    vectors."""
    tasks = len(gram) - 1
    square = gram.diagonal()
    norm = np.sqrt(np.where(square > 0, square, np.nan))
    with_all = gram.sum(1)
    others_square = gram.sum() - 2 * with_all + square
    # a difference of large numbers: without other rows it is rounding
    others = np.sqrt(np.where(others_square > 1e-12 * square.sum(), others_square, np.nan))
    cosine = gram / (norm[:, None] * norm[None, :])
    return cosine[:tasks, :tasks], ((with_all - square) / (norm * others))[:tasks]


def cosine_error(block: Tensor, gram: Tensor, maps: Sequence[SketchMap]) -> Tensor:
    """Standard error of the cosines of sketched vectors.

    Every row of a sketched matrix (and every column, and every bucket) is an unbiased estimate by itself. The spread of
    these estimates gives the error of their mean; rows and columns are added, which errs on the large side; where most
    of the Hadamard columns were drawn the error shrinks accordingly. The cosine's is linearised.

    Args:
        block: [T, K], float64, the sketches of all parameters side by side, in the order of ``maps``.
        gram: [T, T], their Gram.
        maps: the maps of the parameters, on any device: only their shapes are read.

    Returns:
        [T, T] float64, NaN where a vector is zero, 0 where nothing was sketched.
    """
    square = gram.diagonal()
    norm = torch.where(square > 0, square, torch.nan).sqrt()
    cosine = gram / (norm[:, None] * norm[None, :])
    variance = torch.zeros_like(gram) * cosine
    unit = block / norm[:, None]
    start = 0
    for sketch in maps:
        part = unit[:, start : start + sketch.dim]
        start += sketch.dim
        if sketch.exact:
            continue
        for groups, drawn in _groups(part, sketch):
            products = torch.einsum("sgj,tgj->gst", groups, groups)
            own = products.diagonal(dim1=1, dim2=2)
            influence = products - 0.5 * cosine * (own[:, :, None] + own[:, None, :])
            count = influence.shape[0]
            variance += count * influence.var(0) * (1 - drawn)
    return variance.sqrt()


def _groups(part: Tensor, sketch: SketchMap) -> list[tuple[Tensor, float]]:
    """The sketch [T, dim] as independent estimates [T, groups, rest], with the share of all groups that was drawn."""
    if sketch.left is not None and sketch.left.dtype == torch.int64:
        return [(part[:, :, None], 0.0)]
    r0 = sketch.left.shape[1] if sketch.left is not None else sketch.shape[0]
    matrix = part.reshape(part.shape[0], r0, -1)
    found = []
    for side, view in ((sketch.left, matrix), (sketch.right, matrix.mT)):
        if side is not None:
            d, r = side.shape
            found.append((view, (r - 1) / max(1, (1 << (d - 1).bit_length()) - 1)))
    return found
