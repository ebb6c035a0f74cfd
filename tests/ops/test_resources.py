"""Every kernel compiled for GPUs that are not there: nothing spills, and nothing has grown since the table was
written."""

from __future__ import annotations

import functools

import pytest

triton = pytest.importorskip("triton")

from benchmarks import resources  # noqa: E402
from tests.utils import offline  # noqa: E402
from tests.utils.compile_cases import cases  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the compiler")
CASES = [] if triton.knobs.runtime.interpret else cases()
needs_nvcc = pytest.mark.skipif(offline.nvcc() is None, reason="needs nvcc")


@functools.cache
def committed() -> list[str]:
    return resources.PATH.read_text().splitlines()


@pytest.mark.parametrize(("case", "arch"), [(case, arch) for case in CASES for arch in case.archs], ids=str)
def test_triton_kernel(case: offline.Case, arch: int) -> None:
    compiled = offline.compile_case(case, arch)
    offline.check(case, arch, compiled)
    if resources.heads()[0] in committed():
        assert resources.triton_line(case, arch, compiled.resources) in committed(), (
            "not what the table says; if this is meant: python -m benchmarks.resources"
        )


@needs_nvcc
@pytest.mark.parametrize("arch", offline.NVCC_ARCHS, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("source", offline.cuda_sources(), ids=lambda path: path.name)
def test_cuda_kernel(source: offline.Path, arch: str) -> None:
    found = offline.compile_cuda(source, arch)
    assert found
    for kernel, used in found.items():
        assert used.stack == 0 and used.local == 0, f"{kernel} on sm_{arch} spills registers: {used}"
        if resources.heads()[1] in committed():
            assert resources.cuda_line(kernel, arch, used) in committed()


def test_table_lists_the_kernels_there_are() -> None:
    first, last = (i for i, line in enumerate(committed()) if line.startswith("#"))
    listed = [line[: sum(resources.WIDTHS[:3])].split() for line in committed()[first + 1 : last]]
    expected = [[case.name, *case.config.split(), f"sm_{arch}"] for case in CASES for arch in case.archs]
    assert sorted(listed) == sorted(expected)
