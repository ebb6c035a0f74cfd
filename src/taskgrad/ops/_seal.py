"""Which sources a compiled library is of, and whether it is whole: ``<library>.seal`` says so, a file beside it.

    <version of the sources> <SHA-256 of the library>

``setup.py`` reads this file as well, where the package is not there yet: it needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def version(sources: Path) -> str:
    """Of the op library's sources in the folder ``csrc``: changes with any of them, and with how they are compiled."""
    recipe = sources / "build.json"
    digest = hashlib.sha256(recipe.read_bytes())
    for files in json.loads(recipe.read_text()).values():
        for name in files:
            if not name.startswith("-"):  # a flag is in the recipe itself
                digest.update((sources / name).read_bytes())
    return digest.hexdigest()[:16]


def beside(library: Path) -> Path:
    return library.with_name(f"{library.name}.seal")


def put(library: Path, sources: Path) -> Path:
    """Seal a library that has just been compiled from ``sources``."""
    seal = beside(library)
    seal.write_text(f"{version(sources)} {hashlib.sha256(library.read_bytes()).hexdigest()}\n")
    return seal


def fault(library: Path, sources: Path) -> str | None:
    """Why ``library`` must not be loaded; None if it is whole and of ``sources``."""
    try:
        content, seal = library.read_bytes(), beside(library).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        return f"it or its seal cannot be read ({error})"
    if len(seal) != 2 or seal[1] != hashlib.sha256(content).hexdigest():
        return "it is damaged: its SHA-256 is not the one in its seal"
    if seal[0] != (wanted := version(sources)):
        return f"it is of version {seal[0]}, the sources here are of version {wanted}"
    return None
