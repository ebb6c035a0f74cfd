"""Multi-layer perceptrons, sharing, containers, frozen parts, normalisation over features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Architecture, floats


def mlp(bias: bool = True, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 10, bias=bias),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(10, 9, bias=bias),
        nn.Tanh(),
        nn.Linear(9, 3, bias=bias),
    )


class KeywordCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 10)
        self.second = nn.Linear(10, 3)

    def forward(self, *, features: Tensor) -> Tensor:
        return self.second(input=self.first(input=features).relu_())


class Residual(nn.Module):
    """In-place additions after a layer, the classic that breaks full backward hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            out = block(F.gelu(x))
            out += x
            x = out.mul_(0.9)
        return self.head(x)


class TiedLinears(nn.Module):
    """Two layers hold one weight; their biases differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 8)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.right(torch.tanh(self.left(torch.tanh(self.stem(x)))))


class Repeated(nn.Module):
    """One layer called several times in a forward."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.stem = nn.Linear(7, 8)
        self.shared = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.norm(torch.tanh(self.shared(x)))
        return x


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(
            {
                "wide": nn.Sequential(nn.Linear(7, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 8))),
                "deep": nn.ModuleList([nn.Linear(7, 9), nn.ModuleDict({"inner": nn.Linear(9, 8)})]),  # type: ignore[dict-item]
            }
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        first, inner = self.towers["deep"]  # type: ignore[misc]
        return {"out": self.towers["wide"](batch["x"]) + inner["inner"](first(batch["x"]).sigmoid())}


class Unused(nn.Module):
    """A layer that is never called and one whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(7, 3)
        self.never = nn.Linear(7, 3)
        self.wasted = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.wasted(x)
        return self.used(x)


def frozen_parts() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index]
    model[3].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    model[5].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    return model


class Norms(nn.Module):
    """LayerNorm over one and two dimensions, without bias, without parameters, and RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 8)
        self.layer = nn.LayerNorm(8)
        self.plane = nn.LayerNorm((4, 8))
        self.scale = nn.LayerNorm(8, bias=False)
        self.bare = nn.LayerNorm(8, elementwise_affine=False)
        self.rms = nn.RMSNorm(8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        x = self.plane(self.layer(self.stem(x)) + 0.1)
        return self.head(self.rms(self.bare(self.scale(torch.sin(x)))))


class LayerScale(nn.Module):
    """ConvNeXt's and CaiT's bare gain per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((7,), 0.5))
        self.body = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.body(x)


class Mixture(nn.Module):
    """Experts over gathered rows: ``declared`` models say whose rows they gathered through ``tracker.rows``."""

    def __init__(self, declared: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)
        self.declared = declared
        if declared:
            self.row_context = None
            self.row_ids: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        out = torch.zeros_like(x)
        route = torch.arange(len(x)) * 2 % 5 % 3  # fixed, so that perturbed inputs keep their experts
        for number, expert in enumerate(self.experts):
            chosen = (route == number).nonzero().squeeze(1)
            if self.declared and self.row_context is not None:
                with self.row_context(self.row_ids[chosen]):
                    part = expert(x[chosen])
            else:
                part = expert(x[chosen])
            out = out.index_add(0, chosen, part)
        return self.head(out)


GATHERED = "rows are gathered"

ARCHITECTURES = [
    Architecture("mlp", mlp, floats(7)),
    Architecture("mlp_no_bias", lambda: mlp(bias=False), floats(7)),
    Architecture("mlp_dropout", lambda: mlp(dropout=0.3), floats(7)),
    Architecture("mlp_3d", mlp, floats(4, 7)),
    Architecture("mlp_tokens", mlp, floats(5, 7), tokens=True, token_wise=True),
    Architecture("mlp_4d", mlp, floats(2, 3, 7)),
    Architecture("mlp_4d_tokens", mlp, floats(5, 3, 7), tokens=True, token_wise=True),
    Architecture("keyword_calls", KeywordCalls, lambda b, dtype: ((), {"features": torch.randn(b, 7, dtype=dtype)})),
    Architecture("residual_inplace", Residual, floats(7)),
    Architecture("tied_linears", TiedLinears, floats(7)),
    Architecture("repeated_twice", lambda: Repeated(2), floats(7)),
    Architecture("repeated_ten_times", lambda: Repeated(10), floats(3, 7)),
    Architecture(
        "containers",
        Containers,
        lambda b, dtype: (({"x": torch.randn(b, 7, dtype=dtype)},), {}),
        readout=lambda out: out["out"],
    ),
    Architecture("unused", Unused, floats(7), either=("never.*", "wasted.*")),
    Architecture("frozen_parts", frozen_parts, floats(7)),
    Architecture("norms", Norms, floats(4, 7)),
    Architecture("layer_scale", LayerScale, floats(7), unattributed={"gamma": "bare parameter"}),
    Architecture("moe_gathered", lambda: Mixture(False), floats(7), unattributed={"experts.*": GATHERED}),
    Architecture("moe_declared", lambda: Mixture(True), floats(7), compiles=False),
]
