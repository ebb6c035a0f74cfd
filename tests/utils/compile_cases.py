"""The Triton kernels of the package in the configurations that their launch functions choose, one function a stem."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from types import ModuleType

import torch

from .offline import Case

POINTER = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def op(stem: str) -> ModuleType:
    """The module of the Triton kernel."""
    return importlib.import_module(f"taskgrad.ops.triton.{stem}")


def sum_gram() -> list[Case]:
    module = op("sum_gram")
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (16, 32, 64):
            tile, warps = module.tile_config(dtype, rows)
            pointer = POINTER[dtype]
            cases.append(
                Case(
                    module.sum_gram_kernel,
                    f"{pointer[1:]} T={rows}",
                    {"block": pointer, "total": pointer, "partials": "*fp64", "row_stride": "i64"},
                    {"T_PAD": rows, "TILE": tile},
                    aligned=("row_stride",),
                    warps=warps,
                    # fp32 products must keep all their bits
                    forbidden=("tf32",) if dtype == torch.float32 else (),
                )
            )
    return cases


def segment_sum() -> list[Case]:
    module = op("segment_sum")
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for d, kind in ((768, "sum"), (768, "layer norm"), (1, "sum")):
            rows, columns = module.tile_config(d, kind == "layer norm")
            types = {"dy": POINTER[dtype], "offsets": "*i64", "order": "*i64", "partials": "*fp32"}
            constants = {"S_PAD": 16, "BLOCK_N": rows, "BLOCK_D": columns, "ALIGNED": d > 1}
            if kind == "sum":
                constants |= {"x": None, "mean": None, "rstd": None}
            else:
                types |= {"x": POINTER[dtype], "mean": "*fp32", "rstd": "*fp32"}
            aligned = () if d == 1 else ("d",)
            config = f"{POINTER[dtype][1:]} {kind} d={d}"
            wide = () if d == 1 else ("ld.global.v4",)
            cases.append(Case(module.segment_sum_kernel, config, types, constants, aligned, required=wide))
    types = {"partials": "*fp32", "offsets": "*i64", "out": "*fp32"}
    cases.append(Case(module.segment_parts_kernel, "d=768", types, {"BLOCK_P": 16, "BLOCK_D": 128}, ("d",)))
    return cases


def memory_read() -> list[Case]:
    module = op("memory_read")
    strides = tuple(f"{name}_stride" for name in ("ema", "before", "after", "gradient"))
    doubles = ("before", "after", "theta", "to_mean", "correction", "partials")
    types = {"ema": "*fp32", "gradient": "*fp32"} | dict.fromkeys(doubles, "*fp64") | dict.fromkeys(strides, "i64")
    constants = {"BLOCK_T": module.BLOCK, "BLOCK_S": module.BLOCK, "COLUMNS": module.TILE}
    cases = []
    for one in (True, False):
        name = "one correction" if one else "each its own"
        cases.append(Case(module.memory_read_kernel, name, types, constants | {"ONE": one}, strides))
    block, results = module.ADDED
    types = dict.fromkeys(("partials", "dots", "sums"), "*fp64")
    cases.append(Case(module.memory_added_kernel, "fp64", types, {"BLOCK_P": block, "RESULTS": results}))
    return cases


def memory_write() -> list[Case]:
    module = op("memory_write")
    strides = tuple(f"{name}_stride" for name in ("ema", "before", "after", "gradient"))
    doubles = ("before", "after", "to_mean", "theta_before", "theta_after", "correction", "partials")
    types = {"ema": "*fp32", "gradient": "*fp32", "seen": "*u8"} | dict.fromkeys(doubles, "*fp64")
    types |= dict.fromkeys(strides, "i64") | dict.fromkeys(("old_part", "new_part"), "fp32")
    constants = {"BLOCK_T": module.BLOCK, "COLUMNS": module.TILE}
    kernel = module.memory_write_kernel
    return [
        Case(kernel, "one correction", types, constants | {"ONE": True, "left_out": None}, strides),
        Case(kernel, "each its own", types | {"left_out": "*u8"}, constants | {"ONE": False}, strides),
    ]


def sketch_params() -> list[Case]:
    module = op("sketch_params")
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows, columns = module.tile_config(dtype)
        types = {"theta": POINTER[dtype], "left": "*fp32", "right": "*fp32", "partials": "*fp64", "row_stride": "i64"}
        constants = {"BLOCK_0": rows, "BLOCK_1": columns, "RANK": module.R}
        aligned = ("row_stride", "d1", "r0", "r1")
        cases.append(Case(module.sketch_params_kernel, POINTER[dtype][1:], types, constants, aligned))
    return cases


CAPABILITIES = ((9, (90, 100)), (8, (80,)), (12, (120,)))  # those that tiles are chosen for, and what they run on


def embedding_stats() -> list[Case]:
    module = op("embedding_stats")
    types = {"left": "*fp32", "v": "*fp32", "index": "*i64", "order": "*i64", "offsets": "*i64", "partials": "*fp32"}
    constants = {"S_PAD": 16, "BLOCK_N": module.BLOCK_N, "R0": 32, "R1": 32}
    kernel = module.embedding_sketch_kernel
    return [Case(kernel, "r0=32 r1=32", types, constants, aligned=("r0", "r1"), forbidden=("tf32",))]


def wgrad_gram() -> list[Case]:
    module = op("wgrad_gram")
    strides = ("dy_stride", "x_stride", "dw_stride")
    cases = []
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        for major, archs in CAPABILITIES:
            tiles = {d: module.tile_config(dtype, tf32, d, d, 132, major) for d in (4096, 1024)}
            for tile in dict.fromkeys(tiles.values()):
                for segments in (9, 33):
                    pointer = POINTER[dtype]
                    wide = dtype == torch.float32
                    types = {"dy": pointer, "x": pointer, "offsets": "*i64", "dw": "*fp32", "partials": "*fp64"}
                    types |= {"scratch": pointer if wide else "*bf16"} | dict.fromkeys(strides, "i64")
                    constants = {"HEIGHT": tile.height, "WIDTH": tile.width, "DEPTH": tile.depth}
                    constants |= {"SEG": module.SEGMENTS, "SPLIT": tile.warps, "CHUNK": tile.chunk}
                    constants |= {"GROUP": module.GROUP, "ONE_BLOCK": segments <= module.SEGMENTS}
                    constants["PRECISION"] = "tf32" if tf32 else "ieee"
                    name = f"{'tf32' if tf32 else pointer[1:]} {tile.height}x{tile.width} S={segments}"
                    exact = wide and not tf32
                    cases.append(
                        Case(
                            module.wgrad_gram_kernel,
                            name,
                            types,
                            constants,
                            ("d_out", "d_in", *strides),
                            tile.warps,
                            tile.stages,
                            wgmma=not exact,
                            # scratch is written and read by one kernel: .nc loads would miss the writes
                            forbidden=("ld.global.nc", "tf32") if exact else ("ld.global.nc",),
                            archs=archs,
                        )
                    )
    return cases


def ghost_gram() -> list[Case]:
    module = op("ghost_gram")
    strides = ("dy_stride", "x_stride")
    cases = []
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        for major, archs in CAPABILITIES:
            tile = module.tile_config(dtype, tf32, major)
            for padded in (16, 128):
                pointer = POINTER[dtype]
                types = {"dy": pointer, "x": pointer, "partials": "*fp64", "segment": "*i32"}
                constants = {"BLOCK": tile.block, "DEPTH": tile.depth, "S_PAD": padded}
                constants["COLUMNS"] = min(padded, module.COLUMNS)
                constants["PRECISION"] = "tf32" if tf32 else "ieee"
                exact = dtype == torch.float32 and not tf32
                cases.append(
                    Case(
                        module.ghost_gram_kernel,
                        f"{'tf32' if tf32 else pointer[1:]} {tile.block} S={padded}",
                        types | dict.fromkeys(strides, "i64"),
                        constants,
                        ("d_out", "d_in", *strides),
                        tile.warps,
                        tile.stages,
                        wgmma=not exact,
                        forbidden=("ld.global.nc", "tf32") if exact else ("ld.global.nc",),
                        archs=archs,
                    )
                )
    return cases


def wgrad_sketch() -> list[Case]:
    module = op("wgrad_sketch")
    strides = ("u_stride", "v_stride")
    cases: dict[tuple[str, tuple[int, ...]], Case] = {}
    for dtype, r, (major, archs) in itertools.product((torch.float32, torch.bfloat16), (32, 64, 512), CAPABILITIES):
        tile = module.tile_config(dtype, r, r, major)
        for ordered in (False, True):
            types = {"u": POINTER[dtype], "v": POINTER[dtype], "order": "*i64", "offsets": "*i64"}
            constants = {"HEIGHT": tile.height, "WIDTH": tile.width, "DEPTH": tile.depth, "ORDERED": ordered}
            config = f"{POINTER[dtype][1:]} {tile.height}x{tile.width}{' order' if ordered else ''}"
            cases[config, archs] = Case(
                module.segment_products_kernel,
                config,
                types | {"partials": "*fp32"} | dict.fromkeys(strides, "i64"),
                constants,
                ("r0", "r1", *strides),
                tile.warps,
                tile.stages,
                wgmma=dtype == torch.bfloat16,
                forbidden=("tf32",) if dtype == torch.float32 else (),
                archs=archs,
            )
    return list(cases.values())


STEMS: tuple[Callable[[], list[Case]], ...] = (
    embedding_stats,
    memory_read,
    memory_write,
    segment_sum,
    sketch_params,
    sum_gram,
    wgrad_gram,
    ghost_gram,
    wgrad_sketch,
)


def cases() -> list[Case]:
    return [case for stem in STEMS for case in stem()]
