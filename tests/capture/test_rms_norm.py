"""``nn.RMSNorm`` by torch's fused kernels, which only GPUs have: kernels of the same contract stand in on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg
from taskgrad.capture import norm

CALLS: list[str] = []


def _forward(x: Tensor, shape: Any, weight: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """As the kernel of torch for CUDA: one dtype for both, statistics in float32 (float64 of it)."""
    assert weight.dtype == x.dtype
    CALLS.append("forward")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = list(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
    return (wide * rstd * weight).to(x.dtype), rstd


def _backward(
    dy: Tensor, x: Tensor, shape: Any, rstd: Tensor, weight: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor | None]:
    assert dy.dtype == weight.dtype == x.dtype and rstd.dtype == torch.promote_types(x.dtype, torch.float32)
    assert rstd.numel() * weight.numel() == x.numel()
    CALLS.append(f"backward {mask}")
    dims = list(range(-len(shape), 0))
    xhat, scaled = x.to(rstd.dtype) * rstd, dy.to(rstd.dtype) * weight
    dx = ((scaled - xhat * (scaled * xhat).mean(dims, keepdim=True)) * rstd).to(x.dtype)
    return dx, (dy * xhat).flatten(0, -1 - len(shape)).sum(0).to(weight.dtype) if mask[1] else None


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    CALLS.clear()
    monkeypatch.setattr(norm, "FUSED", frozenset({"cpu"}))
    with warnings.catch_warnings(), torch.library._scoped_library("aten", "IMPL") as library:
        warnings.simplefilter("ignore")  # of replaced kernels
        library.impl("_fused_rms_norm", _forward, "CPU")
        library.impl("_fused_rms_norm_backward", _backward, "CPU")
        yield


def gradients(dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...], tracked: bool) -> list[Tensor]:
    """Output, and the gradients of input and weight."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, *shape, dtype=torch.float64).to(dtype).requires_grad_()
    layer = nn.RMSNorm(shape, eps=1e-3).to(weight_dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, layer.weight.numel()).view(shape))
    factor = torch.randn(6, 4, *shape, dtype=torch.float64)
    if tracked:
        tracker = tg.track(layer, ["a", "b"], verify=False)
        with tracker.batch(torch.tensor([0, 1, 0, 1, 1, 0])):
            y = layer(x)
            (y.double() * factor).sum().backward()
    else:
        y = layer(x)
        (y.double() * factor).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


@pytest.mark.parametrize("shape", [(8,), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_kernels_run_and_gradients_are_right(dtype: torch.dtype, shape: tuple[int, ...], kernels: None) -> None:
    right = gradients(torch.float64, torch.float64, shape, tracked=False)
    CALLS.clear()
    found = gradients(dtype, dtype, shape, tracked=True)
    assert CALLS == ["forward", "backward [True, False]"]
    rounding = 40 * torch.finfo(dtype).eps
    for a, b in zip(found, right, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=rounding)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_where_torch_takes_the_norm_apart_so_does_the_tracker(kernels: None) -> None:
    """A weight of another dtype than the input."""
    plain = gradients(torch.bfloat16, torch.float32, (8,), tracked=False)
    assert not CALLS
    found = gradients(torch.bfloat16, torch.float32, (8,), tracked=True)
    assert not CALLS and torch.equal(found[0], plain[0]) and found[0].dtype == plain[0].dtype
    torch.testing.assert_close(found[1], plain[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_memory_format_decides_as_in_torch(memory_format: torch.memory_format, kernels: None) -> None:
    x = torch.randn(6, 3, 4, 5).to(memory_format=memory_format)
    layer = nn.RMSNorm((3, 4, 5))
    plain = layer(x)
    of_plain = list(CALLS)
    CALLS.clear()
    with tg.track(layer, ["a", "b"], verify=False).batch(torch.tensor([0, 1, 0, 1, 1, 0])):
        assert torch.equal(layer(x), plain)
    assert of_plain == CALLS == (["forward"] if memory_format == torch.contiguous_format else [])
