"""The Triton kernels, one stem a file, imported when a GPU first needs one: importing triton takes 0.2 s.

Sizes that change from batch to batch (rows, entries, segments) are in ``do_not_specialize``: else Triton would compile
anew, for seconds in the middle of training, where one becomes 1 or a multiple of 16. Feature sizes and the strides that
follow from them are specialised: loads vectorise where they are multiples of 16.
"""

from __future__ import annotations


def from_shared_memory(major: int) -> bool:
    """Whether the tensor cores of this compute capability read their operands from shared memory (wgmma, tcgen05) and
    large tiles pay. Those of sm_80 to sm_89 and of sm_120 take them from registers (mma.sync), and a block there may
    have 99 KiB of shared memory."""
    return major in (9, 10, 11)
