"""Policies: from a step report to the probabilities of the next batches."""

from __future__ import annotations

from .base import FixedPolicy, Policy, PolicyState, ReportLike
from .overwrite_boost import OverwriteBoost
from .proportional import Proportional
from .static import Static
from .temperature import Temperature
from .uniform import Uniform

__all__ = [
    "FixedPolicy",
    "OverwriteBoost",
    "Policy",
    "PolicyState",
    "Proportional",
    "ReportLike",
    "Static",
    "Temperature",
    "Uniform",
]
