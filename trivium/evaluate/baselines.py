"""What a language model must beat: an interpolated Kneser-Ney n-gram model over the same tokens, and a compressor.

The n-gram model (Kneser and Ney 1995; Chen and Goodman 1999, section 4.1.6, one discount an order) keeps its counts in
sorted arrays of 64-bit keys, so that millions of tokens fit. Keys are hashes; at 10 million n-grams the chance that any
two collide is about 3 in a million.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Sequence

import numpy as np

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class KneserNey:
    """Probabilities of tokens after their last `order` - 1 tokens; documents do not see each other.

    `vocab`: how many tokens there are; a token never seen gets its share of what discounting frees.
    """

    def __init__(self, documents: Iterable[Sequence[int]], *, order: int = 5, vocab: int):
        if order < 1 or vocab < 1:
            raise ValueError(f"order ({order}) and vocab ({vocab}) must be positive")
        self.order, self.vocab = order, vocab
        keys, real = _keys(documents, order)
        at, counts = _types(keys[order][real], real)
        self._levels: list[_Level] = []
        for n in range(order, 0, -1):
            self._levels.append(_Level(keys, at, counts, n))
            if n > 1:  # lower orders count in how many contexts an n-gram was seen, not how often
                at, counts = _types(keys[n - 1][at], at)
        self._levels.reverse()

    def probabilities(self, document: Sequence[int]) -> np.ndarray:
        """P(token | tokens before it) for each token of `document`, float64 [T]."""
        keys, real = _keys([document], self.order)
        p = np.full(len(real), 1.0 / self.vocab)
        for n, level in enumerate(self._levels, start=1):
            p = level.refine(keys[n][real], keys[n - 1][real - 1], p)
        return p

    def bits(self, document: Sequence[int]) -> float:
        """Bits that `document` costs."""
        return float(-np.log2(self.probabilities(document)).sum())


class _Level:
    """Counts of one order: n-grams, and for each context its total and how many different tokens followed it."""

    def __init__(self, keys: list[np.ndarray], at: np.ndarray, counts: np.ndarray, n: int):
        self.grams = keys[n][at]
        self.counts = counts.astype(np.float64)
        ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        self.contexts, inverse = np.unique(keys[n - 1][at - 1], return_inverse=True)
        self.totals = np.bincount(inverse, weights=self.counts)
        self.kinds = np.bincount(inverse).astype(np.float64)

    def refine(self, grams: np.ndarray, contexts: np.ndarray, lower: np.ndarray) -> np.ndarray:
        place, known = _find(self.contexts, contexts)
        total, kinds = np.where(known, self.totals[place], 1.0), np.where(known, self.kinds[place], 0.0)
        spot, seen = _find(self.grams, grams)
        count = np.where(seen, self.counts[spot], 0.0)
        refined = np.maximum(count - self.discount, 0.0) / total + self.discount * kinds / total * lower
        return np.where(known, refined, lower)


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted key stands in the sorted table, and whether it does."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted


def _types(keys: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each different key, in sorted order: a place where it stands, and how often it does."""
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    return at[first], counts


def _keys(documents: Iterable[Sequence[int]], order: int) -> tuple[list[np.ndarray], np.ndarray]:
    """keys[n][i]: a hash of the n tokens that end at place i; and the places of real tokens. Before each document stand
    `order` places that no document holds, so that no context reaches into another document."""
    pieces, real, base = [], [], 0
    for document in documents:
        ids = np.asarray(document, dtype=np.int64)
        pieces += [np.zeros(order, dtype=np.int64), ids + 1]
        real.append(np.arange(base + order, base + order + len(ids)))
        base += order + len(ids)
    stream = np.concatenate(pieces).astype(np.uint64) if pieces else np.zeros(0, np.uint64)
    places = np.concatenate(real) if real else np.zeros(0, np.int64)
    if not len(places):
        raise ValueError("an n-gram model needs at least one token")
    keys = [np.zeros(len(stream), dtype=np.uint64)]
    for n in range(1, order + 1):
        shifted = np.zeros_like(stream)
        shifted[n - 1 :] = stream[: len(stream) - n + 1]
        keys.append(_mix(keys[-1] * _FACTOR + shifted + np.uint64(n)))
    return keys, places


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(29))


def compressed_bits_per_byte(train: bytes, file: bytes) -> float:
    """Bits per byte of `file` that LZMA (preset 9, extreme) needs once it has read `train`: the cost of both together
    less that of `train` alone."""
    if not file:
        raise ValueError("an empty file costs nothing per byte")
    preset = 9 | lzma.PRESET_EXTREME
    return 8 * (len(lzma.compress(train + file, preset=preset)) - len(lzma.compress(train, preset=preset))) / len(file)
