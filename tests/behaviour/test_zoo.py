"""Every architecture, both modes, ids per example and per token, against the oracles."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch

from tests.utils.architectures import ARCHITECTURES, Architecture
from tests.utils.oracle import Gradients, separate_backwards, weight_copies
from tests.utils.steps import (
    CASES,
    TASKS,
    Case,
    Expected,
    assert_report,
    case_id,
    make_case,
    negligible,
    plain_grads,
    relative_error,
    run_batch,
    tracked_step,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
zoo = pytest.mark.parametrize(("architecture", "kind"), CASES, ids=case_id)


def oracle_of(architecture: Architecture, kind: str, case: Case) -> Gradients:
    """Separate backwards wherever nothing mixes: it is the definition."""
    if architecture.mixes or (kind == "token" and not architecture.token_wise):
        return weight_copies(*case.oracle_arguments)
    return separate_backwards(*case.oracle_arguments)


@zoo
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_exact_mode(architecture: Architecture, kind: str, weighted: bool) -> None:
    case = make_case(architecture, kind, weighted=weighted)
    plain, twin = plain_grads(case)
    oracle = oracle_of(architecture, kind, case)
    done = tracked_step(case, mode="exact")

    floor = negligible(plain)
    assert set(done.grads) == set(plain)
    for name, grad in plain.items():
        limit = max(1e-12, architecture.tolerance / 100)
        assert relative_error(done.grads[name], grad, oracle[name], floor) <= limit, name
    for (name, got), (_, want) in zip(case.model.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12, equal_nan=True, msg=f"buffer {name}")

    must, must_not = architecture.expected(case.model, kind)
    assert must <= set(done.attributed), (
        f"unattributed: { {n: done.unattributed.get(n) for n in must - set(done.attributed)} }"
    )
    assert must_not <= set(done.unattributed), f"attributed: {must_not - set(done.unattributed)}"
    assert not set(done.attributed) & set(done.unattributed)
    assert all(reason for reason in done.unattributed.values())

    parts = done.task_gradients
    assert set(parts) >= set(done.attributed)
    assert not any(parts[name].any() for name in set(parts) - set(done.attributed)), "left out, yet not zero"
    for name in done.attributed:
        if architecture.mixes or name in plain:
            assert relative_error(parts[name], oracle[name], floor=floor) <= architecture.tolerance, name
        else:
            assert not parts[name].any(), name
    expected = Expected.of(oracle, done.attributed, case.ids, case.weight)
    assert_report(done.report, expected, architecture.tolerance * 10)


@zoo
def test_sketch_mode_is_exact_where_the_parameters_are_small(architecture: Architecture, kind: str) -> None:
    case = make_case(architecture, kind, weighted=True)
    plain, _ = plain_grads(case)
    oracle = oracle_of(architecture, kind, case)
    done = tracked_step(case, mode="sketch", sketch_dim=4096)
    floor = negligible(plain)
    assert set(done.grads) == set(plain)
    for name, grad in plain.items():
        limit = max(1e-12, architecture.tolerance / 100)
        assert relative_error(done.grads[name], grad, oracle[name], floor) <= limit, name
    must, must_not = architecture.expected(case.model, kind)
    assert must <= set(done.attributed)
    assert must_not <= set(done.unattributed)
    expected = Expected.of(oracle, done.attributed, case.ids, case.weight)
    assert_report(done.report, expected, architecture.tolerance * 10)


@zoo
def test_exact_gram_by_every_pattern_of_use(architecture: Architecture, kind: str) -> None:
    """The first step, single uses, the batch run twice (which single uses cannot say, once), and twice again."""
    case = make_case(architecture, kind, weighted=True)
    plain, _ = plain_grads(case)
    oracle = oracle_of(architecture, kind, case)
    state = torch.random.get_rng_state()
    done = tracked_step(case, mode="exact_gram", sketch_dim=16)  # nothing that is compared here is read off a sketch
    must, must_not = architecture.expected(case.model, kind)
    assert must <= set(done.attributed)
    assert must_not <= set(done.unattributed)
    expected = Expected.of(oracle, done.attributed, case.ids, case.weight)
    assert_report(done.report, expected, architecture.tolerance * 10)
    single = any(p.layout.keeps == "gram" for p in done.tracker._probes.live())
    floor = negligible(plain)
    for step, passes in enumerate((1, 2, 2, 1)):
        case.model.zero_grad()
        surprised = step == 1 and single
        with pytest.warns(UserWarning, match="had one use") if surprised else contextlib.nullcontext():
            for _ in range(passes):
                torch.random.set_rng_state(state)
                run_batch(done.tracker, case)
            done.tracker.step()
        for name, grad in plain.items():
            got = case.model.get_parameter(name).grad
            assert got is not None
            limit = max(1e-12, architecture.tolerance / 100)
            assert relative_error(got, passes * grad, passes * oracle[name], floor) <= limit, name
        report = done.tracker.report()
        if surprised:
            assert report.valid
            for values in (report.gram, report.cosine, report.others_cosine, report.norm):
                assert values.isnan().all()
            continue
        norm, tokens = expected.norm * passes, expected.tokens * passes
        assert_report(
            report,
            replace(expected, gram=expected.gram * passes**2, norm=norm, tokens=tokens),
            architecture.tolerance * 10,
        )
        assert not report.cosine_se.nan_to_num().any()


@zoo
def test_float32_gradients_are_those_of_the_untracked_model(architecture: Architecture, kind: str) -> None:
    case = make_case(architecture, kind, dtype=torch.float32)
    plain, _ = plain_grads(case)
    parts = weight_copies(*case.oracle_arguments)
    done = tracked_step(case, mode="sketch", sketch_dim=64)
    floor = negligible(plain)
    assert set(done.grads) == set(plain)
    for name, grad in plain.items():
        assert relative_error(done.grads[name], grad, parts[name], floor) <= 1e-6, name
    must, must_not = architecture.expected(case.model, kind)
    assert must <= set(done.attributed), (
        f"unattributed: { {n: done.unattributed.get(n) for n in must - set(done.attributed)} }"
    )
    assert must_not <= set(done.unattributed)


@zoo
def test_later_steps_too(architecture: Architecture, kind: str) -> None:
    """What was left out on the first step keeps its gradient, and what counts keeps counting, as the model moves."""
    case = make_case(architecture, kind)
    tracker = None
    for _ in range(4):
        plain, _ = plain_grads(case)
        oracle = oracle_of(architecture, kind, case)
        if tracker is None:
            done = tracked_step(case, mode="exact")
            tracker = done.tracker
        else:
            run_batch(tracker, case)
            tracker.step()
        floor = negligible(plain)
        grads = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
        assert set(grads) == set(plain)
        for name, grad in plain.items():
            limit = max(1e-12, architecture.tolerance / 100)
            assert relative_error(grads[name], grad, oracle[name], floor) <= limit, name
        assert tracker.coverage().attributed == done.attributed
        expected = Expected.of(oracle, done.attributed, case.ids, case.weight)
        assert_report(tracker.report(), expected, architecture.tolerance * 10)
        with torch.no_grad():
            for p in case.model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
        case.model.zero_grad()


def test_float32_grams_agree_with_the_float64_oracle() -> None:
    for name in ("mlp", "gpt_row_positions_tied", "conv2d", "norms", "group_norm_4d", "lora"):
        case = make_case(ARCHITECTURES[name], "example", dtype=torch.float32, weighted=True)
        oracle = weight_copies(*case.oracle_arguments)
        for mode in ("exact", "sketch"):
            fresh = copy.deepcopy(case)
            done = tracked_step(fresh, mode=mode, sketch_dim=4096)
            expected = Expected.of(oracle, done.attributed, case.ids, case.weight)
            assert_report(done.report, expected, 2e-5)


@zoo
def test_unattributed_parameters_are_named_once(architecture: Architecture, kind: str) -> None:
    case = make_case(architecture, kind)
    done = tracked_step(case, mode="sketch", sketch_dim=64)
    _, must_not = architecture.expected(case.model, kind)
    ours = [message for message in done.warnings if any(name in message for name in done.unattributed)]
    for name in must_not:
        assert sum(name in message for message in ours) <= 1, ours
    assert bool(ours) == bool(done.unattributed), (ours, done.unattributed)
    text = str(done.tracker.coverage())
    for name, reason in done.unattributed.items():
        assert name in text and reason in text
    sizes = {name: p.numel() for name, p in case.model.named_parameters() if p.requires_grad}
    want = sum(sizes[name] for name in done.attributed) / sum(sizes.values())
    assert done.tracker.coverage().fraction == pytest.approx(want)


class Clones(torch.nn.Module):
    """Many equal layers on the same input: equal gradients, an independent sketch each."""

    def __init__(self, count: int, d_in: int, d_out: int) -> None:
        super().__init__()
        first = torch.nn.Linear(d_in, d_out)
        self.layers = torch.nn.ModuleList(copy.deepcopy(first) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self.layers]).mean(0)


@pytest.mark.parametrize("sketch_dim", [16, 64])
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 20), (300, 3), (3, 300), (64, 64)])
def test_the_sketch_is_unbiased(d_in: int, d_out: int, sketch_dim: int) -> None:
    """The mean over 256 independent sketches is 16 times closer than one, whose error is below 1.5 / sqrt(r)."""
    clones = 256
    model = Clones(clones, d_in, d_out).double()
    case = Case(model, (torch.randn(6, d_in, dtype=torch.float64),), {}, ARCHITECTURES["mlp"].row_loss("example"),
                torch.tensor([0, 1, 2, 0, 1, -1]), None)  # fmt: skip
    done = tracked_step(case, mode="exact")
    exact, total = done.report.gram, done.report
    done.tracker.remove()
    model.zero_grad()
    kept = tracked_step(case, mode="sketch", sketch_dim=sketch_dim)  # the tracker holds what cosine_se needs
    sketched = kept.report
    scale = exact.diagonal().sqrt()
    error = ((sketched.gram - exact) / (scale[:, None] * scale)).abs().max().item()
    assert error <= 4 * 1.5 / (sketch_dim**0.25 * clones**0.5)
    assert error > 1e-9
    assert ((sketched.cosine - total.cosine).abs() <= 5 * sketched.cosine_se + 1e-9).all()


def test_cosine_errors_have_the_size_that_the_report_says() -> None:
    """Over the off-diagonal cosines of many models, the errors in units of ``cosine_se`` have a mean square near 1."""
    ratios = []
    for number in range(30):
        torch.manual_seed(number)
        case = make_case(ARCHITECTURES["gpt"], "example")
        exact = tracked_step(case, mode="exact")
        exact.tracker.remove()
        case.model.zero_grad()
        kept = tracked_step(case, mode="sketch", sketch_dim=25)  # the tracker holds what cosine_se needs
        sketch = kept.report
        upper = torch.triu_indices(len(TASKS), len(TASKS), 1)
        error = (sketch.cosine - exact.report.cosine)[upper[0], upper[1]]
        ratios.append(error / sketch.cosine_se[upper[0], upper[1]])
    rms = torch.cat(ratios).square().mean().sqrt().item()
    assert 0.3 < rms < 2.5
