"""Batches by number: pure, each bin once an epoch, shares of tokens exact, ranks together are the global batch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fakes import FakePrompt, talk
from trivium.core.errors import ConfigError
from trivium.data.bank import Prepared
from trivium.data.batch import Batch
from trivium.data.batches import Batches, collate, ordered
from trivium.data.order import Mixture, permuted
from trivium.data.prepare import prepare


def chats(rows: int, *, word: str = "yes", seed: int = 0, length: int = 64, packing: str = "best_fit") -> Prepared:
    random = np.random.default_rng(seed)
    made = [{"messages": talk(f"q{word}{n}", word * int(random.integers(1, 6)), "more", word)} for n in range(rows)]
    return prepare(made, FakePrompt(), length=length, packing=packing)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "segments", "targets"))


def documents(batch: Batch) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The documents of each row, read back from the tensors alone."""
    found = []
    for tokens, segments, targets in zip(batch.tokens.tolist(), batch.segments.tolist(), batch.targets.tolist(), strict=True):
        for segment in range(max(segments) + 1):
            at = [t for t, other in enumerate(segments) if other == segment]
            assert at == list(range(at[0], at[-1] + 1)), "a document stands in one piece"
            found.append((tuple(tokens[t] for t in at), tuple(targets[t] for t in at)))
    return found


def held(prepared: Prepared) -> Counter:
    return Counter((tuple(ids.tolist()), tuple(targets.tolist())) for ids, targets in map(prepared.row, range(len(prepared))))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 1500), st.integers(0, 2**63 - 1))
def test_the_permutation_is_a_bijection(size: int, key: int):
    assert sorted(permuted(index, size, key=key) for index in range(size)) == list(range(size))


def test_the_permutation_is_even_and_depends_on_its_key():
    places = Counter((index, permuted(index, 5, key=key)) for key in range(4000) for index in range(5))
    assert len(places) == 25 and all(650 < count < 950 for count in places.values())  # 800 expected, sigma 25
    assert len({tuple(permuted(i, 4, key=key) for i in range(4)) for key in range(500)}) == 24
    assert all(0 <= permuted(index, 10**15, key=1) < 10**15 for index in range(50))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 9), st.integers(1, 10**12)), min_size=1, max_size=6))
def test_a_mixture_deals_every_turn_once_and_keeps_to_its_shares(rates: list[int]):
    mixture = Mixture(rates)
    dealt = [0] * len(rates)
    for slot in range(200):
        source, turn = mixture.turn(slot)
        assert turn == dealt[source]
        dealt[source] += 1
        for count, rate in zip(dealt, rates, strict=True):
            assert 2 * abs(count * sum(rates) - (slot + 1) * rate) <= max(1, len(rates) - 1) * sum(rates)


def test_the_order_of_a_run_never_changes():
    """Runs resume across releases: these values are part of the format."""
    assert [permuted(index, 10, key=1) for index in range(10)] == [5, 0, 7, 3, 2, 4, 1, 8, 9, 6]
    assert [Mixture([3, 1, 1]).turn(slot) for slot in range(6)] == [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (0, 3)]


def test_data_sets_of_equal_size_are_shuffled_apart():
    sets = [(chats(30, packing="none"), 1), (chats(30, word="now", packing="none"), 1)]
    batches = Batches(sets, seed=0, rows=60)
    orders = [[bin_ for number, bin_ in batches.bins(0) if number == k] for k in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) != orders[0] != orders[1]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_each_epoch_holds_each_bin_once_in_a_new_order(rows: int):
    prepared = chats(60)
    batches = Batches([(prepared, 1)], seed=3, rows=rows)
    count = len(prepared.bins)
    stream = [bin_ for i in range(-(-3 * count // rows)) for _, bin_ in batches.bins(i)]
    epochs = [stream[k * count : (k + 1) * count] for k in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert all(a != b for a, b in pairwise([*epochs, list(range(count))]))
    assert batches.steps(1) == -(-count // rows) and batches.steps(0.5) == -(-count // (2 * rows)) and batches.steps(1e-9) == 1
    if count % rows == 0 or rows == 1:
        seen = Counter(document for i in range(count // rows) for document in documents(batches.batch(i)))
        assert seen == held(prepared)


def test_batch_i_is_a_pure_function(tmp_path):
    sets = [(chats(50), 2), (chats(30, word="no"), 1)]
    batches = Batches(sets, seed=5, rows=4)
    straight = [batches.batch(i) for i in range(12)]
    fresh = Batches([(chats(50), 2), (chats(30, word="no"), 1)], seed=5, rows=4)
    loaded = Batches(
        [(Prepared.load(prepared.save(tmp_path / str(n))), weight) for n, (prepared, weight) in enumerate(sets)], seed=5, rows=4
    )
    for i in np.random.default_rng(0).permutation(12).tolist():
        assert same(fresh.batch(i), straight[i]) and same(loaded.batch(i), straight[i]) and same(batches.batch(i), straight[i])
    assert fresh.fingerprint == loaded.fingerprint == batches.fingerprint
    others = [
        Batches(sets, seed=6, rows=4),
        Batches(sets, seed=5, rows=8),
        Batches([(sets[0][0], 3), sets[1]], seed=5, rows=4),
        Batches(sets[:1], seed=5, rows=4),
    ]
    assert len({batches.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert others[0].bins(0) != batches.bins(0)


def test_global_randomness_is_neither_used_nor_touched():
    batches = Batches([(chats(40), 1)], seed=0, rows=4)
    torch.manual_seed(1)
    np.random.seed(1)
    first, after = batches.batch(2), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(2)
    assert same(first, batches.batch(2))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_together_see_the_global_batch(world: int):
    sets = [(chats(50), 1), (chats(30, word="no"), 1)]
    whole = Batches(sets, seed=1, rows=6)
    ranks = [Batches(sets, seed=1, rows=6, rank=rank, world=world) for rank in range(world)]
    for i in range(5):
        parts = [rank.batch(i) for rank in ranks]
        assert [document for part in parts for document in documents(part)] == documents(whole.batch(i))
        assert all(len(part.tokens) == 6 // world for part in parts)
    assert {rank.fingerprint for rank in ranks} == {whole.fingerprint}


def test_weights_are_shares_of_tokens_even_where_bins_differ_in_fill():
    full = prepare([{"text": "x" * 30}] * 40, FakePrompt(), length=32)  # 32 tokens a bin
    half = prepare([{"text": "y" * 18}] * 90, FakePrompt(), length=32)  # 20 tokens a bin: two do not fit
    assert len(full.bins) == 40 and len(half.bins) == 90
    batches = Batches([(full, 3), (half, 1)], seed=0, rows=4)
    tokens = Counter()
    for i in range(460):
        for number, bin_ in batches.bins(i):
            prepared = (full, half)[number]
            tokens[number] += int(prepared.index["length"][prepared.bins[bin_]].sum())
    assert abs(tokens[0] / tokens.total() - 0.75) < 0.002
    seen = [Counter(bin_ for i in range(460) for number, bin_ in batches.bins(i) if number == k) for k in (0, 1)]
    assert all(max(counts.values()) - min(counts.values()) <= 1 for counts in seen), "each set goes through its own epochs"


def test_collation_is_exact_and_trimmed():
    prepared = chats(30)
    for i in range(len(prepared.bins)):
        batch = collate([(prepared, i)])
        assert batch.tokens.dtype == batch.segments.dtype == torch.int64 and batch.targets.dtype == torch.bool
        assert batch.tokens.shape[1] == prepared.index["length"][prepared.bins[i]].sum() <= prepared.length
        assert documents(batch) == [tuple(map(tuple, (ids.tolist(), on.tolist()))) for ids, on in map(prepared.row, prepared.bins[i])]
    batch = Batches([(prepared, 1)], seed=0, rows=8).batch(0)
    padding = batch.segments < 0
    assert not padding.all(0).any(), "no column is padding alone"
    assert not batch.targets[padding].any() and not batch.tokens[padding].any()
    starts = batch.segments != torch.nn.functional.pad(batch.segments, (1, 0), value=-1)[:, :-1]
    assert not batch.targets[starts].any(), "the first token of a document has nothing to be predicted from"


def test_unpacked_data_has_one_document_a_row():
    batch = Batches([(chats(30, packing="none"), 1)], seed=0, rows=30).batch(0)
    assert batch.segments.max() == 0
    assert Counter(documents(batch)) == held(chats(30))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 9])
def test_micro_batches_are_the_batch(n: int):
    batch = Batches([(chats(60), 1)], seed=0, rows=7).batch(0)
    parts = batch.split(n)
    assert len(parts) == min(n, 7) and max(len(part.tokens) for part in parts) - min(len(part.tokens) for part in parts) <= 1
    assert [document for part in parts for document in documents(part)] == documents(batch)
    assert all(not (part.segments < 0).all(0).any() for part in parts)
    assert sum(int(part.targets.sum()) for part in parts) == int(batch.targets.sum())


def test_a_batch_moves_to_a_device():
    batch = Batches([(chats(10), 1)], seed=0, rows=2).batch(0).to("meta")
    assert {batch.tokens.device.type, batch.segments.device.type, batch.targets.device.type} == {"meta"}


def test_validation_sees_every_bin_once_in_order():
    prepared = chats(60)
    batches = list(ordered(prepared, rows=4))
    assert [document for batch in batches for document in documents(batch)] == [
        document for bin_ in range(len(prepared.bins)) for document in documents(collate([(prepared, bin_)]))
    ]
    assert len(batches) == -(-len(prepared.bins) // 4)


def test_what_cannot_be_shared_out_is_an_error():
    prepared = chats(10)
    with pytest.raises(ConfigError, match="rows: 6 rows cannot be shared out evenly to 4 processes"):
        Batches([(prepared, 1)], seed=0, rows=6, world=4)
    with pytest.raises(ConfigError, match="weights: .*whole number from 1"):
        Batches([(prepared, 0)], seed=0, rows=6)
    with pytest.raises(ConfigError, match="no data set was given"):
        Batches([], seed=0, rows=6)
