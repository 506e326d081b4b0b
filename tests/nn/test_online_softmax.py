"""Online softmax is softmax, whatever the blocks and their order, and partial results merge."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.core.seed import generator
from trivium.nn.online_softmax import Partial, Running, finite, online_softmax


def scores_of(*shape: int, magnitude: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed, "scores", *shape)) * magnitude


def split(count: int, cuts: list[int], order: int) -> list[slice]:
    edges = sorted({0, count, *(cut % count for cut in cuts)})
    blocks = [slice(a, b) for a, b in itertools.pairwise(edges)]
    random.Random(order).shuffle(blocks)
    return blocks


@pytest.mark.concept("X.36", part="nn/online_softmax.py")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 69), max_size=12),
    order=st.integers(0, 99),
    magnitude=st.sampled_from([1e-3, 1.0, 1e4]),
    hidden=st.booleans(),
)
def test_any_split_and_order_is_softmax(count, cuts, order, magnitude, hidden):
    scores = scores_of(3, 4, count, magnitude=magnitude)
    if hidden:
        scores[:, 1, : count // 2] = -torch.inf
    blocks = split(count, cuts, order)
    weights, trace = online_softmax(scores, blocks)
    expected = torch.softmax(scores.double(), -1)
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(trace[-1].lse.double(), scores.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    so_far: list[torch.Tensor] = []
    for block, known in zip(blocks, trace, strict=True):  # what was known after each block is that of the scores seen by then
        so_far.append(scores[..., block])
        seen = torch.cat(so_far, -1)
        assert torch.equal(known.top, seen.amax(-1))
        total = torch.exp(seen.double() - finite(known.top)[..., None].double()).sum(-1)
        torch.testing.assert_close(known.total.double(), total, rtol=2e-6, atol=1e-6)


@pytest.mark.concept("X.36", part="nn/online_softmax.py")
def test_extremes_neither_overflow_nor_vanish():
    """1e4 beside -1e4, all equal, rising, falling: where a plain exp would be inf or 0."""
    rows = torch.stack([torch.linspace(-1e4, 1e4, 33), torch.linspace(1e4, -1e4, 33), torch.full((33,), 1e4), torch.full((33,), -1e4)])
    assert torch.exp(rows).isinf().any() and (torch.exp(rows).sum(-1) == 0).any()
    for blocks in ([slice(i, i + 1) for i in range(33)], [slice(16, 33), slice(0, 16)], [slice(0, 33)]):
        weights, trace = online_softmax(rows, blocks)
        torch.testing.assert_close(weights, torch.softmax(rows, -1), rtol=0, atol=1e-6)
        tops = torch.stack([known.top for known in trace])
        assert (tops.diff(dim=0) >= 0).all() and all((known.total >= 1).all() for known in trace)


@pytest.mark.concept("X.36", part="nn/online_softmax.py")
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_partial_attention_merges_in_any_tree(magnitude):
    """Four parts of the keys, joined pairwise or one after the other, forward or backward: attention over all."""
    scores, v = scores_of(2, 5, 40, magnitude=magnitude), scores_of(2, 40, 6, magnitude=1.0, seed=1)
    scores[0, 2] = -torch.inf
    parts = []
    for block in (slice(0, 7), slice(7, 8), slice(8, 30), slice(30, 40)):
        running = Running.of(scores[..., block])
        parts.append(Partial(running, torch.exp(scores[..., block] - finite(running.top)[..., None]) @ v[..., block, :]))
    a, b, c, d = parts
    expected = torch.softmax(scores.double(), -1).nan_to_num(0.0) @ v.double()
    for whole in (a.merge(b).merge(c).merge(d), a.merge(b).merge(c.merge(d)), d.merge(c).merge(b).merge(a), c.merge(a).merge(d.merge(b))):
        torch.testing.assert_close(whole.finish().double(), expected, rtol=0, atol=1e-6 if magnitude == 1 else 3e-6)
        assert whole.finish()[0, 2].abs().max() == 0 and (whole.running.lse[0, 2] == -torch.inf)


def test_hidden_rows_are_zero():
    scores = torch.full((2, 9), -torch.inf)
    scores[1, 3] = 0.5
    weights, trace = online_softmax(scores, [slice(0, 3), slice(3, 9)])
    assert weights[0].abs().max() == 0 and weights[1, 3] == 1 and weights[1].sum() == 1
    assert trace[0].lse.tolist() == [-torch.inf, -torch.inf] and trace[1].lse[1] == 0.5
