from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgrad.sampling.engine import native
from taskgrad.sampling.engine.permutation import SORTED_UP_TO, derive_key, permutation_window, permute
from tests.sampling.helpers import needs_extension


def whole(size: int, key: int) -> np.ndarray:
    return permutation_window(size, key, 0, size)


def by_network(size: int, keys: np.ndarray, positions: int) -> np.ndarray:
    """What the Feistel network has at the first positions, one row per key."""
    shape = (len(keys), positions)
    grid = np.broadcast_to(np.arange(positions), shape)
    each = np.broadcast_to(keys[:, None], shape)
    return permute(np.full(each.size, size), each.ravel(), grid.ravel()).reshape(shape)


def keys(count: int, seed: int) -> np.ndarray:
    return np.array([derive_key(seed, i) for i in range(count)], dtype=np.uint64)


def test_every_small_size_is_a_permutation() -> None:
    for size in range(1, 301):
        assert sorted(whole(size, derive_key(size)).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [SORTED_UP_TO, SORTED_UP_TO + 1, 511, 512, 513, 8191, 8192, 8193, 100_003])
def test_larger_sizes_are_permutations(size: int) -> None:
    assert np.array_equal(np.sort(whole(size, derive_key(3, size))), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 5, 31, 64, 300])
def test_the_network_itself_is_a_bijection_on_small_domains(size: int) -> None:
    assert sorted(by_network(size, keys(1, size), size)[0].tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**48), st.integers(0, 2**64 - 1), st.data())
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


@needs_extension
@settings(max_examples=150, deadline=None)
@given(st.one_of(st.integers(1, 600), st.integers(1, 2**48)), st.integers(0, 2**64 - 1), st.data())
def test_the_extension_agrees(size: int, key: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, min(size, start + 300)))
    module, _ = native.load()
    assert module is not None
    assert np.array_equal(module.permutation_window(size, key, start, stop), permutation_window(size, key, start, stop))


def test_a_window_of_a_billion_is_cheap() -> None:
    window = permutation_window(10**9, 5, 10**9 - 1000, 10**9)
    assert len(set(window.tolist())) == 1000


def test_elements_of_different_permutations_at_once() -> None:
    sizes = np.array([1000, 10**9, 300, 1000])
    each = keys(4, 1)
    positions = np.array([999, 5, 0, 17])
    alone = [
        permutation_window(int(size), int(key), int(at), int(at) + 1).item()
        for size, key, at in zip(sizes, each, positions, strict=True)
    ]
    assert permute(sizes, each, positions).tolist() == alone


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 11)])
def test_windows_outside_raise(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"outside of range\(10\)"):
        permutation_window(10, 0, start, stop)


def assert_even(counts: np.ndarray, expected: np.ndarray | None = None) -> None:
    """Chi-square against ``expected`` proportions, equal ones by default, five standard deviations above its mean."""
    share = np.full(counts.size, 1 / counts.size) if expected is None else expected / expected.sum()
    expected = share * counts.sum()
    freedom = counts.size - 1
    assert expected.min() >= 10
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_small_domain_are_equally_likely(size: int) -> None:
    counts = dict.fromkeys(itertools.permutations(range(size)), 0)
    window: Callable[..., Any] = permutation_window
    module, _ = native.load()
    if module is not None:  # test_the_extension_agrees; it is ten times faster
        window = module.permutation_window
    for key in range(max(3000, 30 * math.factorial(size))):
        counts[tuple(window(size, derive_key(11, key), 0, size).tolist())] += 1
    assert_even(np.array(list(counts.values())))


def pairs(values: np.ndarray, size: int) -> np.ndarray:
    """How often each ordered pair of different values is adjacent, at any place; [size * (size - 1)]."""
    found = np.zeros((size, size))
    np.add.at(found, (values[:, :-1].ravel(), values[:, 1:].ravel()), 1)
    assert not found.diagonal().any()
    return found[~np.eye(size, dtype=bool)]


@pytest.mark.parametrize("size", [7, 16, 33, 64])
def test_positions_and_neighbours_are_even_up_to_64(size: int) -> None:
    orders = np.stack([whole(size, derive_key(17, key)) for key in range(40 * size)])
    for column in orders.T:
        assert_even(np.bincount(column, minlength=size))
    assert_even(pairs(orders, size))


@pytest.mark.parametrize("size", [257, 300, 1000, 5000, 10**6 + 3, 10**9])
def test_positions_and_neighbours_of_the_network_are_even_over_keys(size: int) -> None:
    values = by_network(size, keys(8000, size), 6)
    bins = 64
    widths = -(-np.arange(1, bins + 1) * size // bins) + -np.arange(bins) * size // bins  # values in each bin
    for column in values.T:
        assert_even(np.bincount(column * bins // size, minlength=bins), widths)
    widths[0] -= 1  # a value is not its own neighbour
    for gaps in ((values[:, 1:] - values[:, :-1]) % size).T:
        assert_even(np.bincount(gaps * bins // size, minlength=bins), widths)


@pytest.mark.parametrize("size", [1000, 10**6])
def test_neighbours_within_one_large_permutation_are_even(size: int) -> None:
    values = permutation_window(size, derive_key(21, size), 0, min(size, 40_000))
    side = 8
    cells = values[:-1] * side // size * side + values[1:] * side // size
    if size > 10**4:
        assert_even(np.bincount(cells, minlength=side * side))
    correlation = np.corrcoef(values[1:], values[:-1])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(values))


def test_keys_depend_on_every_part_and_its_place() -> None:
    keys = {derive_key(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(keys) == 512
    assert derive_key(1, 2) != derive_key(2, 1)


def test_fixed_values_so_that_the_stream_never_changes_unnoticed() -> None:
    assert derive_key(1, 2, 3) == 16914669369030367833
    assert whole(8, 42).tolist() == [4, 1, 6, 2, 3, 0, 7, 5]
    assert permutation_window(10**6, 42, 0, 5).tolist() == [718411, 517493, 391204, 390375, 419668]
