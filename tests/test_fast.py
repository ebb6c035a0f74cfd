"""The fast subset, ``pytest --fast``, as it is collected: all the house in it, and what the issue of every move is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CONTAINED = {  # a function each of what breaks first when code moves
    "behaviour/test_zoo.py::test_exact_mode",  # against fp64 autograd
    "behaviour/test_same_training.py::test_activation_checkpointing",
    "behaviour/test_same_training.py::test_autocast",
    "capture/test_compile.py::test_full_graph",
    "ops/test_segment_sum.py::test_matches_fp64",  # with the kernels
    "sampling/saved/test_resume.py::test_resume_anywhere_any_number_of_times",
    "test_floors.py::test_nothing_imports_upward",
    "test_import.py::test_torch_is_not_imported_before_it_is_needed",
}


@pytest.mark.slow
def test_it_has_a_part_of_every_room() -> None:
    command = [sys.executable, "-m", "pytest", "--fast", "--collect-only", "-q", str(TESTS)]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True)
    cases = [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line]
    assert {Path(case.partition("::")[0]).parent for case in cases} == {
        path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")
    }
    assert {case.partition("[")[0] for case in cases} >= CONTAINED
    compared = [case for case in cases if case.startswith("behaviour/test_zoo.py::test_exact_mode[")]
    assert len(compared) >= 4  # architectures
