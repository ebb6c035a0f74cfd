"""The whole tracker on a GPU, in every way a model is run there, against the same run on the CPU in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgrad as tg
from taskgrad import ops
from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import separate_backwards
from tests.utils.steps import make_case, tracked_step

DEVICE = "cuda"
STEPS = 6
TASKS = ("a", "b", "c")
MODES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "exact gram": {"mode": "exact_gram"},
    "sketch": {"mode": "sketch", "sketch_dim": 1024},
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # what torch's compiler warns of depends on the GPU
]


@pytest.fixture(autouse=True)
def fresh_compiler_and_full_precision() -> Iterator[None]:
    torch.compiler.reset()
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.compiler.reset()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.RMSNorm(256), nn.Linear(256, 50)
    )


def _batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens, and unsorted ids that hold every task and rows of none."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 50, (16, 24), generator=generator)
    ids = torch.arange(16) % 4 - 1
    return x, ids[torch.randperm(16, generator=generator)]


def _train(
    device: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    *,
    half: bool = False,
    compiled: dict[str, Any] | None = None,
    steps: int = STEPS,
) -> tuple[tg.StepReport, list[Tensor]]:
    """The report of the last step, and the parameters after it."""
    model = _model().to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tracker = tg.track(model, TASKS, optimizer, **options)
    call = model if compiled is None else torch.compile(model, **compiled)
    for step in range(steps):
        x, ids = _batch(step)
        x = x.to(device)
        torch.compiler.cudagraph_mark_step_begin()
        with tracker.batch(ids), torch.autocast(device, torch.bfloat16, enabled=half):
            if compiled is not None and step == 0:
                tracker.verify(x)  # a compiled model is not verified by itself
            logits = call(x)
            nn.functional.cross_entropy(logits.flatten(0, 1), x.roll(1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = tracker.report(wait=True)
    assert report.valid and report.step == steps
    assert not tracker.coverage().unattributed
    return report, [p.detach().clone() for p in model.parameters()]


def _assert_agrees(report: tg.StepReport, options: dict[str, Any], tolerance: float) -> None:
    truth, _ = _train("cpu", torch.float64, options)
    for name in ("gram", "signal", "memory_dot", "own_effect", "others_effect"):
        got, want = (getattr(r, name).nan_to_num() for r in (report, truth))
        assert (got - want).norm() <= tolerance * want.norm(), name


@pytest.mark.parametrize("mode", MODES)
def test_float32_agrees_with_the_cpu_in_float64(mode: str) -> None:
    _assert_agrees(_train(DEVICE, torch.float32, MODES[mode])[0], MODES[mode], 2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_without_a_graph_break(mode: str) -> None:
    report, _ = _train(DEVICE, torch.float32, MODES[mode], compiled={"fullgraph": True})
    _assert_agrees(report, MODES[mode], 2e-3)


def test_compiled_with_cuda_graphs() -> None:
    """``reduce-overhead`` replays what it can as CUDA graphs; other ids every step must not show old numbers."""
    options = MODES["sketch"]
    report, _ = _train(DEVICE, torch.float32, options, compiled={"fullgraph": True, "mode": "reduce-overhead"})
    _assert_agrees(report, options, 2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_autocast_agrees_roughly(mode: str) -> None:
    """One step: after more of them the parameters differ, which is not the tracker's doing."""
    gram = _train(DEVICE, torch.float32, MODES[mode], half=True, steps=1)[0].gram
    want = _train("cpu", torch.float64, MODES[mode], steps=1)[0].gram
    assert (gram - want).norm() <= 0.03 * want.norm()


def test_on_a_side_stream() -> None:
    context: Any = contextlib.nullcontext()
    if DEVICE == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        context = torch.cuda.stream(stream)
    with context:
        report, _ = _train(DEVICE, torch.float32, MODES["sketch"])
    _assert_agrees(report, MODES["sketch"], 2e-3)


@pytest.mark.parametrize(
    "name", ["mlp", "residual_inplace", "repeated_twice", "gpt_row_positions_tied", "conv2d", "norms"]
)
def test_task_gradients_of_every_layer_kind(name: str) -> None:
    case = make_case(ARCHITECTURES[name], "example")
    oracle = separate_backwards(*case.oracle_arguments)
    case.model.to(DEVICE, torch.float32)
    case.args = tuple(_on_device(a) for a in case.args)
    case.kwargs = {key: _on_device(value) for key, value in case.kwargs.items()}
    got = tracked_step(case).task_gradients
    scale = 1e-4 * torch.stack([g.norm() for g in oracle.values()]).norm()
    assert set(got) == set(oracle)
    for key, want in oracle.items():
        assert (got[key].cpu().double() - want).norm() <= 2e-3 * want.norm() + scale, key


def _on_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(DEVICE, torch.float32) if value.is_floating_point() else value.to(DEVICE)


@pytest.mark.parametrize("mode", MODES)
def test_steps_repeat_bit_for_bit(mode: str) -> None:
    """Twenty times, and not because torch was asked for deterministic algorithms."""
    torch.use_deterministic_algorithms(False)
    runs = [_train(DEVICE, torch.float32, MODES[mode], steps=3) for _ in range(20)]
    first, weights = runs[0]
    for report, others in runs[1:]:
        assert report.to_dict() == first.to_dict()
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_does_not_wait_for_the_gpu(mode: str, where: str) -> None:
    model = _model().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tracker = tg.track(model, TASKS, optimizer, **MODES[mode])
    x, ids = _batch(0)
    x, ids = x.to(DEVICE), ids.to(where)
    for step in range(8):
        # the guards look at the numbers on the first three steps
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")
        try:
            with tracker.batch(ids):
                model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.report()
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert tracker.report(wait=True).step == 8


def _products(dy: Tensor, x: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> list[Tensor]:
    """Everything the ops make of rows whose segments only the device knows."""
    rstd = torch.ones(dy.shape[0], 1, device=dy.device)
    return [
        *ops.wgrad_gram(dy, x, offsets),
        *ops.wgrad_sketch(dy[:, None], x[:, None], None, offsets, left, right),
        ops.ghost_gram(dy, x, offsets),
        ops.segment_sum(dy, None, offsets),
        *ops.norm_segment_sum(dy[:, None], dy[:, None], None, rstd, None, offsets),
        *ops.sum_gram(x),
        ops.sketch_params(dy, torch.ones(dy.shape[0], 16, device=dy.device), left),
    ]


def test_ops_replay_in_a_cuda_graph_with_other_offsets() -> None:
    """The shapes are static, the tasks' lengths are not: grids must not depend on them."""

    def rows(seed: int, bounds: list[int]) -> tuple[Tensor, ...]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        sizes = ((60, 72), (60, 40), (72, 16), (40, 16))
        dy, x, left, right = (torch.randn(*size, generator=generator, device=DEVICE) for size in sizes)
        return dy.bfloat16(), x.bfloat16(), torch.tensor(bounds, device=DEVICE), left.sign(), right.sign()

    static = rows(0, [0, 10, 40, 60, 60])
    _products(*static)  # kernels are compiled, cuBLAS finds its workspace
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _products(*static)
    for seed, bounds in enumerate(([0, 0, 1, 59, 60], [0, 60, 60, 60, 60], [0, 20, 20, 47, 60]), start=1):
        fresh = rows(seed, bounds)
        for place, values in zip(static, fresh, strict=True):
            place.copy_(values)
        graph.replay()
        for number, (got, want) in enumerate(zip(captured, _products(*fresh), strict=True)):
            assert torch.equal(got, want), number


def test_ids_on_the_gpu_say_what_ids_on_the_cpu_say() -> None:
    reports = []
    for device in ("cpu", DEVICE):
        model = _model().to(DEVICE)
        tracker = tg.track(model, TASKS, mode="exact")
        x, ids = _batch(0)
        weight = torch.linspace(0.5, 2.0, 16)
        with tracker.batch(ids.to(device), weight.to(device)) as tracked:
            loss = model(x.to(DEVICE)).float().square().mean((1, 2))
            tracked.losses(loss)
            loss.mean().backward()
        tracker.step()
        reports.append(tracker.report(wait=True))
    for name in ("examples", "tokens", "loss", "gram", "norm"):
        torch.testing.assert_close(getattr(reports[0], name), getattr(reports[1], name))


@pytest.mark.parametrize("bad", [3, -2])
def test_ids_out_of_range_on_the_gpu_raise_with_the_report(bad: int) -> None:
    model = nn.Linear(4, 2).to(DEVICE)
    tracker = tg.track(model, TASKS, verify=False)
    with tracker.batch(torch.tensor([0, 1, bad], device=DEVICE)):
        model(torch.randn(3, 4, device=DEVICE)).sum().backward()
    tracker.step()
    with pytest.raises(ValueError, match=r"step 1: ids must lie in \[-1, 3\)"):
        tracker.report(wait=True)
