"""Compiling kernels for GPUs that are not there, and reading from the binaries what they will use.

A ``Case`` is one Triton kernel in one configuration; ``tests/utils/compile_cases.py`` lists those of the package.
``tests/ops/test_resources.py`` compiles them all and compares with ``benchmarks/results/resources.txt``, which
``python -m benchmarks.resources`` writes. CUDA C++ (``csrc/cuda/*.cu``) is compiled by nvcc and read the same way.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRITON_ARCHS = (80, 90, 100, 120)
NVCC_ARCHS = ("80", "90a")
# torch's build of an extension turns these operators off
NVCC_FLAGS = ["-O3", "-std=c++17", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"]
NVCC_FLAGS += ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF2_OPERATORS__"]
# what one block may have of the SM's shared memory; sm_86 and sm_89, which run what is chosen for sm_80, have less
SHARED_KIB = {80: 99, 90: 227, 100: 227, 120: 99}


@dataclass(frozen=True)
class Case:
    """One Triton kernel in one configuration.

    Attributes:
        kernel: the ``triton.jit`` function.
        config: what tells this configuration from the kernel's others, for the table.
        types: Triton types by argument name, ``"*bf16"``, ``"i64"``; an argument that is neither here nor in
            ``constants`` is ``"i32"``, and a pointer is taken to be aligned to 16 bytes.
        constants: values of the ``tl.constexpr`` arguments.
        aligned: integer arguments that are multiples of 16 in the case compiled, as strides are: loads vectorise then.
        warps, stages: of the launch.
        wgmma: a 16-bit (or tf32) product must run on Hopper's tensor cores.
        required, forbidden: text that must be, and that must not be in the PTX.
        archs: what it is compiled for, where the launch function chooses by compute capability.
    """

    kernel: Any
    config: str
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    wgmma: bool = False
    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    archs: tuple[int, ...] = TRITON_ARCHS

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def __str__(self) -> str:
        return f"{self.name}-{self.config}"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers per thread, bytes of shared memory per block, of stack and of local
    memory per thread (registers that did not fit)."""

    registers: int
    shared: int
    stack: int
    local: int


@dataclass(frozen=True)
class Compiled:
    resources: Resources
    ptx: str


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile a case for ``sm_<arch>`` with Triton; no GPU and no driver is needed."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = case.kernel.arg_names
    unknown = {*case.types, *case.constants, *case.aligned} - set(names)
    assert not unknown, f"{case}: {case.name} has no argument {unknown}"
    general = {p.name for p in case.kernel.params if p.do_not_specialize}
    assert not general & set(case.aligned), f"{case}: {case.name} is never told that {general} are aligned"
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, "i32") for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in case.aligned]
    source = triton.compiler.ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    resources = Resources(found["REG"], binary.metadata.shared, found["STACK"], found["LOCAL"])
    return Compiled(resources, binary.asm["ptx"])


def check(case: Case, arch: int, compiled: Compiled) -> None:
    """What must hold of every kernel on every GPU."""
    used = compiled.resources
    assert used.stack == 0 and used.local == 0, f"{case} on sm_{arch} spills registers: {used}"
    assert used.shared <= SHARED_KIB[arch] * 1024, f"{case} does not fit the shared memory of sm_{arch}: {used}"
    if case.wgmma and arch == 90:
        assert "wgmma.mma_async" in compiled.ptx, f"{case} does not use the tensor cores of sm_90 as it should"
    for text in case.required:
        assert text in compiled.ptx, f"{case} on sm_{arch} does not use {text}"
    for text in case.forbidden:
        assert text not in compiled.ptx, f"{case} on sm_{arch} uses {text}"


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvcc_version() -> str:
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", output)
    assert found, output
    return found[1]


def compile_cuda(source: Path, arch: str) -> dict[str, Resources]:
    """Compile a ``.cu`` file for ``sm_<arch>`` with nvcc and read ptxas's report: resources by kernel, demangled."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-cubin", *NVCC_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-Xptxas", "-v", "-Werror", "all-warnings", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Resources] = {}
    for block in done.stderr.split("Compiling entry function ")[1:]:
        name, stack, stores, loads, registers = re.findall(
            r"'(\w+)'[\s\S]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            r"[\s\S]*?Used (\d+) registers",
            block,
        )[0]
        shared = re.search(r"(\d+) bytes smem", block)
        found[_demangled(name)] = Resources(
            int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads)
        )
    return found


def _demangled(name: str) -> str:
    """``name<arguments>`` without namespaces and parameters."""
    if not shutil.which("c++filt"):
        return name
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    match = re.search(r"(\w+(?:<[^()]*>)?)\(", full.replace("(anonymous namespace)::", ""))
    return match[1] if match else name
