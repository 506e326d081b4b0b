"""How alike rows are: words in one spelling, sets of shingles, and near duplicates by MinHash.

The minima of two sets under a random order agree with a chance that is their Jaccard likeness (Broder 1997). Bands of such
minima only propose pairs; the sets themselves decide. So nothing counts as alike that is not, and a pair at the threshold is
overlooked with a chance below 1%, less the more alike it is.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.seed import derive

Set = NDArray[np.uint64]  # sorted, each number once
# letters and digits in a row; a character of a script without spaces is a word by itself
WORD = re.compile("[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff]|[^\\W\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff]+")
PERMUTATIONS = 128
MISSED = 0.01  # the most that may be overlooked of pairs at the threshold
_ODD = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """The words of a text: compatibility forms unified, lower case, no punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normal(text: str) -> str:
    """A text as its words, with one space between."""
    return " ".join(words(text))


def shingles(ids: NDArray[np.uint64], size: int) -> Set:
    """The set of all runs of `size` numbers, each as one hash; of fewer numbers, the one run that there is."""
    if not len(ids):
        return np.empty(0, np.uint64)
    size = min(size, len(ids))
    with np.errstate(over="ignore"):
        total = np.zeros(len(ids) - size + 1, np.uint64)
        for offset in range(size):
            total = _mixed(total * _ODD + ids[offset : len(ids) - size + 1 + offset] + np.uint64(offset + 1))
    return np.unique(total)


def word_shingles(text: str, size: int) -> Set:
    """The set of all runs of `size` words."""
    found = words(text)
    return shingles(np.fromiter(map(_hash, found), np.uint64, len(found)), size)


def jaccard(one: Set, other: Set) -> float:
    """The share of what two sets have together that both have; 1 for two empty ones."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - both
    return both / union if union else 1.0


def signature(members: Set, *, seed: int, permutations: int = PERMUTATIONS) -> Set:
    """[permutations]: the least hash of the set in as many random orders."""
    scale, shift = _orders(seed, permutations)
    least = np.full(permutations, np.iinfo(np.uint64).max, np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, len(members), 4096):
            part = members[start : start + 4096, None] * scale + shift
            least = np.minimum(least, _mixed(part).min(axis=0))
    return least


def bands(threshold: float, permutations: int = PERMUTATIONS) -> int:
    """Rows of a band: the most with which a pair at the threshold still agrees in a whole band, all but `MISSED` of the time."""
    fitting = [r for r in range(1, permutations + 1) if (1 - threshold**r) ** (permutations // r) <= MISSED]
    return max(fitting, default=1)


def near(sets: Sequence[Set], *, threshold: float, seed: int = 0, permutations: int = PERMUTATIONS) -> dict[int, tuple[int, float]]:
    """Which sets are at least `threshold` like an earlier one that is kept: their place, to (that one's place, the likeness).

    The first of all that are alike stays. Of several earlier ones it is the most alike, then the first.
    """
    rows = bands(threshold, permutations)
    tables: list[dict[bytes, list[int]]] = [{} for _ in range(permutations // rows)]
    found: dict[int, tuple[int, float]] = {}
    for place, members in enumerate(sets):
        marks = signature(members, seed=seed, permutations=permutations)
        keys = [marks[band * rows : (band + 1) * rows].tobytes() for band in range(len(tables))]
        candidates = sorted({other for table, key in zip(tables, keys, strict=True) for other in table.get(key, ())})
        likeness, other = max(((jaccard(members, sets[other]), -other) for other in candidates), default=(0.0, 0))
        if candidates and likeness >= threshold:
            found[place] = (-other, likeness)
            continue
        for table, key in zip(tables, keys, strict=True):
            table.setdefault(key, []).append(place)
    return found


def bags(texts: Sequence[str], *, dims: int = 512) -> NDArray[np.float32]:
    """[N, dims], of length 1: the words of each text, rare ones weighing more (log inverse frequency), hashed with a sign into `dims`
    places (Weinberger 2009). Texts without words are zero."""
    counts = [Counter(words(text)) for text in texts]
    rows = Counter(word for count in counts for word in count)
    found = np.zeros((len(texts), dims), np.float32)
    for row, count in zip(found, counts, strict=True):
        for word, times in count.items():
            code = _hash(word)
            row[(code >> 1) % dims] += (1 if code & 1 else -1) * (1 + math.log(times)) * math.log((1 + len(texts)) / rows[word])
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


@functools.cache
def _orders(seed: int, permutations: int) -> tuple[Set, Set]:
    random = np.random.default_rng(derive(seed, "minhash"))
    scale, shift = random.integers(0, 1 << 64, (2, permutations), dtype=np.uint64)
    return scale | np.uint64(1), shift


@functools.lru_cache(1 << 17)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection that spreads every bit (splitmix64's end)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
