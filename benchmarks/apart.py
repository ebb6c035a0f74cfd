"""A function called in a process of its own, whose end, whatever it is, leaves this one as it was."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_PRELOAD = [
    "benchmarks.peak",
    "torch._dynamo",
    "torchjd.autogram",
    "torchjd.autojac",
    "opacus",
]  # what is not installed is passed over


def apart(function: Callable[..., Any], *args: Any, timeout: float) -> Any:
    """``function(*args)`` in a fresh process, forked from one that has imported torch and run nothing.

    Raises RuntimeError with what it raised, TimeoutError after ``timeout`` seconds, ChildProcessError if it died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise TimeoutError(f"no result after {timeout:g} s")
        reason, value = ours.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"the process died with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if reason is not None:
        raise RuntimeError(reason)
    return value


def _send(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        connection.send((None, function(*args)))
    except Exception as error:
        connection.send((f"{type(error).__name__}: {error}", None))
