"""Packages, and the native parts where they can be built; everything else is in pyproject.toml.

- ``taskgrad._index_engine``, the sampler's index engine: needs a C++ compiler and pybind11, which pip provides.
- ``taskgrad._C``, the op library: needs torch too, so it is built only with ``pip install --no-build-isolation``;
  without it the ops are compiled on first use, or their references run. The CUDA C++ kernels are built along where
  torch was built for CUDA and nvcc is found (TASKGRAD_CUDA=1 makes missing them an error, TASKGRAD_CUDA=0 skips them).
  A visible GPU is not needed: build machines have none.

Each is built on its own: where one fails the other is still built, and the package installs without it.
TASKGRAD_NATIVE=1 makes failing an error, TASKGRAD_NATIVE=0 skips both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

WISH = os.environ.get("TASKGRAD_NATIVE", "")
CUDA_WISH = os.environ.get("TASKGRAD_CUDA", "")
ENGINE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",  # what is computed must not depend on whether the machine has fused multiply-add
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wextra",
]


def index_engine() -> Extension | None:
    """The index engine; None where its bindings cannot be had."""
    try:
        import pybind11
    except ImportError:
        if WISH == "1":
            raise
        say("pybind11 is not importable here: the sampler will run on NumPy")
        return None
    folder = Path("csrc/index_engine")
    return Extension(
        "taskgrad._index_engine",
        sorted(str(path) for path in folder.glob("*.cpp")),
        depends=sorted(str(path) for path in folder.glob("*.hpp")),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=ENGINE_FLAGS,
        language="c++",
    )


def op_library() -> Extension | None:
    """The ops for the CPU, and for CUDA where that can be built; None where torch is not importable."""
    try:
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError:
        say("torch is not importable here: native kernels will be compiled on first use")
        return None
    recipe = json.loads(Path("csrc/build.json").read_text())
    kind, sources, flags = CppExtension, recipe["sources"], {"cxx": recipe["cflags"]}
    if cuda_is_here():
        kind, sources = CUDAExtension, sources + recipe["cuda_sources"]
        flags = {"cxx": recipe["cflags"] + recipe["cuda_cflags"], "nvcc": recipe["nvcc_flags"]}
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return kind(
        "taskgrad._C",
        [f"csrc/{source}" for source in sources],
        extra_compile_args=flags,
        py_limited_api=True,  # nothing in it depends on Python, nor (stable ABI) on torch's minor version
    )


def seal(library: Path) -> None:
    """Write beside it of which sources the op library is: ``taskgrad/ops/_native.py`` loads no other."""
    spec = importlib.util.spec_from_file_location("seal", "src/taskgrad/ops/_seal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.put(library, Path("csrc"))


def cuda_is_here() -> bool:
    """Whether torch was built for CUDA and there is a toolkit to build with."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_WISH == "0":
        return False
    here = torch.version.cuda is not None and CUDA_HOME is not None
    if CUDA_WISH == "1" and not here:
        raise RuntimeError(f"TASKGRAD_CUDA=1, but torch's CUDA is {torch.version.cuda} and CUDA_HOME is {CUDA_HOME}")
    return here


class BuildEach(build_ext):
    """Builds every extension with a command of its own and goes without those that fail."""

    def run(self) -> None:
        self.extensions = [extension for extension in self.extensions if self.built(extension)]

    def built(self, extension: Extension) -> bool:
        try:
            command = self.command_for(extension)
            command.inplace = self.inplace
            command.ensure_finalized()
            command.extensions = [extension]
            command.run()
            if extension.name == "taskgrad._C":
                seal(Path(command.get_ext_fullpath(extension.name)))
        except Exception as error:
            if WISH == "1":
                raise
            say(f"{extension.name} could not be built, going without: {error}")
            return False
        say(f"{extension.name} is built")
        return True

    def command_for(self, extension: Extension) -> build_ext:
        if extension.name != "taskgrad._C":
            return build_ext(self.distribution)
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension(self.distribution)


def extensions() -> list[Extension]:
    if WISH not in ("", "0", "1"):
        raise SystemExit(f"taskgrad: TASKGRAD_NATIVE must be 0, 1 or unset, got {WISH!r}")
    if WISH == "0":
        say("nothing native is built (TASKGRAD_NATIVE=0)")
        return []
    if os.name != "posix":
        say("nothing native is built on this platform")
        return []
    return [extension for extension in (index_engine(), op_library()) if extension is not None]


def say(message: str) -> None:
    print(f"taskgrad: {message}", file=sys.stderr)


setup(
    packages=[*find_packages("src"), "taskgrad._csrc", "taskgrad._csrc.cuda", "taskgrad._csrc.ops"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildEach},
)
