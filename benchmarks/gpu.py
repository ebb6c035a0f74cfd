"""Everything that needs a GPU, in one command for whoever has one: ``python -m benchmarks.gpu``.

Results go to ``benchmarks/results/``, one JSON file per benchmark, named after the GPU.
"""

from __future__ import annotations

import sys

import torch

from . import step, sum_gram


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit(
            f"benchmarks.gpu needs a CUDA GPU, and torch {torch.__version__} finds none. "
            "The CPU benchmarks run on their own, for example: python -m benchmarks.sum_gram"
        )
    sum_gram.run(torch.device("cuda"))
    step.run(torch.device("cuda"))


if __name__ == "__main__":
    main()
