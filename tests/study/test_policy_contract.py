"""What the contract is measured with: scenarios, runs of the simulator, the runner's lines and the table's verdicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.policies import contract, contract_table, scenarios
from benchmarks.policies.contract import ENTRIES, FURTHER, SEEDS, Runs
from benchmarks.policies.controls import equal
from benchmarks.policies.scenarios import FAMILIES, Scenario, scenario
from benchmarks.policies.simulate import How, data, run
from taskgrad.sampling.policies import OverwriteBoost, Proportional, Static


@pytest.mark.parametrize("family", FAMILIES)
def test_scenarios_of_a_family_are_what_they_are_said_to_be(family: str) -> None:
    drawn = [scenario(family, number) for number in range(20)]
    assert all(6 <= len(s.natural) <= 32 and 0.03 <= s.budget <= 0.3 for s in drawn)
    assert all(s.noise.sum() <= np.ceil(0.3 * s.rare.sum()) for s in drawn)
    assert any(s.noise.any() for s in drawn)
    assert len({s.budget for s in drawn}) == len(drawn)
    assert scenario(family, 3).natural.tolist() == drawn[3].natural.tolist()
    given = data(drawn[0], 0)
    labels = given.y[~drawn[0].noise]
    assert given.x.dtype == np.float32 and len(given.y) == len(drawn[0].natural)
    if not drawn[0].regression:
        assert set(np.unique(labels)) == set(range(drawn[0].classes))
    assert data(drawn[0], 0).start.tolist() == given.start.tolist() != data(drawn[0], 1).start.tolist()


def test_a_scenario_is_checked_when_it_is_made() -> None:
    good = scenario("memo", 0)
    with pytest.raises(ValueError, match="natural must hold one share per task and sum to 1"):
        replace(good, natural=good.natural * 2)
    with pytest.raises(ValueError, match="noise tasks must be rare ones"):
        replace(good, noise=np.ones(len(good.natural), dtype=bool))


def tiny(rng: np.random.Generator) -> Scenario:
    """A family of the kind that anybody may add: two frequent tasks, two rare ones and noise, 120 steps."""
    natural = np.array([0.4, 0.4, 0.1, 0.05, 0.05])

    def world(rng: np.random.Generator, n: int) -> Any:
        x = rng.normal(size=(n, 4))
        return x, np.array([x[:, t % 4] > 0 for t in range(5)], dtype=np.float64)

    noise = np.array([False, False, False, False, True])
    return Scenario(natural, noise, world, 2, 0.2, 120, 32, 8, True, 0.02, rows=int(rng.choice([400, 800])))


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(FAMILIES, "tiny", tiny)
    return "tiny"


def test_a_run_depends_on_its_seed_alone(family: str) -> None:
    s = scenario(family, 0)
    runs = [run(s, data(s, seed), seed, OverwriteBoost(), How(observed=True)) for seed in (0, 0, 1)]
    for made in runs:
        assert made.pop("seconds") > 0
    assert runs[0] == runs[1] != runs[2]
    assert max(runs[0]["scores"]) > 0.5 and runs[0]["scores"][4] < 0.5
    json.dumps(runs[0], allow_nan=False)


def test_parts_are_what_was_asked_for(family: str) -> None:
    s = scenario(family, 0)
    given = data(s, 0)
    natural = given.sizes / given.sizes.sum()
    assert run(s, given, 0, equal(natural))["parts"] == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3], abs=1e-6)
    half = Static([0.0, 0.0, 0.5, 0.25, 0.25])
    assert run(s, given, 0, half)["end"] == pytest.approx([0, 0, 0.5, 0.25, 0.25], abs=1e-6)
    assert run(s, given, 0, Proportional(), How(guarded=False))["parts"] == pytest.approx([0] * 5, abs=1e-6)


@pytest.mark.parametrize("how", [How(losses=False), How(rho=False), How(observed=True)])
def test_a_policy_sees_no_more_than_it_is_to_see(family: str, how: How) -> None:
    class Looking(OverwriteBoost):
        def weights(self, report: Any, state: Any) -> Any:
            assert (report.loss is None) == (not how.losses)
            assert np.isfinite(report.overwrite).any() <= how.rho
            assert (state.eval_losses is not None) == how.observed
            assert report.gram is None
            return super().weights(report, state)

    s = scenario(family, 0)
    run(s, data(s, 0), 0, Looking(), how)


def test_every_policy_of_the_table_runs(family: str) -> None:
    runs = Runs(family, 0)
    for name in ENTRIES:
        line = runs.line(name, SEEDS[:1])
        assert np.isfinite(line["rare"]).all() and len(line["noise_end"]) == 1
    equal_parts = runs.line("equal", SEEDS[:1])
    assert equal_parts["noise"] == pytest.approx([1.0]) and equal_parts["budget_end"] == pytest.approx([1.0])
    assert runs.line("control", SEEDS[:1])["noise"] == pytest.approx([1.0], abs=0.04)
    mean, ours = (np.array(runs.run(name, 0)["mean"]) for name in ("replay", "OverwriteBoost"))
    assert mean == pytest.approx(ours, abs=1e-6)


def test_lines_are_made_once_and_in_parts(family: str, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    asked = ["--out", str(out), "--families", family, "--numbers", "0", "1", "2", "--policies", "natural", "control"]
    contract.main([*asked, "--part", "1/2"])
    assert {key[1] for key in contract.read(out)} == {0, 2}
    contract.main([*asked, "--part", "2/2"])
    text = out.read_text()
    assert {key[1] for key in contract.read(out)} == {0, 1, 2}
    contract.main(asked)
    assert out.read_text() == text
    out.write_text("".join(text.splitlines(keepends=True)[:-1]))  # stopped in between
    contract.main(asked)
    lines = contract.read(out)
    assert len(lines) == len(text.splitlines())
    control = [key for key in lines if key[2:] == ("control", FURTHER)]
    for key in control:
        assert (*key[:2], "equal", FURTHER) in lines
    assert "| natural |" in contract_table.render(lines)


def made_up(scores: dict[str, dict[Any, Any]], **more: Any) -> dict[Any, dict[str, Any]]:
    """Lines of one scenario each: scores by policy and seeds."""
    lines = {}
    for policy, by_seeds in scores.items():
        for seeds, values in by_seeds.items():
            rare = np.broadcast_to(values, len(seeds)).tolist()
            line = {"rare": rare, "frequent": [0.9], "budget_end": [1.0], "half": 0.5, **more}
            lines["made up", 0, policy, seeds] = line
    return lines


@pytest.mark.parametrize(
    "four, twelve, below",
    [
        (-0.02, -0.02, True),
        (-0.02, -0.004, False),  # the four were bad luck
        (-0.02, np.tile([-0.05, 0.03], 6), False),  # not significant
        (-0.004, -0.05, False),  # never asked
    ],
)
def test_the_further_seeds_alone_decide(four: float, twelve: Any, below: bool) -> None:
    lines = made_up({"equal": {SEEDS: 0.8, FURTHER: 0.8}, "OverwriteBoost": {SEEDS: 0.8 + four, FURTHER: 0.8 + twelve}})
    found = contract_table.verdict(lines, "OverwriteBoost")
    assert bool(found.below) == below and found.mean == pytest.approx(four)
    assert found.lowest_further == pytest.approx(np.mean(twelve) if four <= -0.005 else 0.0)


def test_noise_and_budget_are_read_off_where_they_mean_something() -> None:
    noisy = made_up({"equal": {SEEDS: 0.8}, "OverwriteBoost": {SEEDS: 0.8}}, noise=[0.7, 0.9], noise_end=[0.4, 0.5])
    found = contract_table.verdict(noisy, "OverwriteBoost")
    assert found.noise == pytest.approx(0.8) and found.quiet == 1.0 and np.isnan(found.back)
    mastered = made_up({name: {SEEDS: 1.0} for name in ("equal", "natural", "OverwriteBoost")}, half=0.99)
    mastered["made up", 0, "OverwriteBoost", SEEDS] |= {"budget_end": [0.1, 0.2], "frequent": [0.899]}
    found = contract_table.verdict(mastered, "OverwriteBoost")
    assert found.back == pytest.approx(0.15) and found.frequent == pytest.approx(-0.001) and np.isnan(found.quiet)


def test_final_scenarios_are_not_those_of_development() -> None:
    assert min(contract.NUMBERS) >= 3000 and len(contract.NUMBERS) * len(scenarios.FAMILIES) >= 60
