"""Benchmarks are run by ``pytest benchmarks --benchmark-only``; plain ``pytest`` collects the tests only."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
