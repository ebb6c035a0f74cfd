"""Layer kinds whose weight gradient is split by task, one file each."""

from __future__ import annotations

import sys

from . import conv, embedding, norm
from .base import Capture, Gauge, Unattributed, find_capture, register_capture
from .linear import Conv1DCapture
from .per_example import per_example

__all__ = [
    "Capture",
    "Gauge",
    "Unattributed",
    "conv",
    "embedding",
    "find_capture",
    "norm",
    "per_example",
    "register_capture",
    "register_transformers",
]


def register_transformers() -> None:
    """Register transformers' ``Conv1D`` (GPT-2) if transformers has been imported: a model of it cannot exist
    otherwise."""
    utils = sys.modules.get("transformers.pytorch_utils")
    if utils is not None:
        register_capture(utils.Conv1D)(Conv1DCapture)
