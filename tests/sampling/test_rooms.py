"""The rooms of sampling: what the engine, the data and the loading are made of knows nothing of what is above them."""

from __future__ import annotations

import pytest

from tests.test_floors import MODULES, imports

BELOW = {  # of each room, what of sampling it may import
    "engine": {"arrays"},
    "data": {"arrays", "engine"},
    "loading": set(),
    "policies": {"arrays", "inputs", "ledger"},
}


def room(module: str) -> str:
    return module.split(".")[2]


@pytest.mark.parametrize("name", BELOW)
def test_a_room_imports_what_lies_below_it(name: str) -> None:
    inside = {module: path for module, path in MODULES.items() if module.startswith(f"taskgrad.sampling.{name}")}
    assert len(inside) > 1
    found = {
        room(target)
        for module, path in inside.items()
        for _, target in imports(module, path.read_text())
        if target.startswith("taskgrad.sampling.")
    }
    assert found <= {name, *BELOW[name]}
