"""A process that ends right after one of taskgrad's collectives ends well.

torch's gloo threads let go of a collective's tensors after the caller has gone on, and need the GIL to do so. Where the
interpreter is being finalised by then, CPython ends the thread and the process aborts ("terminate called without an
active exception", exit code -6): torch 2.13, in programs without taskgrad as well.
"""

from __future__ import annotations

import atexit
import functools
import time

_MOMENT = 0.02  # seconds: four times what a thread waits before it asks for the GIL


@functools.cache
def wait_at_exit() -> None:
    """Let the threads finish before the interpreter does; called by who starts a collective."""
    atexit.register(time.sleep, _MOMENT)
