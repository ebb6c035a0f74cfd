"""The wheel that ``pip install .`` makes where torch is absent, and its metadata."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

import taskgrad

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built by an interpreter that has setuptools and nothing else, as in pip's build isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "build", "*.egg-info", "*.so"))
    venv.create(folder / "env", with_pip=False)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    installed = Path(setuptools.__file__).parents[1]
    for package in (installed / "_distutils_hack", *installed.glob("setuptools*")):
        (site / package.name).symlink_to(package)
    python = folder / "env" / "bin" / "python"
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run([python, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch is not importable here" in done.stderr
    (path,) = folder.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_what_runs_and_what_compiles(wheel):
    expected = {path.relative_to(ROOT / "src") for path in (ROOT / "src" / "taskgrad").rglob("*.*")}
    expected |= {Path("taskgrad/_csrc") / path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.*")}
    tracked = {path for path in expected if path.suffix not in {".pyc", ".so"} and "/." not in str(path)}
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packaged == {str(path) for path in tracked}
    assert "taskgrad/py.typed" in packaged
    assert "taskgrad/_csrc/ops/sum_gram.cpp" in packaged
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_nothing_but_setuptools_is_needed_to_build():
    requires = re.search(r"(?m)^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert requires and requires[1].startswith('"setuptools') and "," not in requires[1]


def test_metadata(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel, name.removesuffix("METADATA"))).metadata
    assert metadata["Version"] == taskgrad.__version__
    torch_requirement = [line for line in metadata.get_all("Requires-Dist") if line.startswith("torch")]
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
