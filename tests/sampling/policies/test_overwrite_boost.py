"""The default policy's behaviour, situation by situation, on reports made up of the fields that it reads."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.policies import OverwriteBoost, PolicyState
from taskgrad.sampling.policies.overwrite_boost import BASE, CUT, DONE, EVERY, RELEASE
from tests.sampling.policies.helpers import state

NAN = float("nan")
HORIZON = 3000
TASKS = ("common", "first", "second", "third")
SHARES = (970, 10, 10, 10)


@dataclass
class Course:
    """What a task shows over a run: loss, energy relative to the first, overwrite ratio with its error."""

    loss: Any = 1.0
    energy: Any = 1.0
    rho: Any = NAN
    error: float = 0.1
    examples: Any = 2
    spread: float = 0.05

    def at(self, k: int, noise: float) -> tuple[float, ...]:
        """Examples, norm, loss, rho and its error."""
        loss, energy, rho, examples = (
            float(x(k / HORIZON)) if callable(x) else float(x)
            for x in (self.loss, self.energy, self.rho, self.examples)
        )
        if examples == 0:
            return 0.0, NAN, NAN, rho, self.error
        return examples, (energy / examples) ** 0.5, loss + self.spread * noise, rho, self.error


NOISE = Course()
"""Nothing to learn: the loss stays, and there is no own pull to measure the others against."""
LEARNER = Course(loss=lambda u: 1.0 - 0.6 * u, rho=1.3)
MASTERED = Course(loss=lambda u: max(0.005, 1.0 - 10 * u), energy=lambda u: max(0.005, 1.0 - 10 * u), spread=0.001)


@dataclass
class Run:
    """A run of the policy over made-up courses of the rare tasks (the common one shows nothing of interest)."""

    courses: tuple[Course, ...]
    policy: OverwriteBoost = field(default_factory=OverwriteBoost)
    losses: bool = True
    surroundings: dict[str, Any] = field(default_factory=dict)
    observed: Any = None
    memory: dict[str, Any] = field(default_factory=dict)
    parts: list[Any] = field(default_factory=list)

    def state(self, k: int) -> PolicyState:
        tasks = TASKS[: 1 + len(self.courses)]
        given = {"horizon": HORIZON, "budget": 0.1, **self.surroundings}
        if self.observed is not None:
            evaluation = k // 100
            values = {task: f(evaluation * 100 / HORIZON) for task, f in self.observed.items()}
            given |= {"eval_losses": values, "evaluations": evaluation + 1}
        return state(SHARES[: len(tasks)], tasks, step=k, memory=self.memory, **given)

    def go(self, steps: int = HORIZON) -> Any:
        """Parts after each step [steps, T]."""
        rng = np.random.default_rng(0)
        for k in range(len(self.parts), steps):
            rows = [(100.0, 1.0, 0.5, NAN, NAN), *(course.at(k, rng.normal()) for course in self.courses)]
            examples, norm, loss, rho, error = np.array(rows).T
            report = SimpleNamespace(
                examples=examples, tokens=examples, norm=norm, loss=loss if self.losses else None, overwrite=rho,
                overwrite_se=error,
            )  # fmt: skip
            self.parts.append(self.policy.weights(report, self.state(k)))
        return np.array(self.parts)


def end(*courses: Course, **options: Any) -> Any:
    """In equal parts, mean over the last tenth, of the rare tasks."""
    return Run(courses, **options).go()[-HORIZON // 10 :, 1:].mean(0) * len(courses)


def test_rare_tasks_begin_with_equal_parts_by_importance() -> None:
    assert OverwriteBoost().initial(state()).tolist() == [0.0, 0.5, 0.5]
    assert OverwriteBoost().initial(state(importance=np.array([5.0, 3.0, 1.0]))).tolist() == [0.0, 0.75, 0.25]


def test_without_rare_tasks_all_stays_with_the_natural_mix() -> None:
    even = state((10, 10, 10))
    assert OverwriteBoost().initial(even).sum() == 0
    report = SimpleNamespace(**dict.fromkeys(("examples", "norm", "loss", "overwrite", "overwrite_se"), np.ones(3)))
    for _ in range(3 * EVERY):
        assert OverwriteBoost().weights(report, even).sum() == 0


def test_noise_ends_under_half_an_equal_part_and_the_learner_has_the_rest() -> None:
    noise, learner = end(NOISE, LEARNER)
    assert noise == pytest.approx(CUT) and learner == pytest.approx(2 - CUT)


def test_noise_has_no_more_than_a_learner_at_any_time() -> None:
    parts = Run((NOISE, LEARNER)).go()
    assert (parts[:, 1] <= parts[:, 2] + 1e-9).all()
    assert 2 * parts[:, 1].mean() < 0.9


def test_a_plateau_is_trusted_long_and_taken_up_again_when_it_ends() -> None:
    late = Course(loss=lambda u: 1.0 if u < 0.6 else 1.0 - 0.75 * (u - 0.6), rho=lambda u: NAN if u < 0.6 else 1.2)
    parts = 2 * Run((late, LEARNER)).go()
    assert parts[HORIZON // 4, 1] == pytest.approx(1.0, abs=0.05)
    assert parts[int(0.55 * HORIZON), 1] > 0.7
    assert parts[-1, 1] == pytest.approx(1.0, abs=0.1)


def test_a_mastered_task_gives_its_part_back() -> None:
    mastered, learner = end(MASTERED, LEARNER)
    assert mastered < 0.05 and learner > 1.9


def test_where_nobody_needs_it_the_budget_goes_back() -> None:
    assert end(MASTERED, MASTERED).sum() < 0.05


def test_a_mastered_task_that_is_forgotten_is_raised_again() -> None:
    def forgotten(u: float) -> float:
        return 0.005 if 0.1 < u < 0.7 else 1.0

    run = Run((Course(loss=forgotten, energy=forgotten, rho=1.2, spread=0.001), LEARNER))
    parts = 2 * run.go()
    assert parts[int(0.65 * HORIZON), 1] < 0.05
    assert parts[-1, 1] > 0.9


def test_of_two_half_learned_tasks_the_overwritten_one_keeps_its_claim() -> None:
    def half(rho: float) -> Course:
        return Course(loss=lambda u: max(0.4, 1.0 - 2 * u), energy=lambda u: max(0.4, 1.0 - 2 * u), rho=rho)

    overwritten, free = end(half(1.4), half(0.5))
    assert overwritten > 1.3 and free == pytest.approx(2 - overwritten)
    assert end(half(1.4), half(1.4)) == pytest.approx([1, 1], abs=0.02)


@pytest.mark.parametrize(
    "rho, error, trusted", [(1.3, 0.2, True), (1.8, 0.4, False), (4.0, 0.5, False), (NAN, NAN, False)]
)
def test_an_own_pull_that_is_not_drowned_speaks_for_a_task(rho: float, error: float, trusted: bool) -> None:
    """A loss that does not move for most of the run: only the overwrite ratio tells whether something is there."""
    flat = Course(rho=rho, error=error)
    part = 2 * Run((flat, LEARNER)).go(int(0.84 * HORIZON))[-1, 1]
    assert (part > 0.9) == trusted and (part <= CUT + 1e-9) == (not trusted)


def test_the_scale_of_gradients_and_the_number_of_examples_do_not_matter() -> None:
    def scaled(size: float, examples: int) -> Course:
        return Course(
            loss=lambda u: 1.0 - 0.6 * u,
            energy=lambda u: size * (1.0 - 0.6 * u),
            rho=0.5,
            examples=examples,
            spread=0.0,
        )

    assert end(scaled(1e-6, 1), LEARNER) == pytest.approx(end(scaled(1e6, 7), LEARNER))


def test_gradients_alone_withhold_nothing_from_those_who_are_not_done() -> None:
    assert end(NOISE, NOISE, losses=False) == pytest.approx([1, 1])
    mastered, other = end(MASTERED, NOISE, losses=False)
    assert mastered < 0.1 and 1.0 <= other <= BASE + 1.0
    mastered, learner = end(MASTERED, LEARNER, losses=False)
    assert mastered < 0.1 and learner > 1.9


@pytest.mark.slow
def test_low_losses_of_repeated_examples_say_nothing_unless_they_are_fresh() -> None:
    passes = {"epochs": np.array([1.0, 40.0, 40.0])}
    assert end(MASTERED, LEARNER, surroundings=passes)[0] > 0.9
    assert end(MASTERED, LEARNER, surroundings=passes, policy=OverwriteBoost(fresh=True))[0] < 0.05
    stream = {"epochs": None}  # as where only shares are known
    assert end(MASTERED, LEARNER, surroundings=stream)[0] < 0.05


def test_held_out_losses_say_who_is_done_even_where_examples_are_repeated() -> None:
    passes = {"epochs": np.array([1.0, 40.0, 40.0])}
    observed = {"first": lambda u: max(0.001, 1.0 - 5 * u), "second": lambda u: 1.0 - 0.4 * u}
    done, learner = end(MASTERED, MASTERED, surroundings=passes, observed=observed)
    assert done < 0.1 and learner > 1.0


def test_held_out_losses_prove_a_task_that_training_losses_do_not() -> None:
    """Until the proof lapses, as nothing else speaks for the task; alone it would be distrusted as the noise is."""
    observed = {"first": lambda u: 1.0 - 0.7 * u, "second": lambda u: 1.0}
    run = Run((NOISE, NOISE), observed=observed)
    run.go(int(0.48 * HORIZON))
    assert run.memory["kept"]["trust"][1:] == pytest.approx([1.0, 0.77], abs=0.05)


def test_held_out_losses_of_some_tasks_leave_the_others_as_they_were() -> None:
    noise, learner = end(NOISE, LEARNER, observed={"second": lambda u: 1.0 - 0.4 * u})
    assert noise == pytest.approx(CUT) and learner == pytest.approx(2 - CUT)


@pytest.mark.parametrize("height", [3.0, 8.0])
def test_an_inflated_start_is_not_learning(height: float) -> None:
    """A pretrained head that is far off: the loss falls to that of guessing within the first appearances."""
    inflated = Course(loss=lambda u: 1.0 + height * np.exp(-u * HORIZON / 10))
    noise, learner = end(inflated, LEARNER)
    assert noise == pytest.approx(CUT) and learner > 1.5


@pytest.mark.parametrize("appearances", [60, 120])
def test_a_loss_that_only_calibrates_proves_nothing_for_good(appearances: int) -> None:
    """Noise from a fresh network: down to the answers' entropy within 160 appearances, and there it stays."""
    calibrating = Course(loss=lambda u: max(0.7, 2.3 - 1.6 * u * HORIZON / appearances))
    run = Run((calibrating, LEARNER))
    assert 2 * run.go()[-HORIZON // 10 :, 1].mean() == pytest.approx(CUT)
    assert run.memory["kept"]["proven"][1] < 2


def test_what_others_leave_goes_to_plateaus_early_in_the_run() -> None:
    done = Course(loss=lambda u: max(0.005, 1.0 - 20 * u), energy=lambda u: max(0.005, 1.0 - 20 * u), spread=0.001)
    parts = 3 * Run((NOISE, NOISE, done)).go()[:, 1]
    assert parts[HORIZON // 5] == pytest.approx(1.5, abs=0.02)
    assert parts[int(0.4 * HORIZON)] < 1.26


def test_a_low_start_that_still_improves_keeps_its_part() -> None:
    """Pretrained: the loss is low from the beginning and falls by little, but steadily."""
    tuned = Course(loss=lambda u: 0.2 - 0.03 * u, rho=1.2, spread=0.01)
    assert end(tuned, LEARNER)[0] == pytest.approx(1.0, abs=0.1)


def test_a_loss_of_few_wild_rows_that_has_fallen_far_is_proof_for_good() -> None:
    """Its last fall is not significant, nor is its pull, but it stands at half of its beginning."""
    wild = Course(loss=lambda u: 1.0 if u < 0.05 else 0.5, spread=0.6)
    part, _ = end(wild, LEARNER)
    assert part > 0.5


def test_a_task_that_appears_late_has_its_time() -> None:
    late = Course(examples=lambda u: 2 if u > 0.8 else 0)
    parts = 2 * Run((late, LEARNER)).go()
    assert parts[-1, 1] == pytest.approx(1.0, abs=0.1)


def test_a_task_without_any_gradient_gets_nothing() -> None:
    assert end(Course(energy=0.0), LEARNER)[0] == 0


def test_an_unknown_horizon_withholds_less_and_later() -> None:
    parts = 2 * Run((NOISE, LEARNER), surroundings={"horizon": None}).go()
    assert parts[500, 1] == pytest.approx(1.0, abs=0.05)
    assert CUT < parts[-1, 1] < 0.9


def test_a_critical_task_never_falls_below_an_equal_part() -> None:
    parts = Run((NOISE, LEARNER), surroundings={"critical": np.array([False, True, False])}).go()
    assert (2 * parts[:, 1] >= 1 - 1e-9).all() and (parts.sum(1) <= 1 + 1e-9).all()


def test_importance_scales_what_a_task_gets() -> None:
    importance = np.array([1.0, 3.0, 1.0])
    parts = Run((LEARNER, LEARNER), surroundings={"importance": importance}).go()[-1]
    assert parts[1] == pytest.approx(3 * parts[2], rel=0.1)
    parts = Run((NOISE, LEARNER), surroundings={"importance": importance}).go()[-1]
    assert parts[1] == pytest.approx(0.75 * CUT)


def test_one_rare_task_of_two() -> None:
    assert end(LEARNER) == pytest.approx([1.0])
    assert end(MASTERED).sum() < 0.05


@pytest.mark.slow
def test_a_thousand_tasks() -> None:
    count, rng = 1000, np.random.default_rng(0)
    tasks, shares = tuple(map(str, range(count))), (count * 20, *[1] * (count - 1))
    memory: dict[str, Any] = {}
    for k in range(600):
        fall = np.where(np.arange(count) % 2 == 1, 1.0 - k / 700, 1.0)
        columns = {"norm": fall**0.5, "loss": fall + 0.05 * rng.normal(size=count), "overwrite": np.full(count, NAN)}
        report = SimpleNamespace(examples=np.ones(count), overwrite_se=np.full(count, NAN), **columns)
        given = state(shares, tasks, step=k, horizon=600, memory=memory)
        parts = OverwriteBoost().weights(report, given)
    assert parts[1::2].mean() > 1.5 * parts[2::2].mean() > 0
    assert parts.sum() <= 1 + 1e-9
    assert len(OverwriteBoost().why(replace(given, proposed=parts))) <= 120


@pytest.mark.parametrize("bad", [NAN, np.inf, 1e300])
def test_losses_that_are_no_numbers_are_left_out(bad: float) -> None:
    broken = Course(loss=lambda u: bad if u > 0.3 else 1.0 - 0.6 * u, rho=1.2)
    run = Run((broken, LEARNER))
    parts = 2 * run.go()
    assert np.isfinite(parts).all() and parts[-1, 1] == pytest.approx(1.0, abs=0.1)
    json.dumps(run.memory, allow_nan=False)


def test_a_task_without_losses_among_others_is_not_distrusted() -> None:
    silent, noise, learner = end(Course(loss=NAN), NOISE, LEARNER)
    assert noise == pytest.approx(CUT) and silent == pytest.approx(learner, rel=0.1)


def test_losses_may_be_negative() -> None:
    """Log-likelihoods of densities: no ratio says what is left, but a fall is a fall, and a level is none."""
    flat, falling = end(Course(loss=-1.0), Course(loss=lambda u: 0.5 - 2 * u))
    assert flat == pytest.approx(CUT) and falling == pytest.approx(2 - CUT)


def test_memory_is_plain_data_and_all_there_is() -> None:
    run = Run((MASTERED, LEARNER, NOISE), observed={"first": lambda u: 1.0 - 0.5 * u})
    run.go(1234)
    again = Run(run.courses, memory=json.loads(json.dumps(run.memory, allow_nan=False)), observed=run.observed)
    again.parts = list(run.parts)
    assert run.go(1300)[1234:].tolist() == again.go(1300)[1234:].tolist()


def test_why_says_who_gains_and_loses_and_by_what() -> None:
    run = Run((LEARNER, NOISE, MASTERED))
    assert run.policy.why(run.state(0)) == ""
    said, last = [], run.go(EVERY)[-1]
    for k in range(EVERY, HORIZON, EVERY):
        parts = run.go(k)[-1]
        mixes = {"weights": 0.01 + 0.1 * last, "proposed": 0.01 + 0.1 * parts}  # inside a budget of .1
        said.append(run.policy.why(replace(run.state(k), **mixes)))
        last = parts if said[-1] else last  # as the ledger's last entry
    assert all(len(line) <= 120 and "\n" not in line for line in said)
    assert said[0] == ""
    text = "\n".join(said)
    share = r"{} to \d+(\.\d)? %"
    for words in (
        r"first: others undo 1\.3 of its pull, loss still falling \(z \d+\.\d\): " + share.format("up"),
        r"second: no progress shown \(trust 0\.\d\): " + share.format("down"),
        r"third: \d\d % left, loss still falling \(z \d+\.\d\): " + share.format("down"),
        r"third: done \(need 0\.\d+\): " + share.format("down"),
    ):
        assert re.search(words, text), words


@pytest.mark.parametrize("slow", [False, True])
def test_the_ledger_says_why_of_all_that_moved_since_its_last_entry(slow: bool) -> None:
    """Also where a part moved by less than is noticed at every single decision."""
    options: dict[str, Any] = {"num_batches": 2000, "horizon": 2000, "budget": 0.1, "delay": 0}
    sampler = AdaptiveBatchSampler({"common": 970, "a": 15, "b": 15}, 100, OverwriteBoost(fresh=True), **options)
    nan = np.full(3, NAN)
    for k, _ in enumerate(sampler):
        left = np.exp(-k / (2000 if slow else 100))
        report = SimpleNamespace(
            tasks=sampler.tasks, valid=True, step=k, examples=np.array([90, 5, 5]), tokens=np.array([90, 5, 5]),
            norm=np.array([0.1, left**0.5, 1.0]), loss=np.array([0.5, left, 1.0]), overwrite=nan, overwrite_se=nan,
        )  # fmt: skip
        sampler.update(report)
    whys = [entry.why for entry in sampler.ledger][1:]
    assert len(whys) > 3
    assert not [why for why in whys if not re.search("^(a|b): .* (up|down) to", why)]


def test_fresh_is_a_flag() -> None:
    with pytest.raises(TypeError, match="fresh must be True or False, got 1"):
        OverwriteBoost(fresh=1)  # type: ignore[arg-type]
    assert (
        repr(OverwriteBoost(fresh=True)) == "OverwriteBoost(fresh=True)"
        and repr(OverwriteBoost()) == "OverwriteBoost()"
    )


def test_the_constants_leave_no_jump_where_a_task_is_done() -> None:
    """Around the need at which a task is done its part goes to 0 by degrees."""
    parts = []
    for level in np.linspace(DONE - 0.01, DONE + RELEASE + 0.01, 9):
        course = Course(
            loss=lambda u, x=level: max(x, 1 - 10 * u), energy=lambda u, x=level: max(x, 1 - 10 * u), spread=0.0
        )
        parts.append(end(course, LEARNER)[0])
    assert parts[0] == 0 and np.diff(parts).min() >= 0 and np.diff(parts).max() < 0.15


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    importance=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    critical=st.lists(st.booleans(), min_size=4, max_size=4),
    horizon=st.sampled_from([None, 1, 300, 10**6]),
)
def test_parts_are_a_distribution(
    seed: int, importance: list[float], critical: list[bool], horizon: int | None
) -> None:
    rng = np.random.default_rng(seed)
    memory: dict[str, Any] = {}
    for k in range(400):
        scale = np.exp(-0.01 * k * rng.random(4))
        report = SimpleNamespace(
            examples=rng.integers(0, 3, 4), norm=rng.random(4) * scale, loss=rng.normal(size=4) * scale,
            overwrite=np.abs(rng.normal(size=4)), overwrite_se=rng.random(4),
        )  # fmt: skip
        now = state(
            SHARES, TASKS, step=k, horizon=horizon, memory=memory, importance=np.array(importance),
            critical=np.array(critical), eval_losses={"second": rng.normal()} if k > 200 else None, evaluations=k // 50,
        )  # fmt: skip
        parts = OverwriteBoost().weights(report, now)
        equal = OverwriteBoost().initial(now)
        assert parts.min() >= 0 and parts.sum() <= 1 + 1e-9 and parts[0] == 0
        assert (parts >= equal * np.array(critical) - 1e-9).all()


def test_it_is_the_sampler_s_default_with_its_guards() -> None:
    sampler = AdaptiveBatchSampler(np.repeat([0, 1], [90, 10]), batch_size=10)
    assert isinstance(sampler.policy, OverwriteBoost)
    assert sampler.weights == pytest.approx([0.855, 0.145])
