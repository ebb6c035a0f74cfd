"""What the kernels take of a GPU, from binaries compiled without one: ``benchmarks/results/resources.txt``.

One line per kernel, configuration and architecture. ``tests/ops/test_resources.py`` compares the committed file with
what it compiles, so a kernel that begins to use more registers shows in the diff of this file.

    python -m benchmarks.resources
"""

from __future__ import annotations

import sys

from tests.utils import offline
from tests.utils.compile_cases import cases
from tests.utils.offline import Resources

from .timing import RESULTS

PATH = RESULTS / "resources.txt"
WIDTHS = (28, 26, 7, 10, 13, 6, 6, 7)
COLUMNS = ("kernel", "configuration", "arch", "registers", "shared bytes", "stack", "warps", "stages")


def line(*fields: object) -> str:
    return "".join(str(f).ljust(width) for f, width in zip(fields, WIDTHS, strict=True)).rstrip()


def triton_line(case: offline.Case, arch: int, used: Resources) -> str:
    return line(case.name, case.config, f"sm_{arch}", used.registers, used.shared, used.stack, case.warps, case.stages)


def cuda_line(kernel: str, arch: str, used: Resources) -> str:
    name, _, arguments = kernel.partition("<")
    return line(name, arguments.rstrip(">"), f"sm_{arch}", used.registers, used.shared, used.stack, "", "")


def heads() -> tuple[str, str]:
    """The lines that open the two parts of the table; the test compares a part where its line is the same."""
    import triton

    nvcc = offline.nvcc_version() if offline.nvcc() else "absent"
    return f"# triton {triton.__version__}", f"# nvcc {nvcc} (shared bytes: static)"


def table() -> list[str]:
    triton_head, cuda_head = heads()
    lines = [line(*COLUMNS), triton_head]
    for case in cases():
        for arch in case.archs:
            lines.append(triton_line(case, arch, offline.compile_case(case, arch).resources))
            print(lines[-1], flush=True)
    lines.append(cuda_head)
    for source in offline.cuda_sources():
        for cuda_arch in offline.NVCC_ARCHS:
            found = offline.compile_cuda(source, cuda_arch)
            lines += [cuda_line(kernel, cuda_arch, used) for kernel, used in sorted(found.items())]
    return lines


def main() -> None:
    if offline.nvcc() is None:
        sys.exit("benchmarks.resources needs nvcc on PATH for the kernels in csrc/cuda")
    lines = table()
    PATH.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwritten to {PATH}")


if __name__ == "__main__":
    main()
