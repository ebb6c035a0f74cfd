"""Same numbers every run; memory that nobody wrote reads as NaN; a part of the suite that takes two minutes."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# without it cuBLAS warns under the deterministic algorithms that ``poisoned_memory`` asks for
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


ONE_IN = 20  # cases of a test function that the fast subset runs, the first among them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help=f"of every test that is not slow one case in {ONE_IN}: two minutes"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest -m gpu`` imports the files that have such tests, and no others."""
    if config.getoption("markexpr") != "gpu" or collection_path.suffix != ".py":
        return None
    return True if "mark.gpu" not in collection_path.read_text() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("fast"):
        chosen = fast(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def fast(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The fast subset: it follows the suite by itself, and no room and no test function is without a case in it."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    return {item for of_one in cases.values() for item in of_one[::ONE_IN]}


@pytest.fixture(autouse=True, scope="session")
def workers_from_a_server() -> None:
    """Workers of a DataLoader do not fork this process: CPython 3.11 can hang where one of its threads holds a lock."""
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["torch", "taskgrad.checkpoint"])  # which needs all the rest


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch fills what ``torch.empty`` and its kin return with NaN (integers: the largest value)."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
