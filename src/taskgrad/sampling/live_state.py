"""A state for loaders that take it early and save it late."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any, NoReturn


class LiveState(dict[str, Any]):
    """What ``take`` gives at the time it is pickled, copied or read, rather than now; it cannot be written to.

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

    def copy(self) -> dict[str, Any]:
        return self._take()

    def __getitem__(self, key: str) -> Any:
        return self._take()[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self._take().get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._take()

    def __len__(self) -> int:
        return len(self._take())

    def __iter__(self) -> Iterator[str]:
        return iter(self._take())

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._take())

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return self._take().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return self._take().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return self._take().items()

    def __eq__(self, other: object) -> bool:
        return self._take() == (other._take() if isinstance(other, LiveState) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return repr(self._take())

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a state that is still to be taken cannot be changed: change a copy.deepcopy of it")

    __setitem__ = __delitem__ = __ior__ = pop = popitem = clear = update = setdefault = _refuse
