"""The wheels that ``pip install .`` makes where torch is absent, with and without a compiler, and their metadata."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import taskgrad

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def build(
    folder: Path, environment: dict[str, str], tools: tuple[str, ...] = ("setuptools", "pybind11")
) -> tuple[Path, str]:
    """A wheel made by an interpreter that has the build requirements and nothing else, as in pip's build isolation,
    and what the build said."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "tests", "build", "*.egg-info", "*.so")
    shutil.copytree(ROOT, source, ignore=ignored)
    venv.create(folder / "env", with_pip=False)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    for tool in tools:
        installed = Path(importlib.import_module(tool).__file__).parents[1]
        for package in (*installed.glob(f"{tool}*"), *installed.glob("_distutils_hack")):
            if not (site / package.name).exists():
                (site / package.name).symlink_to(package)
    python = folder / "env" / "bin" / "python"
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0
    command = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run(
        [python, "-c", command],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "TASKGRAD_NATIVE": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    assert "torch is not importable here" in done.stderr or environment.get("TASKGRAD_NATIVE") == "0"
    (path,) = folder.glob("*.whl")
    return path, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a machine with a compiler and without torch."""
    pytest.importorskip("pybind11")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a compiler")
    path, said = build(tmp_path_factory.mktemp("wheel"), {})
    assert "taskgrad._index_engine is built" in said
    return zipfile.ZipFile(path)


def packaged(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def expected() -> set[str]:
    """Every file of the package, and the sources that are compiled on first use."""
    files = {path.relative_to(ROOT / "src") for path in (ROOT / "src" / "taskgrad").rglob("*.*")}
    for room in ("cuda", "ops"):  # the version of a built library is of both
        found = (ROOT / "csrc" / room).glob("*.*")
        files |= {Path("taskgrad/_csrc") / path.relative_to(ROOT / "csrc") for path in found}
    files |= {Path("taskgrad/_csrc/build.json")}
    return {str(path) for path in files if path.suffix not in {".pyc", ".so", ".seal"} and "/." not in str(path)}


def test_wheel_holds_what_runs_and_what_compiles(wheel):
    extension = f"taskgrad/_index_engine{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert packaged(wheel) == {*expected(), extension}
    assert {"taskgrad/py.typed", "taskgrad/_csrc/ops/sum_gram.cpp"} <= expected()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_wheel_is_of_one_version_of_cpython(wheel):
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert Path(wheel.filename).name.startswith(f"taskgrad-{taskgrad.__version__}-{version}-{version}-")


def test_the_engine_in_the_wheel_works_and_names_no_path_of_the_machine_that_built_it(wheel, tmp_path):
    (name,) = (name for name in packaged(wheel) if name.endswith(".so"))
    content = wheel.read(name)
    assert str(ROOT).encode() not in content and b"site-packages" not in content
    library = tmp_path / Path(name).name
    library.write_bytes(content)
    code = "import _index_engine as e; print(e.permutation_window(5, 1, 0, 5))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.strip("[]\n").split()) == list("01234")


@pytest.mark.parametrize(
    "environment, tools, message",
    [
        ({"TASKGRAD_NATIVE": "0"}, ("setuptools",), "nothing native is built (TASKGRAD_NATIVE=0)"),
        ({}, ("setuptools",), "pybind11 is not importable here: the sampler will run on NumPy"),
        ({"CC": "no-such-compiler", "CXX": "no-such-compiler"}, ("setuptools", "pybind11"), "going without: "),
    ],
)
def test_without_an_engine_the_package_still_installs_and_says_why(tmp_path, environment, tools, message):
    if "pybind11" in tools:
        pytest.importorskip("pybind11")
    path, said = build(tmp_path, environment, tools)
    assert message in said
    assert packaged(zipfile.ZipFile(path)) == expected()


def test_nothing_but_setuptools_and_pybind11_is_needed_to_build():
    requires = re.search(r"(?m)^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert requires and re.findall(r"[a-z0-9]+(?=>=)", requires[1]) == ["setuptools", "pybind11"]


def test_metadata(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel, name.removesuffix("METADATA"))).metadata
    assert metadata["Version"] == taskgrad.__version__
    torch_requirement = [line for line in metadata.get_all("Requires-Dist") if line.startswith("torch>")]
    assert torch_requirement == ["torch>=2.11"]  # no upper bound


def test_command_is_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="taskgrad")
    if not scripts:
        pytest.skip("taskgrad is not installed, only importable")
    (script,) = scripts
    assert script.value == "taskgrad.cli:main"
    done = subprocess.run(
        [sys.executable, "-m", "taskgrad.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"taskgrad {taskgrad.__version__}\n"
