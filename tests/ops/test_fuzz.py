"""No arguments crash a public op, and none get a wrong number without an error: ``tests/utils/ops_fuzz.py``, in a process
of its own.

``pytest -m slow`` tries 10,000 sets of arguments an op, the plain run 300.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import taskgrad.ops
from tests.utils import ops_fuzz

ROOT = Path(__file__).resolve().parents[2]


def fuzz(folder: Path, count: int, seed: int, *names: str, timeout: int = 240) -> dict[str, dict[str, Any]]:
    progress = folder / "progress"
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.utils.ops_fuzz", str(count), str(seed), str(progress)]
    done = subprocess.run([*command, *names], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"died in {progress.read_text()}: {done.stderr[-3000:]}"
    return {found["op"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return fuzz(tmp_path_factory.mktemp("fuzz"), 300, 0)


def check(found: dict[str, Any], count: int) -> None:
    assert found["wrong"] == 0, "\n".join(found["first"])
    assert found["raised"] + found["agreed"] == 2 * count
    assert min(found["raised"], found["agreed"]) > count / 4  # neither is all that the generator makes


def test_every_public_op_is_tried():
    assert sorted(ops_fuzz.OPS) == sorted(taskgrad.ops.__all__)


@pytest.mark.parametrize("name", ops_fuzz.OPS)
def test_raises_or_agrees(name, some):
    check(some[name], 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ops_fuzz.OPS)
def test_raises_or_agrees_10_000_times(name, tmp_path):
    check(fuzz(tmp_path, 10_000, 1_000_000, name, timeout=1800)[name], 10_000)
