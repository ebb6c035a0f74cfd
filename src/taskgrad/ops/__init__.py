"""The kernels as functions on tensors, each also registered as ``torch.ops.taskgrad.<name>``."""

from __future__ import annotations

from .conv_sketch import conv_sketch
from .embedding_stats import embedding_stats
from .segment_sum import segment_sum
from .sum_gram import sum_gram
from .wgrad_sketch import wgrad_sketch

__all__ = ["conv_sketch", "embedding_stats", "segment_sum", "sum_gram", "wgrad_sketch"]
