"""What a sampler is built with, as the user gives it: the one list of its options and their defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

GUARDS = ("budget", "probe_every", "min_weight", "max_weight", "max_change", "max_epochs")
"""Options that a policy may have defaults for."""

_Given = ParamSpec("_Given")
_Self = TypeVar("_Self")


@dataclass(frozen=True, eq=False)
class Options:
    """Unchecked. What each means is in the docstring of ``AdaptiveBatchSampler``, how it is checked in ``settings``."""

    task_of_example: Any = None
    batch_size: int = 64
    policy: Any = None
    seed: int = 0
    _: KW_ONLY
    shares: Mapping[str, float] | None = None
    tasks: Sequence[str] | None = None
    dataset: Any = None
    num_batches: int | None = None
    num_replicas: int | None = None
    rank: int | None = None
    update_every: int = 10
    delay: int | None = None
    horizon: int | None = None
    importance: Any = None
    critical: str | Collection[str] = ()
    budget: float | None = None
    probe_every: int | None = None
    min_weight: Any = None
    max_weight: Any = None
    max_change: float | None = None
    max_epochs: float | None = None
    pinned: str | Collection[str] = ()
    resume: str = "seek"


def takes(
    options: Callable[_Given, Options],
) -> Callable[[Callable[[_Self, Options], None]], Callable[Concatenate[_Self, _Given], None]]:
    """An ``__init__`` of ``Options`` becomes one of the options by name, for type checkers, IDEs and ``inspect``."""

    def taking(init: Callable[[_Self, Options], None]) -> Callable[Concatenate[_Self, _Given], None]:
        def __init__(self: _Self, /, *args: _Given.args, **kwargs: _Given.kwargs) -> None:
            init(self, options(*args, **kwargs))

        functools.update_wrapper(__init__, init, assigned=("__module__", "__qualname__", "__doc__"))
        __init__.__annotations__ = get_type_hints(Options.__init__)
        vars(__init__).update(__signature__=inspect.signature(Options.__init__))
        return __init__

    return taking
