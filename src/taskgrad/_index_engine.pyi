from collections.abc import Callable
from typing import Any

import numpy.typing as npt

ALGORITHM: int
INTERFACE: int

class Engine:
    """Same methods as ``taskgrad.sampling.engine.index_numpy.Engine``."""

    def __init__(
        self,
        seed: int,
        sizes: npt.NDArray[Any],
        batch_size: int,
        first_batch: int,
        era: int,
        probe_every: int,
        max_draws: npt.NDArray[Any] | None,
        replicas: int = 1,
    ) -> None: ...
    def commit(self, effective_at: int, weights: npt.NDArray[Any]) -> None: ...
    def draw(self, k: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]: ...
    def counts(self, k: int) -> tuple[npt.NDArray[Any], int]: ...
    def examples(self, k: int, starts: npt.NDArray[Any], order: npt.NDArray[Any] | None, rank: int) -> list[int]: ...
    def totals(self, k: int) -> npt.NDArray[Any]: ...
    def probes(self, k: int) -> npt.NDArray[Any]: ...
    def snapshot_at(self, k: int) -> int: ...
    def state(self, k: int) -> tuple[npt.NDArray[Any], ...]: ...
    def restore(self, k: int, *state: npt.NDArray[Any]) -> None: ...

permutation_window: Callable[[int, int, int, int], npt.NDArray[Any]]
scatter: Callable[[npt.NDArray[Any], int, npt.NDArray[Any], npt.NDArray[Any]], None]
