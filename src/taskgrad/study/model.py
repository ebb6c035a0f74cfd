"""A byte-level GPT of about 40 thousand parameters, in plain PyTorch modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm causal self-attention and a feed-forward layer, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        heads = (rows, length, 3, self.heads, width // self.heads)
        q, k, v = self.query_key_value(self.norm_attention(x)).view(heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(rows, length, width))
        out: Tensor = x + self.feed_out(F.gelu(self.feed_in(self.norm_feed(x))))
        return out


class ByteGPT(nn.Module):
    """Next-byte model: int64 [rows, length] in, float logits [rows, length, 256] out."""

    def __init__(self, length: int, width: int = 32, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.08)

    def forward(self, tokens: Tensor) -> Tensor:
        # Positions as [1, length], not [length]: so their gradient can be told apart by example.
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.bytes(tokens) + self.positions(positions)
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out
