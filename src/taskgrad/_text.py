"""Names that come from outside, made fit to print."""

from __future__ import annotations

import sys


def printable(text: str, width: int | None = None) -> str:
    r"""``text`` on one line that no terminal acts on: control characters, line breaks and what standard output cannot
    encode as escapes (``\n``, ``\x1b``, ``\u65e5``); with ``width``, longer text has its middle left out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a stand-in for the stream may have none
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    if width is None or len(shown) <= width:
        return shown
    kept = width - 3
    return f"{shown[: kept - kept // 2]}...{shown[len(shown) - kept // 2 :]}"
