"""Arguments that a function had in unreleased versions: who still passes one is told what took its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without(**instead: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: TypeError for these keyword arguments, which says what to pass ``instead``."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for name in instead.keys() & kwargs.keys():
                raise TypeError(f"{function.__name__}() has no argument {name!r}: {instead[name]}")
            return function(*args, **kwargs)

        return call

    return decorate
