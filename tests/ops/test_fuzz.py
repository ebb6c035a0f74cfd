"""No arguments crash a public op, and none get a wrong number without an error: ``tests/utils/ops_fuzz.py``, in a
process of its own.

``TASKGRAD_FUZZ=10000 pytest tests/ops/test_fuzz.py`` tries as many sets of arguments an op, the plain run 300.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import taskgrad.ops
from tests.utils import ops_fuzz

ROOT = Path(__file__).resolve().parents[2]
COUNT = int(os.environ.get("TASKGRAD_FUZZ", "300"))


@pytest.fixture(scope="module", params=["", "0"], ids=["native", "reference"])
def found(request, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What came of every op, with the kernels in force and with the references."""
    progress = tmp_path_factory.mktemp("fuzz") / "progress"
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.utils.ops_fuzz", str(COUNT), "0", str(progress)]
    environment = {**os.environ, "TASKGRAD_NATIVE": request.param}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60 + COUNT)
    assert done.returncode == 0, f"died in {progress.read_text()}: {done.stderr[-3000:]}"
    return {line["op"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_every_public_op_is_tried():
    assert sorted(ops_fuzz.OPS) == sorted(taskgrad.ops.__all__)


@pytest.mark.parametrize("name", ops_fuzz.OPS)
def test_raises_or_agrees(name, found):
    result = found[name]
    assert result["wrong"] == 0, "\n".join(result["first"])
    assert result["raised"] + result["agreed"] == 2 * COUNT
    assert min(result["raised"], result["agreed"]) > COUNT / 4  # neither is all that the generator makes
