"""A part of the matrix of ``benchmarks/stream.py``: real loaders, left and resumed in every way, give one stream."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.stream import LOADERS, PATTERNS, RESUMES, Cell, launch

WITHOUT_WORKERS = list(itertools.product(LOADERS, ["0"], PATTERNS, RESUMES))
WITH_WORKERS = list(
    itertools.product(LOADERS, ["2 forkserver"], ["through", "break", "peek within"], ["mid-epoch", "new process"])
)
PERSISTENT = list(itertools.product(LOADERS, ["2 forkserver, persistent"], ["peek before", "limit"], ["mid-epoch"]))
SPAWNED = list(itertools.product(["plain", "stateful"], ["2 spawn"], ["break"], ["new process"]))
TOLD = list(itertools.product(["plain"], ["2 forkserver, persistent"], ["peek within"], ["none"]))
ON_RANKS = [cell for cell in [*WITHOUT_WORKERS, *WITH_WORKERS] if not cell[0].startswith("accelerate")]


@pytest.mark.slow
def test_one_process() -> None:
    chosen: list[Cell] = [*WITHOUT_WORKERS, *WITH_WORKERS, *PERSISTENT, *SPAWNED, *TOLD]
    verdicts = launch(1, True, chosen)
    assert len(verdicts) == len(chosen)
    assert {cell: said for cell, said in verdicts.items() if said != "ok"} == {"/".join(TOLD[0]): "told"}


@pytest.mark.slow
def test_two_ranks() -> None:
    verdicts = launch(2, False, ON_RANKS)
    assert len(verdicts) == len(ON_RANKS)
    assert {cell: said for cell, said in verdicts.items() if said != "ok"} == {}
