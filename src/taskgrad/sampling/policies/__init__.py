"""Policies: from a step report to the probabilities of the next batches."""

from __future__ import annotations

from .ado import ADO
from .base import FixedPolicy, Policy, PolicyState, ReportLike
from .cooldown import Cooldown
from .doge import DoGE
from .exp3 import Exp3
from .overwrite_boost import OverwriteBoost
from .pike import PiKE
from .proportional import Proportional
from .replay import Replay
from .sheared_llama import ShearedLlama
from .shuffled import Shuffled
from .static import Static
from .temperature import Temperature
from .two_phase import TwoPhase
from .uniform import Uniform
from .unimax import UniMax

__all__ = [
    "ADO",
    "Cooldown",
    "DoGE",
    "Exp3",
    "FixedPolicy",
    "OverwriteBoost",
    "PiKE",
    "Policy",
    "PolicyState",
    "Proportional",
    "Replay",
    "ReportLike",
    "ShearedLlama",
    "Shuffled",
    "Static",
    "Temperature",
    "TwoPhase",
    "UniMax",
    "Uniform",
]
