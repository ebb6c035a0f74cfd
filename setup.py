"""Packages, and the native kernels where they can be built; everything else is in pyproject.toml.

The kernels are built ahead of time if torch is importable here and a compiler works (TASKGRAD_NATIVE=1 makes
failing an error, TASKGRAD_NATIVE=0 skips them). Otherwise the package is installed without them: it compiles
them on first use or runs their references.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

WISH = os.environ.get("TASKGRAD_NATIVE", "")


def native_options() -> dict[str, Any]:
    """Arguments of ``setup`` that build ``taskgrad._C``, none if this environment cannot."""
    if WISH == "0":
        return say("no native kernels (TASKGRAD_NATIVE=0)")
    if os.name != "posix":
        return say("no native kernels on this platform")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if WISH == "1":
            raise
        return say("torch is not importable here: native kernels will be compiled on first use")

    class BuildOrGoWithout(BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if WISH == "1":
                    raise
                say(f"native kernels could not be built, going without: {error}")
                self.extensions = []

    say("building native kernels for the CPU")
    recipe = json.loads(Path("csrc/build.json").read_text())
    extension = CppExtension(
        "taskgrad._C",
        [f"csrc/{source}" for source in recipe["sources"]],
        extra_compile_args={"cxx": recipe["cflags"]},
        py_limited_api=True,  # nothing in it depends on Python, nor (stable ABI) on torch's minor version
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOrGoWithout},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def say(message: str) -> dict[str, Any]:
    print(f"taskgrad: {message}", file=sys.stderr)
    return {}


setup(packages=[*find_packages("src"), "taskgrad._csrc", "taskgrad._csrc.ops"], **native_options())
