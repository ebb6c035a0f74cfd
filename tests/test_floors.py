"""The package is a house: what lies above may import what lies below, and nothing imports upward or sideways."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import taskgrad

PACKAGE = Path(taskgrad.__file__).parent
FLOORS = (  # from the top; a room is a folder, or a module that lies in none
    {"taskgrad"},
    {"checkpoint", "cli", "doctor", "study"},
    {"sampling", "tracking"},
    {"report"},
    {"checks", "parameters", "statistics"},
    {"capture"},
    {"ops"},
    {"_files", "_gloo_exit", "_lazy", "_ranks", "_text", "_without"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
BOTTOM = FLOORS[-1]


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The room of a module, by its full name; the package itself is one of its own."""
    return module.split(".")[1] if "." in module else module


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of what ``module`` imports of the package, wherever in it, also for type checking alone."""
    path = MODULES.get(module)
    package = module if path is not None and path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            named = [f"{start}.{alias.name}" for alias in node.names]
            # the version is a string that says nothing of who is above
            targets = [name if name in MODULES else start for name in named if name != "taskgrad.__version__"]
        else:
            continue
        yield from ((node.lineno, target) for target in targets if target.split(".")[0] == "taskgrad")


def faults(module: str, source: str) -> list[str]:
    """The imports of ``module`` that go upward or sideways, and those of sampling that leave it."""
    here = room(module)
    found = []
    for line, target in imports(module, source):
        there = room(target)
        down = FLOOR_OF[there] > FLOOR_OF[here]
        if here == "sampling":  # it knows reports by their fields alone, and no model
            down = there in BOTTOM
        if there != here and not down:
            found.append(f"{module}, line {line}: {here} imports {target}")
    return found


def test_every_room_is_on_a_floor() -> None:
    assert {room(module) for module in MODULES} == set(FLOOR_OF)


def test_nothing_imports_upward() -> None:
    assert not [fault for module, path in MODULES.items() for fault in faults(module, path.read_text())]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("taskgrad.sampling.follow", "from ..tracking.delivery import Delivery"),
        ("taskgrad.sampling.policies.base", "from ...report import StepReport"),
        ("taskgrad.sampling.policies.base", "from taskgrad import StepReport"),
        ("taskgrad.sampling", "from .. import ops"),
        ("taskgrad.tracking.steps", "from ..sampling import AdaptiveBatchSampler"),
        ("taskgrad.tracking.steps", "if TYPE_CHECKING:\n    from .. import checkpoint"),
        ("taskgrad.report", "from .tracking.delivery import Delivery"),
        ("taskgrad.checks.sums", "from ..statistics.memory import TaskMemory"),
        ("taskgrad.checks.sums", "import torch, taskgrad.tracking.steps"),
        ("taskgrad.capture", "from ..parameters.probes import Probes"),
        ("taskgrad.capture.base", "def late():\n    from ..checks import sums"),
        ("taskgrad.ops.triton.sum_gram", "from ...capture.base import Probe"),
        ("taskgrad._text", "from . import report"),
    ],
)
def test_what_goes_upward_or_sideways_is_found(module: str, source: str) -> None:
    assert module in MODULES
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("taskgrad.sampling.follow", "from .._text import printable\nfrom .decisions import Decisions"),
        ("taskgrad.tracking.steps", "from ..ops.sum_gram import sum_gram\nfrom .batches import Batch"),
        ("taskgrad.ops.triton.sum_gram", "from .. import cost_model"),
        ("taskgrad", "from . import ops\nfrom .tracking.track import track"),
        ("taskgrad.cli", "from . import __version__\nimport torch"),
    ],
)
def test_what_goes_down_or_stays_is_allowed(module: str, source: str) -> None:
    assert not faults(module, source)
