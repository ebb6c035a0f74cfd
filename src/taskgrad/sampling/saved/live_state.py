"""A state for loaders that take it early and save it late."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any


class LiveState(dict[str, Any]):
    """What ``take`` gives at the time it is pickled, copied or read, rather than now. Once it is written to, as by
    torch.distributed.checkpoint where it loads, it stays what it was then.

    A torchdata ``StatefulDataLoader`` with workers asks for a state whenever it hands a batch to a worker, and saves it
    when that batch is trained on: by then more batches are consumed, and more was decided.
    """

    def __init__(self, take: Callable[[], dict[str, Any]]) -> None:
        super().__init__(live=True)  # a copy that goes past the methods below is no state, and is refused as one
        self._take = take
        self._kept: dict[str, Any] | None = None

    @property
    def live(self) -> bool:
        """Whether it was never written to."""
        return self._kept is None

    def _now(self) -> dict[str, Any]:
        return self._take() if self._kept is None else self._kept

    def _keep(self) -> dict[str, Any]:
        self._kept = self._now()
        return self._kept

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # OrderedDict: unlike dict, torch.load(weights_only=True) lets it pass
        return OrderedDict, (), None, None, iter(self._now().items())

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return copy.deepcopy(self._now(), memo)

    def copy(self) -> dict[str, Any]:
        return self._now().copy()

    def __getitem__(self, key: str) -> Any:
        return self._now()[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self._now().get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._now()

    def __len__(self) -> int:
        return len(self._now())

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._now())

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return self._now().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return self._now().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return self._now().items()

    def __eq__(self, other: object) -> bool:
        return self._now() == (other._now() if isinstance(other, LiveState) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return repr(self._now())

    def __setitem__(self, key: str, value: Any) -> None:
        self._keep()[key] = value

    def __delitem__(self, key: str) -> None:
        del self._keep()[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._keep().update(*args, **kwargs)

    def __ior__(self, other: Any) -> LiveState:  # type: ignore[override, misc]
        self._keep().update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        return self._keep().setdefault(key, default)

    def pop(self, *args: Any) -> Any:
        return self._keep().pop(*args)

    def popitem(self) -> tuple[str, Any]:
        return self._keep().popitem()

    def clear(self) -> None:
        self._keep().clear()
