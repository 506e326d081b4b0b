"""How alike rows are: words, MinHash against the likeness itself, and every near pair that brute force finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.likeness import MISSED, bags, bands, jaccard, near, normal, shingles, signature, word_shingles, words


def test_words_have_one_spelling():
    assert words("The ﬁne CAFÉ's, no. 7 — naïve_x!") == ["the", "fine", "café", "s", "no", "7", "naïve_x"]
    assert words("猫が好き cats") == ["猫", "が", "好", "き", "cats"] and words("?! ...") == []
    assert normal("  A\n b,c ") == "a b c"


def test_shingles_are_runs():
    ids = np.arange(6, dtype=np.uint64)
    assert len(shingles(ids, 3)) == 4 and len(shingles(np.array([1, 1, 1, 1], np.uint64), 2)) == 1
    assert len(shingles(ids[:2], 3)) == 1 and len(shingles(ids[:0], 3)) == 0
    assert not np.array_equal(word_shingles("a b c", 2), word_shingles("c b a", 2)), "order counts"
    assert jaccard(word_shingles("a b c d", 2), word_shingles("a b c e", 2)) == 0.5
    assert jaccard(shingles(ids[:0], 3), shingles(ids[:0], 3)) == 1.0


def test_signatures_agree_as_often_as_sets_are_alike():
    random = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.8):
        common, one, other = (np.unique(random.integers(0, 1 << 63, n, dtype=np.uint64)) for n in (300, 300, 300))
        own = round(300 * (1 - share) / (2 * share))
        a, b = np.union1d(common, one[:own]), np.union1d(common, other[:own])
        found = np.mean(signature(a, seed=1, permutations=4096) == signature(b, seed=1, permutations=4096))
        assert abs(found - jaccard(a, b)) < 4 * (share * (1 - share) / 4096) ** 0.5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_miss_little(threshold):
    rows = bands(threshold)
    assert (1 - threshold**rows) ** (128 // rows) <= MISSED
    assert rows == 128 or (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > MISSED


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 30), max_size=25), max_size=12), st.sampled_from([0.5, 0.8, 1.0]))
def test_near_pairs_are_those_of_brute_force(lists, threshold):
    """What is found is true; and everything above the threshold is found, at 512 orders and this seed."""
    sets = [np.unique(np.array(row, np.uint64)) for row in lists]
    found = near(sets, threshold=threshold, permutations=512)
    kept = [place for place in range(len(sets)) if place not in found]
    for place, members in enumerate(sets):
        before = [jaccard(members, sets[other]) for other in kept if other < place]
        assert (place in found) == (max(before, default=0.0) >= threshold)
        if place in found:
            other, likeness = found[place]
            assert other in kept and other < place and likeness == max(before) == jaccard(members, sets[other])


def test_bags_point_where_words_do():
    vectors = bags(["the cat sat on the mat", "a cat sat on a mat", "stock markets fell today", "?"])
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.25 > abs(likeness[0, 2]) and np.allclose(np.diag(likeness), [1, 1, 1, 0], atol=1e-6)
