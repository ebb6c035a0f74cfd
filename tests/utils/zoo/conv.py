"""Convolutions, group and batch normalisation, a small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Architecture, floats


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv1d(8, 8, 3, dilation=2, groups=4, bias=False),
        nn.Tanh(),
        nn.Conv1d(8, 4, 2, padding="same", padding_mode="circular"),
        nn.Tanh(),
        nn.Conv1d(4, 4, 4, padding="same"),
    )


def conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=(2, 1), padding=(1, 2)),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, dilation=(1, 2), groups=8, padding="same"),
        nn.Tanh(),
        nn.Conv2d(8, 4, (2, 3), padding="same", padding_mode="reflect", groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(4, 3, 1),
    )


def group_norm_3d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.GroupNorm(4, 8), nn.Tanh(), nn.GroupNorm(8, 8), nn.Conv1d(8, 2, 1))


def group_norm_4d() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 1))


def group_norm_2d() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


def batch_norm_eval() -> nn.Module:
    model = batch_norm()
    model[1].eval()  # type: ignore[index]
    return model


def conv_transpose() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1),
        nn.Flatten(),
        nn.Linear(72, 3),
    )


def unsupported_kinds() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(64, 3)
    )


class ResidualConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x.relu())
        return self.head(x.mean((2, 3)))


class VisionTransformer(nn.Module):
    """Class token and positions are bare parameters, expanded over the batch outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x[:, 0])


ARCHITECTURES = [
    Architecture("conv1d", conv1d, floats(3, 16)),
    Architecture("conv2d", conv2d, floats(3, 7, 5)),
    Architecture("conv_transpose", conv_transpose, floats(3, 6, 6)),
    Architecture("group_norm_2d", group_norm_2d, floats(7)),
    Architecture("group_norm_3d", group_norm_3d, floats(3, 9)),
    Architecture("group_norm_4d", group_norm_4d, floats(3, 5, 4)),
    Architecture("residual_conv", ResidualConv, floats(3, 5, 5)),
    Architecture("batch_norm_eval", batch_norm_eval, floats(3, 6, 6), either=("1.*",)),
    Architecture("batch_norm", batch_norm, floats(3, 6, 6), mixes=True, either=("1.*", "3.*", "5.*")),
    Architecture(
        "unsupported_kinds",
        unsupported_kinds,
        floats(3, 6, 6),
        unattributed={"1.*": "no rule for the layer kind", "2.*": "no rule for the layer kind"},
    ),
    Architecture(
        "vit",
        VisionTransformer,
        floats(3, 4, 4),
        unattributed={"class_token": "bare parameter", "positions": "bare parameter"},
    ),
]
