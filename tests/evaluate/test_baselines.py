"""The n-gram baseline against counting by hand, and the compressor."""

from __future__ import annotations

import lzma
import random
from collections import defaultdict

import numpy as np
import pytest

from trivium.evaluate.baselines import KneserNey, compressed_bits_per_byte


def by_hand(documents, order, vocab):
    """Kneser-Ney with dictionaries: p(context, token), straight from the definition."""
    counts = defaultdict(lambda: defaultdict(set))  # n -> gram -> set of what makes it count
    for d, document in enumerate(documents):
        padded = (None,) * (order - 1) + tuple(document)
        for i in range(order - 1, len(padded)):
            counts[order][padded[i - order + 1 : i + 1]].add((d, i))
    for n in range(order - 1, 0, -1):
        for gram in counts[n + 1]:
            counts[n][gram[1:]].add(gram[0])
    sizes = {n: {gram: len(found) for gram, found in table.items()} for n, table in counts.items()}

    def p(context, token):
        if not len(context):
            lower, table, n = 1 / vocab, sizes[1], 1
        else:
            lower, n = p(context[1:], token), len(context) + 1
            table = sizes[n]
        values = list(table.values())
        ones, twos = values.count(1), values.count(2)
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        followers = [count for gram, count in table.items() if gram[:-1] == tuple(context)]
        if not followers:
            return lower
        count = table.get((*context, token), 0)
        return max(count - discount, 0) / sum(followers) + discount * len(followers) / sum(followers) * lower

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_equal_counting_by_hand(order):
    rng = random.Random(order)
    documents = [[rng.choice((0, 0, 1, 1, 2, 3)) for _ in range(rng.randrange(1, 25))] for _ in range(6)]
    asked = [rng.randrange(5) for _ in range(30)]
    expected, p = [], by_hand(documents, order, 5)
    padded = [None] * (order - 1) + asked
    for i, token in enumerate(asked):
        expected.append(p(tuple(padded[i : i + order - 1]), token))
    model = KneserNey(documents, order=order, vocab=5)
    np.testing.assert_allclose(model.probabilities(asked), expected, rtol=1e-12)
    assert model.bits(asked) == pytest.approx(-np.log2(expected).sum())


def test_probabilities_add_up_to_one():
    rng = random.Random(0)
    documents = [[rng.choice((0, 1, 1, 2)) for _ in range(40)] for _ in range(3)]
    model = KneserNey(documents, order=3, vocab=7)
    for context in ([], [0], [1, 2], [6, 6]):
        assert sum(model.probabilities([*context, token])[-1] for token in range(7)) == pytest.approx(1)


def test_repetition_is_learned_and_noise_is_not():
    rng = np.random.default_rng(0)
    model = KneserNey([[1, 2, 3, 4] * 50], order=4, vocab=10)
    assert model.bits([1, 2, 3, 4] * 10) / 40 < 0.5
    noise = rng.integers(0, 256, 4000).tolist()
    assert 7.5 < KneserNey([noise], order=4, vocab=256).bits(rng.integers(0, 256, 2000).tolist()) / 2000 < 9


def test_compressor():
    text = "".join(random.Random(0).choice("abcdefgh ") for _ in range(4000)).encode()
    assert compressed_bits_per_byte(text, text) < 0.2
    alone = (
        8 * (len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) - len(lzma.compress(b"", preset=9 | lzma.PRESET_EXTREME))) / len(text)
    )
    assert compressed_bits_per_byte(b"", text) == pytest.approx(alone)
    with pytest.raises(ValueError, match="empty file"):
        compressed_bits_per_byte(text, b"")
    with pytest.raises(ValueError, match="at least one token"):
        KneserNey([[]], vocab=3)
