"""Autocast and half precision, within twice the error that PyTorch itself makes."""

from __future__ import annotations

import copy

import pytest
import torch

import taskgrad as tg
from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import mean_loss, separate_backwards, weight_copies
from tests.utils.steps import TASKS, Case, make_case, relative_error

NAMES = (
    "mlp", "mlp_4d", "conv1d", "conv2d", "norms", "group_norm_4d", "gpt_row_positions_tied", "hf_gpt2_eager", "lora",
    "repeated_twice", "residual_conv",
)  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # torch's own, for RMSNorm
]


def native_parts(case: Case) -> dict[str, torch.Tensor]:
    """g_t by separate backwards under autocast, untracked: the error PyTorch makes by itself."""
    parts: dict[str, list[torch.Tensor]] = {}
    for task in [*range(len(TASKS)), -1]:
        twin = copy.deepcopy(case.model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows = case.row_loss(twin(*case.args, **case.kwargs))
        mean_loss(rows.float() * (case.ids == task), None).backward()
        for name, p in twin.named_parameters():
            if p.requires_grad:
                parts.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad)
    return {name: torch.stack(rows) for name, rows in parts.items()}


@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_bf16(name: str, mode: str) -> None:
    case = make_case(ARCHITECTURES[name], "example", dtype=torch.float32)
    truth = separate_backwards(*case.oracle_arguments)
    native = native_parts(case)
    twin = copy.deepcopy(case.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_out = twin(*case.args, **case.kwargs)
        plain = case.row_loss(plain_out).float().mean()
    plain.backward()
    tracker = tg.track(case.model, tasks=list(TASKS), mode=mode, sketch_dim=4096)
    with tracker.batch(case.ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = case.model(*case.args, **case.kwargs)
            loss = case.row_loss(out).float().mean()
        loss.backward()
    tracker.step()
    # twice the native error, and never asked to be better than 2 roundings of bf16
    for key, p in twin.named_parameters():
        if not p.requires_grad:
            continue
        got = dict(case.model.named_parameters())[key].grad
        assert got is not None and p.grad is not None and got.dtype == p.grad.dtype
        want = truth[key].sum(0)
        native_error = relative_error(p.grad, want, truth[key])
        assert relative_error(got, want, truth[key]) <= 2 * native_error + 2**-8, key
    must, _ = ARCHITECTURES[name].expected(case.model, "example")
    assert must <= set(tracker.coverage().attributed), tracker.coverage().unattributed
    if mode == "exact":
        for key, parts in tracker.task_gradients().items():
            error = relative_error(parts, truth[key])
            assert error <= 2 * relative_error(native[key], truth[key]) + 2**-8, key
    report = tracker.report()
    assert report.valid
    names = tracker.coverage().attributed
    exact = torch.cat([truth[n].flatten(1) for n in names], 1)
    rounded = torch.cat([native[n].double().flatten(1) for n in names], 1)
    want, by_torch = (exact @ exact.T)[:3, :3], (rounded @ rounded.T)[:3, :3]
    assert relative_error(report.gram, want) <= 2 * relative_error(by_torch, want) + 2**-7
    assert out.dtype == plain_out.dtype if isinstance(out, torch.Tensor) else True


@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize("name", ["mlp", "gpt_row_positions_tied", "norms"])
def test_a_model_in_bf16(name: str, mode: str) -> None:
    case = make_case(ARCHITECTURES[name], "example", dtype=torch.bfloat16)
    truth = weight_copies(*case.oracle_arguments)
    twin = copy.deepcopy(case.model)
    case.loss(twin).backward()
    tracker = tg.track(case.model, tasks=list(TASKS), mode=mode, sketch_dim=4096)
    with tracker.batch(case.ids):
        case.loss().backward()
    tracker.step()
    for (key, p), q in zip(case.model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.dtype == torch.bfloat16
        want = truth[key].sum(0)
        limit = 2 * relative_error(q.grad, want, truth[key]) + 2**-7
        assert relative_error(p.grad, want, truth[key]) <= limit, key
    full = torch.cat([truth[n].flatten(1) for n in tracker.coverage().attributed], 1)
    assert len(tracker.coverage().attributed) == len(truth), tracker.coverage().unattributed
    assert relative_error(tracker.report().gram, (full @ full.T)[:3, :3]) <= 0.1


def test_autocast_keeps_a_shared_weight_whole() -> None:
    """Autocast caches the cast of a weight over its uses; the parts of all uses must arrive."""
    case = make_case(ARCHITECTURES["repeated_ten_times"], "example", dtype=torch.float32)
    truth, native = separate_backwards(*case.oracle_arguments), native_parts(case)
    tracker = tg.track(case.model, tasks=list(TASKS), mode="exact")
    with tracker.batch(case.ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = case.loss()
        loss.backward()
    tracker.step()
    for key, parts in tracker.task_gradients().items():
        assert relative_error(parts, truth[key]) <= 2 * relative_error(native[key], truth[key]) + 2**-8, key


def test_the_loss_scale_is_divided_out() -> None:
    reports, grams = [], []
    for scale in (None, 1024.0, torch.tensor(2.0**12)):
        torch.manual_seed(0)
        case = make_case(ARCHITECTURES["mlp"], "example")
        factor = torch.tensor(float(1.0 if scale is None else scale), dtype=torch.float64)
        loss_scale = None if scale is None else factor
        tracker = tg.track(case.model, tasks=list(TASKS), loss_scale=loss_scale)
        with tracker.batch(case.ids):
            (case.loss() * factor).backward()
        tracker.step()
        reports.append(tracker.report())
        grams.append(tracker.report().gram)
        assert tracker.coverage().unattributed == {}
    torch.testing.assert_close(grams[1], grams[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(grams[2], grams[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(reports[1].norm, reports[0].norm, rtol=1e-12, atol=0)
