"""Policies that move by what was measured: Exp3, ShearedLlama, DoGE, PiKE.

Each against the hand-computed vector of one update, and against the rule written out anew over several.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.policies import DoGE, Exp3, PiKE, ShearedLlama
from tests.sampling.helpers import NAMES, TASK_OF_EXAMPLE, Report
from tests.sampling.policies.helpers import report, softmax, state

NAN = math.nan
REFERENCE = {"a": 2.0, "b": 1.0, "c": 0.5}


def test_exp3_vectors() -> None:
    for turn, floor in ((1, 0.333333), (4, 0.302574), (10, 0.191365), (100, 0.060515)):
        memory = {"reward": [0.0, 0.0, 9.0], "turn": turn - 1}
        given = report(loss=[NAN, NAN, NAN])
        released = Exp3("released").weights(given, state(memory=memory))
        assert released[:2] == pytest.approx([floor] * 2, abs=5e-7)  # all beyond the floor goes to the third
    unseen = report(loss=[NAN, NAN, NAN])
    paper = Exp3("paper").weights(unseen, state(memory={"reward": [2.0, 1.0, 0.0], "turn": 99}))
    assert paper == pytest.approx((0.350084, 0.332997, 0.316919), abs=5e-7)
    released = Exp3("released").weights(unseen, state(memory={"reward": [2.0, 1.0, 1.0], "turn": 99}))
    assert released == pytest.approx((0.469743, 0.265129, 0.265129), abs=1e-6)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_exp3_over_many_reports(variant: Literal["paper", "released"]) -> None:
    rng = np.random.default_rng(0)
    policy, memory, count = Exp3(variant, smoothing=0.8), {}, 4
    reward = dict.fromkeys(range(count), 0.0)
    for turn in range(1, 60):
        loss = np.where(rng.random(count) < 0.3, NAN, rng.uniform(0, 4, count))
        p = rng.dirichlet(np.ones(count))
        got = policy.weights(report(loss=loss), state((50, 30, 15, 5), ("a", "b", "c", "d"), weights=p, memory=memory))
        for arm in range(count):
            if not math.isnan(loss[arm]):
                value = loss[arm] / p[arm] if variant == "paper" else math.exp(loss[arm])
                reward[arm] = 0.8 * reward[arm] + 0.2 * value

        def eps(t: int) -> float:
            return min(1 / count, math.sqrt(math.log(count) / (count * t))) if t else 1 / count

        if variant == "paper":
            scores = [math.exp(eps(turn - 1) * reward[arm]) for arm in range(count)]
        else:
            scores = [reward[arm] for arm in range(count)]
        expected = [(1 - count * eps(turn)) * score / sum(scores) + eps(turn) for score in scores]
        assert got == pytest.approx(expected, rel=1e-9)


def test_exp3_starts_uniform_and_survives_extremes() -> None:
    assert Exp3().initial(state()).tolist() == [1 / 3] * 3
    for variant in ("paper", "released"):
        memory: dict[str, Any] = {}
        for loss in ([0.0, 0.0, 0.0], [1e6, -3.0, math.inf], [NAN, 1e300, 1.0]):
            got = Exp3(variant).weights(report(loss=loss), state(memory=memory))  # type: ignore[arg-type]
            assert np.isfinite(got).all() and got.sum() == pytest.approx(1)
    never = state(weights=np.array([1.0, 0.0, 0.0]), memory={})
    Exp3().weights(report(loss=[1.0, 2.0, NAN]), never)
    assert never.memory["reward"] == pytest.approx([0.1, 0, 0])  # drawn by a probe: no importance weight


@pytest.mark.parametrize(
    "variant, excess, expected",
    [
        ("paper", (0.1, 0.0, 0.3), (0.492256, 0.267247, 0.240497)),
        ("paper", (0.1, -0.7, 0.3), (0.492256, 0.267247, 0.240497)),
        ("released", (0.1, 0.0, 0.3), (0.492240, 0.267254, 0.240506)),
    ],
)
def test_sheared_llama_vectors(
    variant: Literal["paper", "released"], excess: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    losses = {task: REFERENCE[task] + d for task, d in zip("abc", excess, strict=True)}
    given = state((5, 3, 2), eval_losses=losses, evaluations=1)
    assert ShearedLlama(REFERENCE, variant).weights(None, given) == pytest.approx(expected, abs=1e-6)


def test_sheared_llama_moves_once_per_evaluation() -> None:
    policy, given = ShearedLlama(REFERENCE, "released"), state((5, 3, 2))
    expected = np.array([0.5, 0.3, 0.2])
    assert policy.weights(None, given).tolist() == expected.tolist()
    rng = np.random.default_rng(1)
    for evaluation in range(1, 8):
        losses = rng.uniform(0, 3, 3)
        given = replace(given, eval_losses=dict(zip("abc", losses, strict=True)), evaluations=evaluation)
        expected = softmax(np.log(expected) + losses - [2.0, 1.0, 0.5]) * 0.9999 + 0.0001 / 3
        for _ in range(3):
            assert policy.weights(None, given) == pytest.approx(expected)


def test_sheared_llama_leaves_tasks_that_were_not_evaluated() -> None:
    got = ShearedLlama(REFERENCE).weights(None, state((5, 3, 2), eval_losses={"a": 3.0, "c": 0.5}, evaluations=1))
    assert got[1] == pytest.approx(0.3)
    assert got[[0, 2]] == pytest.approx(0.7 * softmax(np.log([0.5, 0.2]) + np.array([1, 0])))


def test_sheared_llama_follows_observe() -> None:
    policy = ShearedLlama(dict.fromkeys(NAMES, 1.0))
    sampler = AdaptiveBatchSampler(TASK_OF_EXAMPLE, 20, policy, tasks=NAMES, update_every=1, delay=0)
    batches = iter(sampler)
    natural = sampler.weights
    for step in range(1, 6):
        next(batches)
        if step in (2, 4):
            sampler.observe({"legal": 2.0, "text": 1.0})
        sampler.update(Report(step=step))
        expected = natural[2] / natural[0] * math.e ** (step // 2)
        assert sampler.weights[2] / sampler.weights[0] == pytest.approx(expected)
        resumed = AdaptiveBatchSampler(TASK_OF_EXAMPLE, 20, policy, tasks=NAMES, update_every=1, delay=0)
        resumed.load_state_dict(sampler.state_dict())
        sampler, batches = resumed, iter(resumed)


def scores(gradients: Any, lr: float, top: float) -> list[float]:
    """DoGE's W from the mean gradients themselves, a sum for each task."""
    size = np.mean([np.linalg.norm(g) for g in gradients])
    out = []
    for i, g in enumerate(gradients):
        aligned = sum(float(np.dot(g, other)) for j, other in enumerate(gradients) if j != i)
        out.append(min(max(lr * aligned / size, 0.0), lr * top))
    return out


def gram_report(gradients: Any, tokens: Any, rest: float = 3.0) -> Any:
    """What the tracker makes of mean gradients: the Gram is of the parts g_t = mean gradient x share of the rows."""
    parts = np.asarray(gradients) * (np.asarray(tokens) / (sum(tokens) + rest))[:, None]
    norm = np.where(np.asarray(tokens) > 0, np.linalg.norm(gradients, axis=1), NAN)
    return report(gram=parts @ parts.T, norm=norm, tokens=tokens)


def test_doge_over_many_reports() -> None:
    rng = np.random.default_rng(2)
    policy, memory, expected = DoGE(mu=0.05, max_score=2.0, smoothing=0.1, max_grad_norm=2.5), {}, np.full(3, 1 / 3)
    moved = clipped = 0
    for step in range(40):
        gradients = rng.normal(size=(3, 5)) + 0.5
        lr = 0.01 * (step + 1)
        got = policy.weights(gram_report(gradients, [20, 3, 1]), state(lr=lr, memory=memory))
        cut = [g * min(1, 2.5 / np.linalg.norm(g)) for g in gradients]
        clipped += sum(np.linalg.norm(g) > 2.5 for g in gradients)
        step_scores = scores(cut, lr, 2.0)
        moved += sum(0 < w < lr * 2 for w in step_scores)
        expected = 0.9 * softmax(np.log(expected) + np.array(step_scores) / 0.05) + 0.1 / 3
        assert got == pytest.approx(expected, rel=1e-5)  # the reference adds 1e-6 to the mean norm
    assert moved > 20 and clipped > 10


def test_doge_cannot_see_conflict() -> None:
    opposed = np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]])
    orthogonal = np.eye(3)
    results = [DoGE().weights(gram_report(g, [5, 5, 5]), state(lr=0.1)) for g in (opposed, orthogonal)]
    assert results[0].tolist() == results[1].tolist() == pytest.approx([1 / 3] * 3)


def test_doge_leaves_absent_tasks_and_needs_lr() -> None:
    gradients = [[1.0, 1.0], [2.0, 0.0], [0.0, 3.0], [5.0, 5.0]]
    four = {"sizes": (4, 3, 2, 1), "tasks": ("a", "b", "c", "d")}
    got = DoGE(mu=0.1).weights(gram_report(gradients, [5, 5, 5, 0]), state(**four, lr=0.1))
    assert got[3] == pytest.approx(1 / 4)
    expected = 3 / 4 * softmax(np.array(scores(np.array(gradients[:3]), 0.1, 5.0)) / 0.1)
    assert got[:3] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="DoGE needs the learning rate: call "):
        DoGE().weights(gram_report(gradients, [1, 1, 1, 1]), state(**four))


def pike_report(square: Any, noise: Any, examples: Any) -> Any:
    """A report whose estimates of |grad|^2 and of the variance are exactly these."""
    square, noise, examples = np.array(square), np.array(noise), np.array(examples)
    with np.errstate(divide="ignore", invalid="ignore"):
        return report(signal=square, norm=np.sqrt(square + noise / examples), examples=examples)


def test_pike_vector() -> None:
    memory = {"weights": [0.5, 0.3, 0.2]}
    given = pike_report((0.04, 0.01, 0.09), (0.5, 0.2, 3.0), (10, 4, 2))
    got = PiKE(1, 1, every=1).weights(given, state(batch_size=16, memory=memory))
    assert got == pytest.approx((0.505904, 0.297346, 0.196750), abs=5e-7)


def test_pike_averages_over_the_window() -> None:
    rng = np.random.default_rng(4)
    policy, memory, expected = PiKE(3.0, 0.5, every=5), {}, np.full(3, 1 / 3)
    window: list[list[tuple[float, float]]] = [[], [], []]
    for step in range(1, 31):
        square, noise, examples = rng.uniform(-0.1, 0.5, 3), rng.uniform(0, 4, 3) + 2, rng.integers(1, 9, 3)
        given = pike_report(square, noise, examples)
        for t in range(3):
            if rng.random() < 0.5 or (t == 2 and step > 20):
                given.signal[t] = NAN
            else:
                window[t].append((square[t], noise[t]))
        got = policy.weights(given, state(batch_size=10, memory=memory))
        if step % 5 == 0:
            known = [t for t in range(3) if window[t]]
            means = np.array([np.mean(window[t], axis=0) for t in known])
            raised = np.log(expected[known]) + 3.0 * means[:, 0] - 0.5 * means[:, 1] / 20
            expected[known] = expected[known].sum() * softmax(raised)
            window = [[], [], []]
        assert got == pytest.approx(expected, rel=1e-9)


def test_pike_recovers_norm_and_variance_from_gradients() -> None:
    # Fresh noise each step, and a memory of noiseless gradients: the estimates' means are the true values.
    rng = np.random.default_rng(5)
    true, spread, examples = np.array([[1.0, 0.5], [0.1, 0.0]]), np.array([0.3, 2.0]), np.array([12, 2])
    policy, memory = PiKE(1, 1, every=4001), {}
    given = state((60, 4), ("a", "b"), memory=memory, batch_size=14)
    for _ in range(4000):
        noise = rng.normal(size=(2, 2)) * (spread / np.sqrt(examples))[:, None]
        mean = true + noise
        columns = {"signal": (true * mean).sum(1), "norm": np.linalg.norm(mean, axis=1), "examples": examples}
        policy.weights(report(**columns), given)
    reports, square, variance = memory["sums"]
    assert np.array(square) / reports == pytest.approx([1.25, 0.01], abs=0.01)
    assert np.array(variance) / reports == pytest.approx(2 * spread**2, rel=0.1, abs=0.06)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Exp3("orginal"), ValueError, "variant must be 'paper' or 'released', got 'orginal'"),  # type: ignore[arg-type]
        (lambda: Exp3(smoothing=1.5), ValueError, "smoothing must be at least 0 and at most 1"),
        (lambda: ShearedLlama([1.0]), TypeError, "reference must map task names"),  # type: ignore[arg-type]
        (lambda: ShearedLlama({"a": NAN}), ValueError, "reference losses must be finite, got {'a': nan}"),
        (lambda: ShearedLlama({"a": 1.0}, "old"), ValueError, "variant must be"),  # type: ignore[arg-type]
        (lambda: DoGE(mu=0), ValueError, "mu must be above 0"),
        (lambda: DoGE(smoothing=-1), ValueError, "smoothing must be at least 0"),
        (lambda: PiKE(NAN, 1), ValueError, "zeta1 must be at least 0"),
        (lambda: PiKE(1, 1, every=0), ValueError, "every must be at least 1"),
        (lambda: PiKE(True, 1), TypeError, "zeta1 must be a number"),
    ],
)
def test_arguments_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_reference_losses_are_checked_when_the_sampler_is_built() -> None:
    with pytest.raises(ValueError, match=r"no reference loss for the tasks \['legal', 'poetry'\]"):
        AdaptiveBatchSampler(TASK_OF_EXAMPLE, 20, ShearedLlama({"text": 1, "code": 1}), tasks=NAMES)
    reference = {**dict.fromkeys(NAMES, 1.0), "verse": 2.0}
    with pytest.raises(ValueError, match=r"ShearedLlama.reference names unknown tasks \['verse'\]"):
        AdaptiveBatchSampler(TASK_OF_EXAMPLE, 20, ShearedLlama(reference), tasks=NAMES)


def test_losses_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"Exp3 needs the losses of the tasks.*call batch.losses\(per_example\)"):
        Exp3().weights(report(loss=None), state())
