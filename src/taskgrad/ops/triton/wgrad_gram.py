"""The Triton kernel of ``wgrad_gram``, see ``taskgrad/ops/wgrad_gram.py``.

One program per multiprocessor, each takes output tiles p, p + P, p + 2P, ...:

    dy, x     [N, d_out], [N, d_in]   row n at base + n * stride; rows of segment s: offsets[s] <= n < offsets[s + 1]
    part      [HEIGHT, WIDTH]         tile of G_s, fp32, in registers; total: their sum over s, the tile of dW
    scratch   [P, S, HEIGHT * WIDTH]  part of every s, one program to a slice, which it uses again for every tile
    gram      [SPLIT, SEG, SEG]       products of the tile's parts, fp32: a batched product, one warp to a batch,
                                      because one product of SEG x SEG has work for one warp only
    partials  [P, B * SEG, B * SEG]   fp64, over the program's tiles; blocks i <= j of B; added in a fixed order

NOTES: the scratch of one tile is S * 32 KiB (128 x 128, 16 bits). With 132 programs and S = 9 that is 37 MiB, which
stays in the L2 of an H100; with more segments it spills over to memory, to traffic of at most what the S gradients
in 16 bits would cost, while every product is still done once. Blocks of SEG segments are then read in pairs.

NOTES: parts are rounded to bfloat16 for 16-bit inputs (float16 would overflow where the sum does not): errors of
2^-9 of mean zero in each of thousands of terms of an inner product. dW is not rounded before its end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensor_cores import from_shared_memory


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
    if not from_shared_memory(major):
        return Tile(64, 64, 32, 4, 3, 32) if dtype == torch.float32 else Tile(128, 64, 64, 8, 3, 64)
    if -(-d_out // 128) * -(-d_in // 128) < processors:
        return Tile(64, 128, depth, 4, 3, chunk // 2)
    return Tile(128, 128, depth, 8, 3, chunk)


GROUP = 8  # tiles of neighbouring programs form blocks of this height: they share columns of dy and x in L2
SEGMENTS = 16  # per block of the Gram: what tl.dot needs at least


@triton.jit(do_not_specialize=["N", "S"])  # type: ignore[untyped-decorator]
def wgrad_gram_kernel(  # type: ignore[no-untyped-def]
    dy,  # [N, d_out]
    x,  # [N, d_in]
    offsets,  # [S + 1]
    dw,  # [d_out, d_in]
    scratch,
    partials,
    N,
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
            start = tl.maximum(tl.load(offsets + s).to(tl.int64), 0)
            end = tl.minimum(tl.load(offsets + s + 1).to(tl.int64), N)
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
    tf32: bool,
    scratch_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run the Triton kernel on non-empty tensors, not float64: dW goes to ``dw``; returns the Gram."""
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
        dy.shape[0],
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
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    gram = partials.sum(0)[:segments, :segments].triu()  # blocks below the diagonal were not written
    return gram + gram.triu(1).mT
