"""What tiles have to know of a GPU's tensor cores."""

from __future__ import annotations


def from_shared_memory(major: int) -> bool:
    """Whether the tensor cores of this compute capability read their operands from shared memory (wgmma, tcgen05) and
    large tiles pay. Those of sm_80 to sm_89 and of sm_120 take them from registers (mma.sync), and a block there may
    have 99 KiB of shared memory."""
    return major in (9, 10, 11)
