"""``sum_gram`` against what one would write in torch: ``block.sum(0), block @ block.T``.

``torch`` does that in the dtype of the block, ``reference`` is the package's own fallback (Gram in fp64). The error
is the largest of the Gram's, relative to the norms of the two rows, against fp64.

    python -m benchmarks.sum_gram [--device cpu|cuda] [--rounds 15]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import taskgrad.ops
from taskgrad.ops import _native

from . import timing

reference = sys.modules["taskgrad.ops.sum_gram"].reference

SHAPES = [(2, 1 << 16), (8, 1 << 16), (64, 1 << 16), (2, 1 << 22), (8, 1 << 22), (64, 1 << 19)]
DTYPES = [torch.float32, torch.bfloat16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    run(torch.device(args.device), args.rounds)


def run(device: torch.device, rounds: int = 15) -> None:
    if device.type == "cpu":
        print(f"kernel: {_native.status()}")
    rows = [measure(*shape, dtype, device, rounds) for dtype in DTYPES for shape in SHAPES]
    table = Table(title=f"sum_gram on {device}, milliseconds (median)")
    for column in ("dtype", "T", "M", "sum_gram", "GB/s", "torch", "reference", "x torch", "error", "torch's error"):
        table.add_column(column, justify="right")
    for row in rows:
        ours, plain = row["ms"]["sum_gram"][1], row["ms"]["torch"][1]
        table.add_row(
            row["dtype"],
            str(row["T"]),
            str(row["M"]),
            f"{ours:.3f}",
            f"{row['bytes'] / ours / 1e6:.1f}",
            f"{plain:.3f}",
            f"{row['ms']['reference'][1]:.3f}",
            f"{plain / ours:.1f}",
            f"{row['error']['sum_gram']:.0e}",
            f"{row['error']['torch']:.0e}",
        )
    Console().print(table)
    print(f"written to {timing.save('sum_gram', device, rows)}")


def measure(T: int, M: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(T, M, generator=generator, device=device).to(dtype)
    variants = {
        "sum_gram": lambda: taskgrad.ops.sum_gram(block),
        "torch": lambda: (block.sum(0), block @ block.mT),
        "reference": lambda: reference(block),
    }
    times = timing.interleaved(variants, device, rounds)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "T": T,
        "M": M,
        "bytes": block.element_size() * (T + 1) * M,  # block read, sum written
        "ms": {name: [round(value, 4) for value in timing.quartiles(values)] for name, values in times.items()},
        "error": {name: gram_error(block, variants[name]()[1]) for name in ("sum_gram", "torch")},
    }


def gram_error(block: Tensor, gram: Tensor) -> float:
    exact = block.double() @ block.double().mT
    norms = exact.diagonal().sqrt()
    return float(((gram.double() - exact).abs() / (norms[:, None] * norms[None, :])).max())


if __name__ == "__main__":
    main()
