"""Every architecture of the zoo by name."""

from __future__ import annotations

from .zoo import conv, dense, libraries, sequence, traps
from .zoo.base import BATCH, SEQ, VOCAB, Architecture, squared_error

ARCHITECTURES = {
    architecture.name: architecture
    for family in (dense, conv, sequence, traps, libraries)
    for architecture in family.ARCHITECTURES
}

__all__ = ["ARCHITECTURES", "BATCH", "SEQ", "VOCAB", "Architecture", "squared_error"]
