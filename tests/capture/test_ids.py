"""What ids may look like: unsorted, absent, one row, all rows, none, weights, sizes that coincide."""

from __future__ import annotations

import pytest
import torch

from tests.utils.architectures import ARCHITECTURES
from tests.utils.oracle import separate_backwards, weight_copies
from tests.utils.steps import Case, Expected, assert_report, make_case, relative_error, tracked_step

NAMES = ("mlp", "conv2d", "gpt_row_positions_tied", "norms")
IDS = {
    "sorted": [0, 0, 1, 1, 2, 2],
    "sorted_with_rest_first": [-1, -1, 0, 1, 2, 2],
    "sorted_with_rest_last": [0, 1, 1, 2, -1, -1],
    "unsorted": [2, 0, 1, 2, 0, 1],
    "absent": [2, 0, 0, 2, -1, 2],
    "one_row": [0, 0, 1, 0, 0, 0],
    "all_rows": [1, 1, 1, 1, 1, 1],
    "no_task": [-1, -1, -1, -1, -1, -1],
    "one_of_many": [-1, -1, -1, 2, -1, -1],
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_per_example(name: str, ids: str, mode: str, weighted: bool) -> None:
    case = make_case(ARCHITECTURES[name], "example", weighted=weighted)
    case.ids = torch.tensor(IDS[ids])
    check(case, mode)


@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize("pattern", ["packed", "constant", "none", "alternating"])
def test_ids_per_token(pattern: str, mode: str) -> None:
    case = make_case(ARCHITECTURES["gpt_row_positions_tied"], "token", weighted=True)
    place = torch.arange(30).view(6, 5)
    case.ids = {
        "packed": (place % 5 > 2).long() + (place > 14).long(),
        "constant": torch.full((6, 5), 2),
        "none": torch.full((6, 5), -1),
        "alternating": place % 4 - 1,
    }[pattern]
    check(case, mode, tokens=True)


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 9])
@pytest.mark.parametrize(
    "name", ["mlp", "mlp_tokens", "gpt_row_positions", "gpt_batch_positions", "conv1d", "pooled_head"]
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_batches_of_any_size_also_those_that_equal_another_dimension(name: str, batch: int) -> None:
    """5 is the sequence length, 8 the width and the channels."""
    case = make_case(ARCHITECTURES[name], "example", batch=batch)
    oracle = separate_backwards(*case.oracle_arguments)
    done = tracked_step(case, mode="exact")
    for key, parts in done.task_gradients.items():
        assert relative_error(parts, oracle[key]) <= 1e-10, key
    must, _ = ARCHITECTURES[name].expected(case.model, "example")
    assert must <= set(done.attributed), done.unattributed


def test_counts() -> None:
    case = make_case(ARCHITECTURES["mlp_tokens"], "token")
    case.ids = torch.tensor([[0, 0, 1, -1, 0], *[[1, 1, 1, 1, 1]] * 4, [-1, 2, -1, -1, -1]])
    report = tracked_step(case).report
    assert report.tasks == ("a", "b", "c")
    assert report.examples.tolist() == [1, 5, 1]
    assert report.tokens.tolist() == [3.0, 21.0, 1.0]
    assert report.examples.dtype == torch.int64 and report.gram.dtype == torch.float64
    assert report.step == 1 and report.valid


def check(case: Case, mode: str, tokens: bool = False) -> None:
    oracle = (weight_copies if tokens else separate_backwards)(*case.oracle_arguments)
    done = tracked_step(case, mode=mode, sketch_dim=4096)
    assert set(done.attributed) == set(oracle), done.unattributed
    if mode == "exact":
        for key, parts in done.task_gradients.items():
            assert relative_error(parts, oracle[key]) <= 1e-10, key
    assert_report(done.report, Expected.of(oracle, oracle, case.ids, case.weight), 1e-9)
