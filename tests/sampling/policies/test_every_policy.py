"""What every exported policy must withstand: any sequence of reports."""

from __future__ import annotations

import copy
import inspect
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling import Ledger, policies
from taskgrad.sampling.adapted import check_weights
from taskgrad.sampling.engine.quota import to_units
from taskgrad.sampling.policies import PolicyState
from tests.sampling.policies.helpers import state

TASKS, SIZES = ("a", "b", "c", "d"), (70, 20, 6, 4)
LEDGER = Ledger(SIZES)
LEDGER.append(0, to_units(np.array([0.4, 0.3, 0.2, 0.1])), "initial")
TABLE: dict[str, Any] = {
    "ADO": policies.ADO(start=2, fit_every=9, skip=0),
    "Cooldown": policies.Cooldown(),
    "DoGE": policies.DoGE(),
    "Exp3": policies.Exp3(),
    "OverwriteBoost": policies.OverwriteBoost(),
    "PiKE": policies.PiKE(1.0, 1.0, every=2),
    "Proportional": policies.Proportional(),
    "Replay": policies.Replay(LEDGER, batches=3),
    "ShearedLlama": policies.ShearedLlama(dict.fromkeys(TASKS, 1.0)),
    "Shuffled": policies.Shuffled(policies.PiKE(1.0, 1.0, every=3)),
    "Static": policies.Static([0.1, 0.2, 0.3, 0.4]),
    "Temperature": policies.Temperature(3),
    "TwoPhase": policies.TwoPhase(policies.Uniform(), 0.5),
    "UniMax": policies.UniMax(4),
    "Uniform": policies.Uniform(),
}
CASES = [*TABLE.items(), ("Exp3 released", policies.Exp3("released"))]
NEEDS_LOSSES = ("ADO", "Exp3", "Exp3 released")
VECTORS = (
    "norm", "signal", "others_cosine", "overwrite", "overwrite_se", "pull", "own_pull", "own_effect", "others_effect",
    "update_effect", "gained", "undone", "retention", "retention_se", "curvature", "predicted_effect",
)  # fmt: skip


def test_the_table_holds_every_exported_policy() -> None:
    exported = {
        name
        for name in policies.__all__
        if inspect.isclass(getattr(policies, name)) and hasattr(getattr(policies, name), "weights")
    }
    assert exported - {"Policy", "FixedPolicy"} == set(TABLE)


@st.composite
def reports(draw: st.DrawFn, with_losses: bool) -> tuple[SimpleNamespace, dict[str, Any]]:
    """A report as the tracker gives it after some batch, any of its tasks absent, any defined number NaN or extreme,
    and what else the state says then."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = len(TASKS)
    examples = np.array(draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)))
    size = draw(st.sampled_from([1e-8, 1.0, 1e4]))

    def vector() -> torch.Tensor:
        values = rng.normal(size=count) * size
        values[(examples == 0) | (rng.random(count) < draw(st.sampled_from([0.0, 0.2, 1.0])))] = np.nan
        return torch.tensor(values)

    half = rng.normal(size=(count, 3)) * size * (examples > 0)[:, None]
    columns: dict[str, Any] = {name: vector() for name in VECTORS}
    columns["norm"] = columns["norm"].abs()
    columns["loss"] = vector().abs() if with_losses else None
    memory_dot = torch.tensor(rng.normal(size=(count, count + 1)) * size)
    made = SimpleNamespace(
        step=1, valid=True, tasks=TASKS, examples=torch.tensor(examples), tokens=torch.tensor(examples * 1.5),
        gram=torch.tensor(half @ half.T), cosine=torch.tensor(np.full((count, count), np.nan)), memory_dot=memory_dot,
        steps_since_seen=torch.tensor(rng.integers(-1, 50, count)), **columns,
    )  # fmt: skip
    evaluated = draw(st.sets(st.sampled_from(TASKS)))
    surroundings = {
        "eval_losses": {task: float(rng.normal() * 3) for task in sorted(evaluated)} if evaluated else None,
        "evaluations": draw(st.integers(0, 3)),
        "weights": rng.dirichlet(np.full(count, 0.3)),
        "lr": draw(st.sampled_from([1e-5, 0.1, 10.0])),
    }
    return made, surroundings


def surrounded(step: int, memory: dict[str, Any], changed: dict[str, Any]) -> PolicyState:
    return state(SIZES, TASKS, horizon=20, step=step, memory=memory, budget=0.2, **changed)


@pytest.mark.parametrize("name, policy", CASES, ids=[name for name, _ in CASES])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sequence_of_reports(name: str, policy: Any, data: st.DataObject) -> None:
    with_losses = name in NEEDS_LOSSES or data.draw(st.booleans())
    sequence = data.draw(st.lists(reports(with_losses), min_size=1, max_size=20))
    memory: dict[str, Any] = {}
    before = check_weights(policy.initial(surrounded(-1, memory, {})), TASKS, name)
    assert np.isfinite(before).all()
    for step, (report, changed) in enumerate(sequence):
        saved = json.loads(json.dumps(memory, allow_nan=False))
        asked = policy.weights(report, surrounded(step, memory, changed))
        shares = check_weights(asked, TASKS, name)
        assert 0 <= shares.sum() <= 1 + 1e-9
        again = policy.weights(copy.deepcopy(report), surrounded(step, saved, changed))
        assert again.tolist() == asked.tolist() and saved == memory


@pytest.mark.parametrize("name, policy", CASES, ids=[name for name, _ in CASES])
def test_numbers_too_large_to_be_squared(name: str, policy: Any) -> None:
    """A run that diverges on some tasks: what is kept stays JSON, and shares stay shares."""
    rng = np.random.default_rng(0)
    extreme = [1e99, 1e101, 1e160, 1e300, np.inf, np.nan, 1.0, 1e-300, 0.0]
    memory: dict[str, Any] = {}
    check_weights(policy.initial(surrounded(-1, memory, {})), TASKS, name)
    count = len(TASKS)
    for step in range(250):
        columns: dict[str, Any] = {field: torch.tensor(rng.choice(extreme, count)) for field in VECTORS}
        columns["signal"] = columns["signal"] * torch.tensor(rng.choice([1.0, -1.0], count))
        half = torch.tensor(rng.choice(extreme, count))
        report = SimpleNamespace(
            step=step, valid=True, tasks=TASKS, examples=torch.tensor(rng.integers(1, 40, count)),
            tokens=torch.ones(count), gram=half[:, None] * half,
            loss=torch.tensor(rng.choice(extreme, count)), memory_dot=torch.tensor(rng.choice(extreme, (count, 5))),
            **columns,
        )  # fmt: skip
        changed = {"lr": 0.1, "weights": rng.dirichlet(np.ones(count)), "eval_losses": dict.fromkeys(TASKS, 1e300)}
        asked = policy.weights(report, surrounded(step, memory, {**changed, "evaluations": step // 50}))
        assert 0 <= check_weights(asked, TASKS, name).sum() <= 1 + 1e-9
        json.dumps(memory, allow_nan=False)
