"""Transformers in every way of feeding positions, recurrent nets, attention modules that bypass their layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import SEQ, VOCAB, WIDTH, Architecture, Inputs, floats, tokens


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH, causal: bool = True) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        heads = (*x.shape[:2], 2, -1)
        k, v = self.kv(x if context is None else context).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q(x), k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and context is None)
        return self.out(mixed.transpose(1, 2).reshape(*heads[:2], -1))


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """``positions``: how the position embedding is fed, "row" [1, S], "flat" [S], "batch" [B, S] or None."""

    def __init__(
        self, positions: str | None = "row", tied: bool = False, dropout: float = 0.0, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.positions = positions
        self.embedding = nn.Embedding(VOCAB, WIDTH, padding_idx=padding_idx)
        self.position = nn.Embedding(SEQ + 4, WIDTH) if positions else None
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index)
        if self.position is not None:
            place = torch.arange(index.shape[1])
            if self.positions == "row":
                place = place[None]
            elif self.positions == "batch":
                place = place.expand(len(index), -1)
            x = x + self.position(place)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class EncoderDecoder(nn.Module):
    """Source and target of different lengths share one embedding; the decoder attends across."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.encoder = Block(causal=False)
        self.decoder = Block()
        self.cross = Attention()
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(self.embedding(source))
        x = self.decoder(self.embedding(target))
        return self.head(x + self.cross(x, memory))


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention``: a bare in_proj, and an out_proj whose forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.core = kind(WIDTH, 9, batch_first=True)
        self.head = nn.Linear(9, 4)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.core(self.embedding(index))[0])


class SequenceFirst(nn.Module):
    """The model works on [S, B, d]; only its ends are batch-first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, index: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embedding(index).transpose(0, 1)))
        return self.head(x.transpose(0, 1))


class Windows(nn.Module):
    """Swin's windows: [B, S, d] -> [B * windows, S / windows, d] for the inner layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).roll(1, 1)
        windows = x.reshape(len(x) * 2, -1, WIDTH)
        return self.head(torch.tanh(self.inner(windows)).reshape(x.shape).roll(-1, 1))


class Flattened(nn.Module):
    """Tokens folded into the batch before the head, as many losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index)
        return self.head(x.flatten(0, 1)).unflatten(0, index.shape)


def torch_encoder_layer() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, WIDTH),
        nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True),
        nn.Linear(WIDTH, 4),
    )


def source_and_target(batch: int, dtype: torch.dtype) -> Inputs:
    source, target = torch.randint(VOCAB, (batch, SEQ + 2)), torch.randint(VOCAB, (batch, SEQ))
    return (source,), {"target": target}


ATTENTION = {
    "*in_proj_*": "bare parameter of nn.MultiheadAttention",
    "*out_proj.*": "layer never called, its weight is used by F.multi_head_attention_forward",
}

ARCHITECTURES = [
    Architecture("gpt", lambda: GPT(None), tokens(), tokens=True),
    Architecture("gpt_tied", lambda: GPT(None, tied=True), tokens(), tokens=True),
    Architecture("gpt_row_positions", lambda: GPT("row"), tokens(), tokens=True),
    Architecture("gpt_row_positions_tied", lambda: GPT("row", tied=True), tokens(), tokens=True),
    Architecture("gpt_batch_positions", lambda: GPT("batch"), tokens(), tokens=True),
    Architecture(
        "gpt_flat_positions",
        lambda: GPT("flat"),
        tokens(),
        tokens=True,
        unattributed={"position.*": "rows are positions"},
    ),
    Architecture("gpt_dropout", lambda: GPT("row", dropout=0.2), tokens(), tokens=True),
    Architecture("gpt_padding_idx", lambda: GPT("row", padding_idx=3), tokens(), tokens=True),
    Architecture("encoder_decoder", EncoderDecoder, source_and_target),
    Architecture("torch_attention", TorchAttention, tokens(), tokens=True, unattributed=ATTENTION),
    Architecture("torch_encoder_layer", torch_encoder_layer, floats(5, 7), tokens=True, unattributed=ATTENTION),
    Architecture(
        "lstm", lambda: Recurrent(nn.LSTM), tokens(), tokens=True, unattributed={"core.*": "no rule for the layer kind"}
    ),
    Architecture(
        "gru", lambda: Recurrent(nn.GRU), tokens(), tokens=True, unattributed={"core.*": "no rule for the layer kind"}
    ),
    Architecture("sequence_first", SequenceFirst, tokens(), unattributed={"inner.*": "rows are positions"}),
    Architecture("windows", Windows, floats(4, 7), unattributed={"inner.*": "rows are windows"}),
    Architecture("flattened", Flattened, tokens(), unattributed={"head.*": "rows are tokens"}),
]
