"""The kernels as functions on tensors, each also registered as ``torch.ops.taskgrad.<name>`` when this is imported."""

from __future__ import annotations

from .conv_sketch import conv_sketch
from .embedding_stats import embedding_gram, embedding_stats
from .ghost_gram import ghost_gram
from .memory_read import memory_read
from .memory_write import memory_write
from .segment_sum import norm_segment_sum, segment_sum
from .sketch_all import sketch_all
from .sketch_params import sketch_params
from .sum_gram import sum_gram
from .wgrad_gram import wgrad_gram
from .wgrad_sketch import wgrad_sketch
from .wgrad_stats import wgrad_stats

__all__ = [
    "conv_sketch",
    "embedding_gram",
    "embedding_stats",
    "ghost_gram",
    "memory_read",
    "memory_write",
    "norm_segment_sum",
    "segment_sum",
    "sketch_all",
    "sketch_params",
    "sum_gram",
    "wgrad_gram",
    "wgrad_sketch",
    "wgrad_stats",
]
