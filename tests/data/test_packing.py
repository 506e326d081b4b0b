"""Packing: every row once, no bin over its length, never more bins than first-fit decreasing on samples, near-linear time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.core.errors import ConfigError
from trivium.data.packing import pack


@st.composite
def cases(draw) -> tuple[np.ndarray, int]:
    length = draw(st.integers(1, 64))
    return np.array(draw(st.lists(st.integers(1, length), max_size=80)), np.int64), length


@given(cases())
def test_every_row_is_in_one_bin_and_no_bin_is_over_full(case: tuple[np.ndarray, int]):
    lengths, length = case
    bins = pack(lengths, length, method="best_fit")
    assert sorted(bins.rows.tolist()) == list(range(len(lengths)))
    assert bins.starts[0] == 0 and bins.starts[-1] == len(lengths)
    for i in range(len(bins)):
        assert len(bins[i]) > 0 and lengths[bins[i]].sum() <= length


@given(cases())
def test_it_is_best_fit_decreasing(case: tuple[np.ndarray, int]):
    """Against the rule carried out naively: the multiset of fills is the same."""
    lengths, length = case
    fills: list[int] = []
    for size in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + size <= length]
        if fitting:
            fills[max(fitting, key=lambda i: fills[i])] += size
        else:
            fills.append(size)
    bins = pack(lengths, length, method="best_fit")
    assert sorted(int(lengths[bins[i]].sum()) for i in range(len(bins))) == sorted(fills)


def first_fit_decreasing(lengths: np.ndarray, length: int) -> int:
    space: list[int] = []
    for size in sorted(lengths.tolist(), reverse=True):
        found = next((i for i, left in enumerate(space) if left >= size), None)
        if found is None:
            space.append(length - size)
        else:
            space[found] -= size
    return len(space)


@pytest.mark.parametrize("seed", range(12))
def test_no_more_bins_than_first_fit_decreasing(seed: int):
    random = np.random.default_rng(seed)
    length = int(random.integers(50, 500))
    lengths = np.clip(random.lognormal(np.log(length / 6), 0.9, 400).astype(np.int64), 1, length)
    bins = len(pack(lengths, length, method="best_fit"))
    assert -(-lengths.sum() // length) <= bins <= first_fit_decreasing(lengths, length)


def test_packing_is_deterministic_and_can_be_off():
    lengths = np.array([5, 3, 5, 2, 3, 2])
    bins = pack(lengths, 10, method="best_fit")
    assert [bins[i].tolist() for i in range(len(bins))] == [[0, 2], [1, 3, 4, 5]]
    off = pack(lengths, 10, method="none")
    assert [off[i].tolist() for i in range(len(off))] == [[0], [1], [2], [3], [4], [5]]
    with pytest.raises(ConfigError, match="packing: unknown packing 'best-fit'; did you mean 'best_fit'"):
        pack(lengths, 10, method="best-fit")


def test_a_hundred_thousand_rows_take_no_quadratic_time():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64), 1, 4096)
    start = time.process_time()
    assert len(pack(lengths, 4096, method="best_fit")) <= lengths.sum() // 4096 + 2
    assert time.process_time() - start < 5
