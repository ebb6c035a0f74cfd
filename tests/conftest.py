"""Same numbers every run; memory that nobody wrote reads as NaN."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# without it cuBLAS warns under the deterministic algorithms that ``poisoned_memory`` asks for
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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
