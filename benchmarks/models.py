"""The models that steps are measured on: a GPT-like decoder of any size, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Setting:
    vocab: int
    width: int
    layers: int
    batch: int
    length: int
    tasks: int
    tied: bool = True  # the output layer has the token embedding's weight
    batched_positions: bool = False  # position ids [B, L]; GPT-2's are [1, L]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """GPT-2's shapes: ``Setting(50304, 768, 12, ...)`` has 124 M parameters."""

    def __init__(self, s: Setting) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(s.vocab, s.width), nn.Embedding(s.length, s.width)
        self.blocks = nn.ModuleList(Block(s.width) for _ in range(s.layers))
        self.norm, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, s.vocab, bias=False)
        self.batched_positions = s.batched_positions
        if s.tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if self.batched_positions:
            tokens, positions = tokens.contiguous(), positions.expand(tokens.shape).contiguous()
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def losses(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """[B]: the mean loss of every example of tokens [B, L + 1]."""
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    each = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return each.view(targets.shape).mean(1)
