"""Packing: which rows share a bin of `length` tokens.

Best-fit decreasing: rows from the longest to the shortest, each into the fullest bin that still takes it. The bins' free
space is held as a bit set, so that the tightest fit is one shift and the cost is near-linear in rows. No row is split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core.registry import Registry

Pack = Callable[[np.ndarray, int], np.ndarray]
packings: Registry[Pack] = Registry("packing")


@dataclass(frozen=True)
class Bins:
    """Rows by bin: bin i holds `rows[starts[i]:starts[i + 1]]`, in that order."""

    rows: np.ndarray  # [rows] int64, every row once
    starts: np.ndarray  # [bins + 1] int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[self.starts[index] : self.starts[index + 1]]


def pack(lengths: np.ndarray, length: int, *, method: str) -> Bins:
    """Bins of at most `length` tokens; every row (`1 <= lengths[i] <= length`) is in exactly one. A pure function."""
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= length), "a row is empty or longer than a bin"
    bins = packings.get(method, field="packing")(lengths, length)
    rows = np.argsort(bins, kind="stable")
    return Bins(rows.astype(np.int64), np.searchsorted(bins[rows], np.arange(bins.max(initial=-1) + 2)).astype(np.int64))


@packings.register("best_fit")
def best_fit_decreasing(lengths: np.ndarray, length: int) -> np.ndarray:
    """The bin of each row, [rows] int64."""
    bins = np.empty(len(lengths), np.int64)
    by_space: list[list[int]] = [[] for _ in range(length + 1)]  # the bins that have exactly so much space left
    spaces = 0  # bit s is set while by_space[s] is not empty
    count = 0
    for row in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        size = int(lengths[row])
        fits = spaces >> size
        if fits:
            space = size + (fits & -fits).bit_length() - 1
            found = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, found, count = length, count, count + 1
        bins[row] = found
        by_space[space - size].append(found)
        spaces |= 1 << (space - size)
    return bins


@packings.register("none")
def one_per_row(lengths: np.ndarray, length: int) -> np.ndarray:
    """Every row in a bin of its own, in the order of the data."""
    return np.arange(len(lengths), dtype=np.int64)
