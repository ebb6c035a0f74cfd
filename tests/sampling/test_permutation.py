from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.permutation import SORTED_UP_TO, _feistel, derive_key, permutation_window


def whole(size: int, key: int) -> np.ndarray:
    return permutation_window(size, key, 0, size)


@pytest.mark.parametrize("sizes", [range(1, 301)])
def test_every_small_size_is_a_permutation(sizes: range) -> None:
    for size in sizes:
        assert sorted(whole(size, derive_key(size)).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [SORTED_UP_TO, SORTED_UP_TO + 1, 8191, 8192, 8193, 100_003])
def test_larger_sizes_are_permutations(size: int) -> None:
    assert np.array_equal(np.sort(whole(size, derive_key(3, size))), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 5, 31, 64, 300])
def test_the_network_itself_is_a_bijection_on_small_domains(size: int) -> None:
    values = _feistel(size, derive_key(size), np.arange(size, dtype=np.uint64))
    assert sorted(values.tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_windows_agree_with_each_other_and_stay_inside(size: int, key: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, min(size, start + 300)))
    middle = data.draw(st.integers(start, stop))
    window = permutation_window(size, key, start, stop)
    assert window.dtype == np.int64
    assert len(set(window.tolist())) == stop - start
    assert not len(window) or (window.min() >= 0 and window.max() < size)
    parts = [permutation_window(size, key, start, middle), permutation_window(size, key, middle, stop)]
    assert np.array_equal(np.concatenate(parts), window)


def test_a_window_of_a_billion_is_cheap() -> None:
    window = permutation_window(10**9, 5, 10**9 - 1000, 10**9)
    assert len(set(window.tolist())) == 1000


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 11)])
def test_windows_outside_raise(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"outside of range\(10\)"):
        permutation_window(10, 0, start, stop)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_small_domain_are_equally_likely(size: int) -> None:
    counts: dict[tuple[int, ...], int] = {}
    draws = 200 * math.factorial(size)
    for key in range(draws):
        order = tuple(whole(size, derive_key(11, key)).tolist())
        counts[order] = counts.get(order, 0) + 1
    freedom = math.factorial(size) - 1
    values = np.zeros(freedom + 1)
    values[: len(counts)] = list(counts.values())
    assert chi_square(values) < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("size, positions", [(16, 16), (200, 8), (5000, 8)])
def test_positions_are_uniform_over_keys(size: int, positions: int) -> None:
    bins = min(size, 50)
    draws = 40 * bins
    counts = np.zeros((positions, bins))
    for key in range(draws):
        values = permutation_window(size, derive_key(13, key), 0, positions)
        counts[np.arange(positions), values * bins // size] += 1
    for row in counts:
        assert chi_square(row) < bins - 1 + 5 * math.sqrt(2 * (bins - 1))


def test_neighbours_are_uncorrelated_in_a_large_domain() -> None:
    values = permutation_window(10**6, 21, 0, 20_000).astype(float)
    correlation = np.corrcoef(values[1:], values[:-1])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(20_000)


def test_keys_depend_on_every_part_and_its_place() -> None:
    keys = {derive_key(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(keys) == 512
    assert derive_key(1, 2) != derive_key(2, 1)


def test_fixed_values_so_that_the_stream_never_changes_unnoticed() -> None:
    assert derive_key(1, 2, 3) == 16914669369030367833
    assert whole(8, 42).tolist() == [4, 1, 6, 2, 3, 0, 7, 5]
    assert permutation_window(10**6, 42, 0, 5).tolist() == [24158, 234919, 268377, 770710, 431005]
