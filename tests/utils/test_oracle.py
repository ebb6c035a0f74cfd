"""The two oracles against each other and against the ordinary gradient, over the whole zoo."""

from __future__ import annotations

import fnmatch

import pytest
import torch

from tests.utils.architectures import ARCHITECTURES, Architecture
from tests.utils.oracle import mean_loss, separate_backwards, to_double, weight_copies
from tests.utils.steps import CASES, Case, case_id, make_case, negligible, relative_error


def ordinary_gradient(case: Case) -> dict[str, torch.Tensor]:
    twin = to_double(case.model)
    rows = case.row_loss(twin(*case.args, **case.kwargs))
    mean_loss(rows, case.weight).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("architecture", "kind"), CASES, ids=case_id)
def test_copies_sum_to_the_gradient_and_agree_with_separate_backwards(architecture: Architecture, kind: str) -> None:
    case = make_case(architecture, kind, weighted=True)
    copies = weight_copies(*case.oracle_arguments)
    state = torch.random.get_rng_state()
    plain = ordinary_gradient(case)
    torch.random.set_rng_state(state)
    floor = negligible(plain)
    for name, parts in copies.items():
        assert relative_error(parts.sum(0), plain[name], parts, floor) <= architecture.tolerance, name
    if architecture.mixes or (kind == "token" and not architecture.token_wise):
        return
    apart = separate_backwards(*case.oracle_arguments)
    attributed, _ = architecture.expected(case.model, kind)
    assert attributed
    for name in attributed:
        assert relative_error(copies[name], apart[name], floor=floor) <= architecture.tolerance, name


def test_the_zoo_is_large_and_every_name_is_expected_somewhere() -> None:
    assert len(ARCHITECTURES) >= 45
    for architecture in ARCHITECTURES.values():
        model = architecture.build()
        names = {name for name, _ in model.named_parameters()}
        for pattern in (*architecture.unattributed, *architecture.unattributed_tokens, *architecture.either):
            assert fnmatch.filter(names, pattern), pattern
