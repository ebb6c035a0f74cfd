"""Models made to fool a tracker: what it attributes here by layer calls alone is wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .base import VOCAB, WIDTH, Architecture, floats, tokens


class FunctionalHead(nn.Module):
    """The embedding's weight is also used by F.linear, which no module sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, index: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.embedding(index))), self.embedding.weight)


class TransposedTie(nn.Module):
    """An autoencoder that decodes with the transposed weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, WIDTH)
        self.encode = nn.Linear(WIDTH, 4)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encode(torch.tanh(self.stem(x)))) @ self.encode.weight)


class Gained(nn.Linear):
    """A subclass whose forward is its own: patching it as a Linear would change the model."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2.0 * self.weight, self.bias) + 1.0


class Wrapped(nn.Module):
    """A gained subclass, a weight-normed layer and a hooked layer in one chain."""

    def __init__(self) -> None:
        super().__init__()
        self.gained = Gained(7, 8)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.hooked = nn.Linear(8, 3)
        self.hooked.register_forward_hook(lambda module, args, out: out * 3.0)
        self.hooked.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))

    def forward(self, x: Tensor) -> Tensor:
        return self.hooked(torch.tanh(self.normed(torch.tanh(self.gained(x)))))


class Permuted(nn.Module):
    """A layer that sees the batch in another order: right shape, wrong rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(torch.tanh(self.stem(x)).roll(1, 0)).roll(-1, 0)
        return self.head(torch.tanh(x))


class SharedAcrossRows(nn.Module):
    """One layer, called once on the batch's rows and once on rows that are not the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 7)
        self.shared = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.shared(x).sum(1) + self.shared(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1)


class LearnedQuery(nn.Module):
    """A Linear of a bare parameter [1, d], broadcast over the batch afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, WIDTH))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.stem = nn.Linear(7, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.project(self.query) + self.stem(x)))


class PooledHead(nn.Module):
    """With ids per token, a layer after pooling has no token rows; its input [B, d] has d = S."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 5)
        self.gate = nn.Linear(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x * self.gate(x.mean(1))[:, None])


class HalfBatch(nn.Module):
    """A layer that sees the first half of the batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        half = len(x) // 2
        return torch.cat([self.inner(x[:half]), x[half:]])


class BatchAttention(nn.Module):
    """Attention across the examples of a batch: what follows depends on all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + F.scaled_dot_product_attention(x[None], x[None], x[None])[0])


UNSEEN = "weight also used outside its layer"

ARCHITECTURES = [
    Architecture(
        "functional_head", FunctionalHead, tokens(), tokens=True, token_wise=True, unattributed={"embedding.*": UNSEEN}
    ),
    Architecture("transposed_tie", TransposedTie, floats(7), unattributed={"encode.weight": UNSEEN}),
    Architecture(
        "wrapped",
        Wrapped,
        floats(7),
        unattributed={"gained.*": "forward of its own", "normed.parametrizations.*": "weight is computed"},
        either=("normed.bias",),
    ),
    Architecture("permuted", Permuted, floats(7), unattributed={"inner.*": "rows are permuted"}),
    Architecture(
        "shared_across_rows", SharedAcrossRows, floats(3, 7), unattributed={"shared.*": "rows are tokens in one call"}
    ),
    Architecture(
        "learned_query",
        LearnedQuery,
        floats(7),
        unattributed={"query": "bare parameter", "project.*": "no batch rows"},
    ),
    Architecture("pooled_head", PooledHead, floats(5, 7), tokens=True, unattributed_tokens={"gate.*": "no token rows"}),
    Architecture("half_batch", HalfBatch, floats(7), unattributed={"inner.*": "rows are half of the batch's"}),
    Architecture("batch_attention", BatchAttention, floats(7), mixes=True, either=("head.*",)),
]
