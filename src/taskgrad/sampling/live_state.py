"""A state for loaders that take it early and save it late."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any


class LiveState(dict[str, Any]):
    """What ``take`` gives at the time it is pickled, copied or read, rather than now.

    A torchdata ``StatefulDataLoader`` with workers asks for a state whenever it hands a batch to a worker, and saves it
    when that batch is trained on: by then more batches are consumed, and more was decided.
    """

    def __init__(self, take: Callable[[], dict[str, Any]]) -> None:
        super().__init__(live=True)  # a copy that goes past the methods below is no state, and is refused as one
        self._take = take

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # OrderedDict: unlike dict, torch.load(weights_only=True) lets it pass
        return OrderedDict, (), None, None, iter(self._take().items())

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return self._take()

    def __getitem__(self, key: str) -> Any:
        return self._take()[key]

    def __contains__(self, key: object) -> bool:
        return key in self._take()

    def __iter__(self) -> Iterator[str]:
        return iter(self._take())

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return self._take().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return self._take().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return self._take().items()
