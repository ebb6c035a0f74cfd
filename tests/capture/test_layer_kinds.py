"""Every layer kind in every option it has, one layer between two dense ones, against separate backwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg
from tests.utils.architectures import squared_error
from tests.utils.oracle import separate_backwards
from tests.utils.steps import TASKS, Case, Expected, assert_report, plain_grads, relative_error, tracked_step

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear_3d": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "linear_5d": (lambda: nn.Linear(5, 4), (2, 3, 2, 5)),
    "linear_one_feature": (lambda: nn.Linear(1, 1), (3, 1)),
    "layer_norm": (lambda: nn.LayerNorm(5), (5,)),
    "layer_norm_2d": (lambda: nn.LayerNorm((3, 5), eps=1e-3), (3, 5)),
    "layer_norm_rows": (lambda: nn.LayerNorm(5, bias=False), (2, 3, 5)),
    "rms_norm": (lambda: nn.RMSNorm(5), (5,)),
    "rms_norm_eps": (lambda: nn.RMSNorm((3, 5), eps=1e-2), (2, 3, 5)),
    "group_norm_2d": (lambda: nn.GroupNorm(2, 4), (4,)),
    "group_norm_3d": (lambda: nn.GroupNorm(4, 4), (4, 3)),
    "group_norm_4d": (lambda: nn.GroupNorm(1, 4), (4, 3, 2)),
    "group_norm_5d": (lambda: nn.GroupNorm(2, 4), (4, 2, 3, 2)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 7)),
    "conv1d_groups": (lambda: nn.Conv1d(4, 8, 2, groups=4, stride=2, bias=False), (4, 9)),
    "conv1d_dilated": (lambda: nn.Conv1d(4, 4, 3, dilation=3, padding=2), (4, 8)),
    "conv1d_same_even": (lambda: nn.Conv1d(4, 4, 4, padding="same", dilation=3), (4, 9)),
    "conv1d_valid": (lambda: nn.Conv1d(4, 4, 3, padding="valid"), (4, 9)),
    "conv1d_circular": (lambda: nn.Conv1d(4, 4, 3, padding=2, padding_mode="circular"), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3), (4, 5, 4)),
    "conv2d_stride_leftover": (lambda: nn.Conv2d(4, 3, 2, stride=(3, 2)), (4, 7, 5)),
    "conv2d_uneven": (lambda: nn.Conv2d(4, 6, (1, 3), (2, 1), padding=(0, 1), dilation=(1, 2), groups=2), (4, 5, 5)),
    "conv2d_same": (lambda: nn.Conv2d(4, 4, (2, 4), padding="same", groups=4), (4, 5, 5)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="reflect"), (4, 5, 5)),
    "conv2d_replicate_same": (lambda: nn.Conv2d(4, 3, 3, padding="same", padding_mode="replicate"), (4, 5, 5)),
    "conv2d_pointwise": (lambda: nn.Conv2d(4, 3, 1), (4, 3, 3)),
    "conv2d_whole_image": (lambda: nn.Conv2d(4, 3, (3, 2)), (4, 3, 2)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2, stride=(1, 2, 1), padding=(1, 0, 1), groups=2), (4, 2, 4, 3)),
    "conv3d_circular": (lambda: nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 3, 2)),
    "transpose1d": (lambda: nn.ConvTranspose1d(4, 3, 3), (4, 5)),
    "transpose1d_groups": (lambda: nn.ConvTranspose1d(4, 6, 4, 2, 1, groups=2, bias=False), (4, 5)),
    "transpose1d_dilated": (lambda: nn.ConvTranspose1d(4, 3, 3, dilation=2, padding=2), (4, 5)),
    "transpose2d": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (4, 3, 2)),
    "transpose2d_output_padding": (lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=(1, 0)), (4, 3, 4)),
    "transpose2d_uneven": (lambda: nn.ConvTranspose2d(4, 4, (1, 3), (3, 2), (0, 2), 0, 4, True, (1, 2)), (4, 2, 5)),
    "transpose2d_gaps": (lambda: nn.ConvTranspose2d(4, 2, 1, stride=2), (4, 3, 2)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 3, (2, 1, 2), stride=(2, 1, 1), padding=(1, 0, 0)), (2, 2, 3, 2)),
}  # fmt: skip
IDS = torch.tensor([2, 0, -1, 1, 0, 2])


class Sandwich(nn.Module):
    """The layer between two gains, so that its input and its output both carry gradients."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shape = shape
        self.view = view
        self.first = nn.Linear(3, int(torch.tensor(shape).prod()))
        self.layer = layer
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.2 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)).unflatten(-1, self.shape)
        return torch.tanh(self.layer(self.view(x)))


def strided(x: Tensor) -> Tensor:
    """The same values behind strides that are not contiguous."""
    return torch.stack([x, x + 1], -1)[..., 0]


def turned(x: Tensor) -> Tensor:
    """The same values with the last feature dimension outermost in memory, as ``channels_last`` and transposes do."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 2 else x.t().contiguous().t()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("view", [lambda x: x, strided, turned], ids=["contiguous", "strided", "turned"])
@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, mode: str, view: Callable[[Tensor], Tensor]) -> None:
    make, shape = LAYERS[name]
    model = Sandwich(make(), shape, view).double()
    case = Case(model, (torch.randn(6, 3, dtype=torch.float64),), {}, lambda out: squared_error(out, 1), IDS, None)
    plain, _ = plain_grads(case)
    oracle = separate_backwards(*case.oracle_arguments)
    done = tracked_step(case, mode=mode, sketch_dim=4096)
    assert set(done.attributed) == set(oracle), done.unattributed
    for key, grad in plain.items():
        assert relative_error(done.grads[key], grad, oracle[key]) <= 1e-12, key
    if mode == "exact":
        for key, parts in done.task_gradients.items():
            assert relative_error(parts, oracle[key]) <= 1e-10, key
    assert_report(done.report, Expected.of(oracle, oracle, IDS, None), 1e-10)


@pytest.mark.parametrize("sketch_dim", [16, 40])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_sketch_of_a_step_is_linear(name: str, sketch_dim: int) -> None:
    """Three tasks in one batch, and each task alone in a batch of its own: the same sketches, hence the same Gram.

    The maps are functions of the parameters' names and shapes, so equal models have equal maps.
    """
    make, shape = LAYERS[name]
    model = Sandwich(make(), shape, lambda x: x).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    loss = lambda out: squared_error(out, 1)  # noqa: E731
    together = tracked_step(Case(model, (x,), {}, loss, IDS, None), mode="sketch", sketch_dim=sketch_dim)
    together.tracker.remove()
    model.zero_grad()
    # one example at a time: nothing to verify with
    with_micro_batches = tg.track(model, tasks=list(TASKS), mode="sketch", sketch_dim=sketch_dim, verify=False)
    target_rows = loss(model(x)).detach()
    for row in range(6):
        with with_micro_batches.batch(IDS[row : row + 1]):
            out = model(x[row : row + 1])
            index = torch.arange(row * out.numel(), (row + 1) * out.numel(), dtype=torch.float64)
            error = (out - torch.sin(1.7 * index + 0.3).view_as(out)).square().mean()
            torch.testing.assert_close(error.detach(), target_rows[row])
            (error / 6).backward()
    with_micro_batches.step()
    torch.testing.assert_close(with_micro_batches.report().gram, together.report.gram, rtol=1e-9, atol=1e-18)


class Upsampler(nn.Module):
    """Asks its transposed convolution for a size."""

    def __init__(self, size: list[int] | None, **options: object) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Linear(3, 4 * 5)
        self.up = nn.ConvTranspose1d(4, 2, 3, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(torch.tanh(self.first(x)).unflatten(-1, (4, 5)), output_size=self.size))


def _upsampled(size: list[int] | None, **options: object) -> tuple[set[str], dict[str, str]]:
    """What is attributed, and what is not, of a model whose gradients were compared."""
    model = Upsampler(size, **options).double()
    case = Case(model, (torch.randn(6, 3, dtype=torch.float64),), {}, lambda out: squared_error(out, 1), IDS, None)
    plain, _ = plain_grads(case)
    oracle = separate_backwards(*case.oracle_arguments)
    done = tracked_step(case, mode="exact")
    for key, grad in plain.items():
        assert relative_error(done.grads[key], grad, oracle[key]) <= 1e-12, key
    for key in done.attributed:
        assert relative_error(done.task_gradients[key], oracle[key]) <= 1e-10, key
    return set(done.attributed), done.unattributed


@pytest.mark.parametrize("size", [[11], [12]])
def test_the_size_that_a_transposed_convolution_is_asked_for(size: list[int]) -> None:
    assert _upsampled(size, stride=2) == ({"first.weight", "first.bias", "up.weight", "up.bias"}, {})


def test_outputs_that_no_convolution_back_passes_are_left_out_by_name() -> None:
    attributed, unattributed = _upsampled(None, stride=2, dilation=3, output_padding=2)
    assert attributed == {"first.weight", "first.bias"}
    assert set(unattributed) == {"up.weight", "up.bias"} and "output_padding of (2,)" in unattributed["up.weight"]


class Tokens(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(4, 2)

    def forward(self, index: Tensor) -> Tensor:
        return torch.tanh(self.head(self.table(index)))


@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 2, 5), (1, 5), (1, 2, 5)])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None, mode: str) -> None:
    model = Tokens(padding_idx=padding_idx).double()
    index = torch.randint(9, shape)
    index.view(-1)[::3] = 8 if padding_idx == -1 else padding_idx or 0
    ids = IDS if shape[0] == 6 else torch.tensor([1])
    case = Case(model, (index,), {}, lambda out: squared_error(out, 1), ids, None)
    oracle = separate_backwards(*case.oracle_arguments)
    plain, _ = plain_grads(case)
    done = tracked_step(case, mode=mode, sketch_dim=4096)
    assert set(done.attributed) == set(oracle), done.unattributed
    for key, grad in plain.items():
        assert relative_error(done.grads[key], grad, oracle[key]) <= 1e-12, key
    assert_report(done.report, Expected.of(oracle, oracle, ids, None), 1e-10)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_embedding_options_without_a_rule_keep_their_own_gradient(options: dict[str, object]) -> None:
    model = Tokens(**options).double()
    case = Case(model, (torch.randint(9, (6, 5)),), {}, lambda out: squared_error(out, 1), IDS, None)
    plain, _ = plain_grads(case)
    done = tracked_step(case)
    assert "table.weight" in done.unattributed
    assert set(done.attributed) == {"head.weight", "head.bias"}
    for key, grad in plain.items():
        assert done.grads[key].is_sparse == grad.is_sparse
        assert relative_error(done.grads[key].to_dense(), grad.to_dense()) <= 1e-12, key
