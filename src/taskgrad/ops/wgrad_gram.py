"""``wgrad_gram``: the weight gradient of a linear layer and the exact Gram of its tasks' parts, in one kernel.

With X_s, dY_s the rows of segment s (a task, or the rows of no task), G_s = dY_sᵀ X_s is that segment's part of the
weight gradient:

    dW         = sum_s G_s              [d_out, d_in]
    gram[s, t] = <G_s, G_t>             [S, S] float64

Splitting the product by segment costs no multiplications, and both results are sums over tiles of dW. So a tile's S
parts are all that is alive at a time (on a CPU: a panel of rows), never S gradients of the layer.

Not for a weight that is used more than once in a step: the Gram of a sum is not the sum of Grams.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .segment_sum import stat_dtype
from .sum_gram import DTYPES, triton_obstacle
from .wgrad_sketch import masked_products

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference runs on its GPUs
    triton = None

PANEL_BYTES = 8 << 20  # of a CPU's panel, S blocks of rows: it stays in a last-level cache between product and Gram

torch.library.define(
    "taskgrad::wgrad_gram", "(Tensor dy, Tensor x, Tensor offsets, bool tf32) -> (Tensor dw, Tensor gram)"
)
torch.library.define(
    "taskgrad::wgrad_gram_into", "(Tensor dy, Tensor x, Tensor offsets, Tensor(a!) into, bool tf32) -> Tensor gram"
)


def wgrad_gram(
    dy: Tensor, x: Tensor, offsets: Tensor, *, accumulate_into: Tensor | None = None, tf32: bool = False
) -> tuple[Tensor, Tensor]:
    """The weight gradient dYᵀ X and the inner products of its parts by segment.

    Args:
        dy: [N, d_out], gradient of the output, rows sorted by segment; float32, float64, bfloat16 or float16.
        x: [N, d_in], input, same dtype and device. Both of any strides (copied if columns are not adjacent).
        offsets: int32 or int64 [S + 1], segment s owns rows ``offsets[s]:offsets[s + 1]``; from 0 to N, segments may be
            empty. On the CPU, or for CUDA inputs on their device, where its values are never looked at by the host.
        accumulate_into: float32 (float64 for float64 inputs) [d_out, d_in] with adjacent columns; dW is added to it in
            place, unrounded, and it is returned.
        tf32: let a GPU round float32 inputs to TF32, for its tensor cores.

    Returns:
        dW [d_out, d_in] in the dtype of ``dy`` (or ``accumulate_into``) and the Gram [S, S] in float64, symmetric to
        the bit. Products of 16-bit inputs are accumulated in float32. Neither carries a gradient.

    Raises:
        TypeError: a dtype or device is none of the above.
        ValueError: a shape, stride or the offsets (where they are on the CPU) are none of the above.
    """
    check_rows(dy, x, offsets)
    dy, x = dy.detach(), x.detach()
    if accumulate_into is None:
        dw, gram = torch.ops.taskgrad.wgrad_gram(dy, x, offsets, tf32)
        return dw, gram
    wanted = stat_dtype(dy)
    if accumulate_into.dtype != wanted or accumulate_into.device != dy.device:
        raise TypeError(
            f"accumulate_into must be {wanted} on {dy.device}, got {accumulate_into.dtype} on {accumulate_into.device}"
        )
    shape = (dy.shape[1], x.shape[1])
    if tuple(accumulate_into.shape) != shape:
        raise ValueError(f"accumulate_into must have shape {list(shape)}, got {list(accumulate_into.shape)}")
    if accumulate_into.stride(1) != 1:
        raise ValueError(
            f"accumulate_into must have adjacent columns, got strides {accumulate_into.stride()}: pass a row-major one"
        )
    return accumulate_into, torch.ops.taskgrad.wgrad_gram_into(dy, x, offsets, accumulate_into.detach(), tf32)


def check_rows(dy: Tensor, x: Tensor, offsets: Tensor) -> None:
    """Raise unless ``dy``, ``x`` [N, ·] and ``offsets`` [S + 1] are rows sorted by segment, as ``wgrad_gram`` says."""
    if dy.dtype not in DTYPES:
        raise TypeError(f"dy must be float32, float64, bfloat16 or float16, got {dy.dtype}: convert it first")
    if dy.device.type not in ("cpu", "cuda"):
        raise TypeError(f"dy must be on a cpu or cuda device, got {dy.device}: move it with .to() first")
    if x.dtype != dy.dtype or x.device != dy.device:
        raise TypeError(f"x must be {dy.dtype} on {dy.device} as dy is, got {x.dtype} on {x.device}: use x.to(dy)")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}: use offsets.long()")
    if offsets.device != dy.device and offsets.device.type != "cpu":
        raise TypeError(f"offsets must be on {dy.device} as dy is, or on the cpu, got {offsets.device}")
    if dy.dim() != 2 or x.dim() != 2 or x.shape[0] != dy.shape[0]:
        raise ValueError(
            f"dy and x must have shapes [N, d_out] and [N, d_in], got {list(dy.shape)} and {list(x.shape)}: "
            "flatten their leading dimensions first"
        )
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must have shape [S + 1], got {list(offsets.shape)}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != dy.shape[0] or sorted(bounds) != bounds:
            raise ValueError(f"offsets must rise from 0 to N = {dy.shape[0]}, got {bounds}")


def reference(dy: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``wgrad_gram`` in plain torch, dW unrounded. Rows are masked, so that no value of ``offsets`` is looked at."""
    wide_dy, wide_x = dy.to(stat_dtype(dy)), x.to(stat_dtype(x))
    segments = offsets.shape[0] - 1
    dw = wide_dy.new_empty(dy.shape[1], x.shape[1])
    gram = wide_dy.new_zeros(segments, segments, dtype=torch.float64)
    for rows, columns in zip(dw.split(128), wide_dy.split(128, dim=1), strict=True):
        parts = masked_products(columns, wide_x, offsets)
        torch.sum(parts, 0, out=rows)
        wide = parts.flatten(1).double()
        gram.addmm_(wide, wide.mT)
    return dw, (gram + gram.mT) / 2


def panels(dy: Tensor, x: Tensor, offsets: Tensor, dw: Tensor, *, accumulate: bool) -> Tensor:
    """The CPU's way: write (or add) dW into ``dw`` by panels of its rows and return the Gram."""
    bounds = offsets.tolist()
    segments, width = len(bounds) - 1, x.shape[1]
    gram = dy.new_zeros(segments, segments, dtype=torch.float64)
    wide_dy, wide_x = dy.to(stat_dtype(dy)), x.to(stat_dtype(x))
    room = PANEL_BYTES // max(1, segments * width * wide_x.itemsize)
    height = max(64, room - room % 16)  # a product of fewer rows than that leaves MKL idle
    for rows, columns in zip(dw.split(height), wide_dy.split(height, dim=1), strict=True):
        parts = wide_x.new_empty(segments, rows.shape[0], width)
        for part, (start, end) in zip(parts, pairwise(bounds), strict=True):
            if end > start:
                torch.mm(columns[start:end].mT, wide_x[start:end], out=part)
            else:
                part.zero_()
        total, products = torch.ops.taskgrad.sum_gram(parts.view(segments, rows.numel()))
        gram += products
        rows.add_(total.view_as(rows)) if accumulate else rows.copy_(total.view_as(rows))
    return gram


@torch.library.register_fake("taskgrad::wgrad_gram")  # type: ignore[untyped-decorator]
def _fake(dy: Tensor, x: Tensor, offsets: Tensor, tf32: bool) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[1], x.shape[1]), _fake_into(dy, x, offsets, dy, tf32)


@torch.library.register_fake("taskgrad::wgrad_gram_into")  # type: ignore[untyped-decorator]
def _fake_into(dy: Tensor, x: Tensor, offsets: Tensor, into: Tensor, tf32: bool) -> Tensor:
    segments = offsets.shape[0] - 1
    return dy.new_empty(segments, segments, dtype=torch.float64)


@torch.library.impl("taskgrad::wgrad_gram", "CPU")
def _cpu(dy: Tensor, x: Tensor, offsets: Tensor, tf32: bool) -> tuple[Tensor, Tensor]:
    dw = dy.new_empty(dy.shape[1], x.shape[1])
    return dw, panels(dy, x, offsets, dw, accumulate=False)


@torch.library.impl("taskgrad::wgrad_gram_into", "CPU")
def _cpu_into(dy: Tensor, x: Tensor, offsets: Tensor, into: Tensor, tf32: bool) -> Tensor:
    return panels(dy, x, offsets, into, accumulate=True)


@torch.library.impl("taskgrad::wgrad_gram", "CUDA")
def _cuda(dy: Tensor, x: Tensor, offsets: Tensor, tf32: bool) -> tuple[Tensor, Tensor]:
    dw = dy.new_empty(dy.shape[1], x.shape[1])
    return dw, _on_gpu(dy, x, offsets, dw, accumulate=False, tf32=tf32)


@torch.library.impl("taskgrad::wgrad_gram_into", "CUDA")
def _cuda_into(dy: Tensor, x: Tensor, offsets: Tensor, into: Tensor, tf32: bool) -> Tensor:
    return _on_gpu(dy, x, offsets, into, accumulate=True, tf32=tf32)


def _on_gpu(dy: Tensor, x: Tensor, offsets: Tensor, dw: Tensor, *, accumulate: bool, tf32: bool) -> Tensor:
    offsets = offsets.to(dy.device, non_blocking=True)
    empty = dw.numel() == 0 or offsets.shape[0] == 1
    if empty or dy.dtype == torch.float64 or triton_obstacle(dy.device) is not None:
        total, gram = reference(dy, x, offsets)
        dw.add_(total) if accumulate else dw.copy_(total)
        return gram
    with torch.cuda.device(dy.device):
        properties = torch.cuda.get_device_properties(dy.device)
        processors = properties.multi_processor_count
        tile = tile_config(dy.dtype, tf32, dw.shape[0], dw.shape[1], processors, properties.major)
        programs = processors * (2 if tile.warps == 4 else 1)
        return launch(dy, x, offsets, dw, tile, programs, accumulate=accumulate, tf32=tf32)


# ----------------------------------------------------------------------------------------------------------
# Triton. One program per multiprocessor, each takes output tiles p, p + P, p + 2P, ...:
#
#     dy, x     [N, d_out], [N, d_in]   row n at base + n * stride; rows of segment s: offsets[s] <= n < offsets[s + 1]
#     part      [HEIGHT, WIDTH]         tile of G_s, fp32, in registers; total: their sum over s, the tile of dW
#     scratch   [P, S, HEIGHT * WIDTH]  part of every s, one program to a slice, which it uses again for every tile
#     gram      [SPLIT, SEG, SEG]       products of the tile's parts, fp32: a batched product, one warp to a batch,
#                                       because one product of SEG x SEG has work for one warp only
#     partials  [P, B * SEG, B * SEG]   fp64, over the program's tiles; blocks i <= j of B; added in a fixed order
#
# NOTES: the scratch of one tile is S * 32 KiB (128 x 128, 16 bits). With 132 programs and S = 9 that is 37 MiB, which
# stays in the L2 of an H100; with more segments it spills over to memory, to traffic of at most what the S gradients
# in 16 bits would cost, while every product is still done once. Blocks of SEG segments are then read in pairs.
#
# NOTES: parts are rounded to bfloat16 for 16-bit inputs (float16 would overflow where the sum does not): errors of
# 2^-9 of mean zero in each of thousands of terms of an inner product. dW is not rounded before its end.


class Tile(NamedTuple):
    """Output tile, rows per step of the product, launch shape, and columns per warp and step of the Gram."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int
    chunk: int


def tile_config(dtype: torch.dtype, tf32: bool, d_out: int, d_in: int, processors: int, major: int) -> Tile:
    """The largest tile that spills no registers on this compute capability, smaller where it would leave a GPU idle."""
    if dtype == torch.float32 and not tf32:  # on the FMA units
        return Tile(128, 64, 16, 8, 3, 16)
    depth, chunk = (32, 32) if dtype == torch.float32 else (64, 128)
    if major == 8:  # mma.sync takes its operands from registers
        return Tile(64, 64, 32, 4, 3, 32) if dtype == torch.float32 else Tile(128, 64, 64, 8, 3, 64)
    if -(-d_out // 128) * -(-d_in // 128) < processors:
        return Tile(64, 128, depth, 4, 3, chunk // 2)
    return Tile(128, 128, depth, 8, 3, chunk)


GROUP = 8  # tiles of neighbouring programs form blocks of this height: they share columns of dy and x in L2
SEGMENTS = 16  # per block of the Gram: what tl.dot needs at least

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def wgrad_gram_kernel(  # type: ignore[no-untyped-def]
        dy,  # [N, d_out]
        x,  # [N, d_in]
        offsets,  # [S + 1]
        dw,  # [d_out, d_in]
        scratch,
        partials,
        S,
        d_out,
        d_in,
        dy_stride,
        x_stride,
        dw_stride,
        HEIGHT: tl.constexpr,
        WIDTH: tl.constexpr,
        DEPTH: tl.constexpr,
        SEG: tl.constexpr,
        SPLIT: tl.constexpr,
        CHUNK: tl.constexpr,
        GROUP: tl.constexpr,
        ONE_BLOCK: tl.constexpr,  # S <= SEG
        ACCUMULATE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        tiles_down, tiles_across = tl.cdiv(d_out, HEIGHT), tl.cdiv(d_in, WIDTH)
        blocks = tl.cdiv(S, SEG)
        TILE: tl.constexpr = HEIGHT * WIDTH
        STEP: tl.constexpr = SPLIT * CHUNK
        own_scratch = scratch + program * S * TILE
        own_partials = partials + program * (blocks * SEG) * (blocks * SEG)
        segment = tl.arange(0, SEG)
        in_step = tl.arange(0, SPLIT)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
        in_block = segment[:, None] * (blocks * SEG) + segment[None, :]

        for tile in range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0)):
            group = tile // (GROUP * tiles_across)
            within = tile % (GROUP * tiles_across)
            down = tl.minimum(tiles_down - group * GROUP, GROUP)
            m = (group * GROUP + within % down) * HEIGHT + tl.arange(0, HEIGHT)
            n = (within // down) * WIDTH + tl.arange(0, WIDTH)

            total = tl.zeros((HEIGHT, WIDTH), tl.float32)
            for s in range(S):
                start = tl.load(offsets + s).to(tl.int64)
                end = tl.load(offsets + s + 1).to(tl.int64)
                part = tl.zeros((HEIGHT, WIDTH), tl.float32)
                for i in range(tl.cdiv(end - start, DEPTH).to(tl.int32)):
                    row = start + i * DEPTH + tl.arange(0, DEPTH)
                    inside = (row < end)[:, None]
                    a = tl.load(dy + row[:, None] * dy_stride + m[None, :], inside & (m < d_out)[None, :], other=0.0)
                    b = tl.load(x + row[:, None] * x_stride + n[None, :], inside & (n < d_in)[None, :], other=0.0)
                    part = tl.dot(tl.trans(a), b, part, input_precision=PRECISION)
                total += part
                # The order within the tile is left to the compiler, who then needs no exchange between threads:
                # it is one order for all s, because this is one statement, and inner products do not see it.
                flat = tl.reshape(part.to(scratch.dtype.element_ty), (TILE,), can_reorder=True)
                tl.store(own_scratch + s * TILE + tl.arange(0, TILE), flat)

            out = dw + m.to(tl.int64)[:, None] * dw_stride + n[None, :]
            keep = (m < d_out)[:, None] & (n < d_in)[None, :]
            if ACCUMULATE:
                total += tl.load(out, mask=keep, other=0.0)
            tl.store(out, total.to(dw.dtype.element_ty), mask=keep)

            # What is loaded below was stored by other threads of this program. The barrier (bar.sync) orders memory
            # accesses before it ahead of those after it for all threads of the block, global memory included, and no
            # other block touches this slice. Stores and loads go through the same L1 (loads are ld.global, never .nc).
            tl.debug_barrier()
            for i in range(blocks):
                for j in range(i, blocks):
                    here, there = i * SEG + segment, j * SEG + segment
                    here_at = own_scratch + here.to(tl.int64)[None, :, None] * TILE + in_step
                    there_at = own_scratch + there.to(tl.int64)[None, :, None] * TILE + in_step
                    left = tl.load(here_at, mask=(here < S)[None, :, None], other=0.0)
                    right = left if ONE_BLOCK else tl.load(there_at, mask=(there < S)[None, :, None], other=0.0)
                    gram = tl.zeros((SPLIT, SEG, SEG), tl.float32)
                    for c in range(STEP, TILE, STEP):  # the next step's loads are under way during this one's product
                        left_next = tl.load(here_at + c, mask=(here < S)[None, :, None], other=0.0)
                        if ONE_BLOCK:
                            right_next = left_next
                        else:
                            right_next = tl.load(there_at + c, mask=(there < S)[None, :, None], other=0.0)
                        gram = tl.dot(left, tl.permute(right, (0, 2, 1)), gram, input_precision=PRECISION)
                        left, right = left_next, right_next
                    gram = tl.dot(left, tl.permute(right, (0, 2, 1)), gram, input_precision=PRECISION)
                    at = own_partials + i * SEG * (blocks * SEG) + j * SEG + in_block
                    before = tl.load(at, mask=tile >= tl.num_programs(0), other=0.0)  # the first tile finds garbage
                    tl.store(at, before + tl.sum(gram, axis=0).to(tl.float64))
            tl.debug_barrier()  # the next tile overwrites the scratch, and may read partials by other threads


def launch(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    dw: Tensor,
    tile: Tile,
    programs: int,
    *,
    accumulate: bool,
    tf32: bool,
    scratch_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run the Triton kernel on non-empty tensors, not float64: dW goes to (or is added to) ``dw``; returns the Gram."""
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    segments = offsets.shape[0] - 1
    blocks = triton.cdiv(segments, SEGMENTS)
    padded = blocks * SEGMENTS
    tiles = triton.cdiv(dw.shape[0], tile.height) * triton.cdiv(dw.shape[1], tile.width)
    programs = min(programs, tiles)
    if scratch_dtype is None:
        scratch_dtype = torch.float32 if dy.dtype == torch.float32 else torch.bfloat16
    scratch = torch.empty(programs, segments, tile.height * tile.width, dtype=scratch_dtype, device=dy.device)
    partials = torch.empty(programs, padded, padded, dtype=torch.float64, device=dy.device)
    wgrad_gram_kernel[(programs,)](
        dy,
        x,
        offsets,
        dw,
        scratch,
        partials,
        segments,
        dw.shape[0],
        dw.shape[1],
        dy.stride(0),
        x.stride(0),
        dw.stride(0),
        HEIGHT=tile.height,
        WIDTH=tile.width,
        DEPTH=tile.depth,
        SEG=SEGMENTS,
        SPLIT=tile.warps,
        CHUNK=tile.chunk,
        GROUP=GROUP,
        ONE_BLOCK=blocks == 1,
        ACCUMULATE=accumulate,
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    gram = partials.sum(0)[:segments, :segments].triu()  # blocks below the diagonal were not written
    return gram + gram.triu(1).mT
