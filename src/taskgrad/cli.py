"""The command line, ``taskgrad``.

Each command is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``, imported only when it
was asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = {
    "demo": (
        "taskgrad.study.demo",
        "watch a small model forget rare tasks, and learn them under adaptive sampling",
    ),
    "doctor": ("taskgrad.doctor", "print versions, devices and which kernels are in force"),
}


CLOSED_PIPE = 128 + 13  # what a shell reports of a program that SIGPIPE ended, as it does most


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; ``argv`` defaults to the process's arguments.

    Where nobody reads on (``taskgrad doctor | head -1``) it ends quietly.
    """
    try:
        try:
            code = _run(argv)
        except SystemExit:  # of --help
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # what Python writes at its end nobody could catch
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return CLOSED_PIPE


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that was closed; what is left in its buffer then goes nowhere, or Python's end would
    write it."""
    try:
        out = sys.stdout.fileno()
    except (AttributeError, OSError):  # none, or one that somebody put in its place
        return False
    poll = select.poll()
    poll.register(out, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out)
    os.close(nowhere)
    return True


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="taskgrad",
        description="Per-task gradient statistics while training, and batches that follow them.",
    )
    parser.add_argument("--version", action="version", version=f"taskgrad {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == wanted:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    args = parser.parse_args(arguments)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
