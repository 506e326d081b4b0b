"""DeepSeek's sparse attention: what is selected, that nothing else is read, and how the indexer learns."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import host, segments_of, tiny, tokens
from trivium.models.checkpointing import Recompute
from trivium.models.transformer import TransformerModel
from trivium.nn.compressed import CompressedAttention
from trivium.nn.inputs import Inputs
from trivium.nn.latent import LatentAttention
from trivium.nn.sparse import Indexer, Query, Selection, attend_selected, choose, divergence

TOP_K = 4
INDEXED = LatentAttention.tiny().replace(indexer=Indexer(heads=5, head_dim=6, rope_dim=4, top_k=TOP_K))


def indexed(top_k: int = TOP_K) -> TransformerModel:
    return tiny(host(INDEXED.replace(indexer=INDEXED.indexer.replace(top_k=top_k))))


@pytest.mark.concept("X.04", part="nn/sparse.py")
@pytest.mark.parametrize("packed", [False, True])
def test_with_room_for_all_it_is_dense(packed):
    """Also where a row is longer than top_k and its documents are not."""
    dense, x = tiny(host(LatentAttention.tiny())), tokens(2, 12)
    sparse = indexed(6 if packed else 12)
    segments = segments_of([[6, 5], [-3, 4, 5]], 12) if packed else None
    dense.load_state_dict({name: value for name, value in sparse.state_dict().items() if ".indexer." not in name})
    assert torch.equal(sparse(Inputs(x, segments=segments)).logits, dense(Inputs(x, segments=segments)).logits)
    assert not torch.equal(indexed(3)(Inputs(x, segments=segments)).logits, dense(Inputs(x, segments=segments)).logits)


def brute_force(query: Query, keys: torch.Tensor, seen: torch.Tensor, top_k: int) -> list[list[set[int]]]:
    """By row and query: score every key that is seen by itself, sort, and take the best; of equal ones the later."""
    out = []
    for row in range(len(keys)):
        out.append([])
        for t in range(query.q.shape[1]):
            scores = {}
            for s in seen[row, t].nonzero()[:, 0].tolist():
                parts = [
                    max(0.0, (query.q[row, t, i] @ keys[row, s]).item()) * query.weight[row, t, i].item() for i in range(query.q.shape[2])
                ]
                scores[s] = sum(parts)
            out[-1].append(set(sorted(scores, key=lambda s: (scores[s], s), reverse=True)[:top_k]))
    return out


@pytest.mark.concept("X.04", part="nn/sparse.py")
def test_what_is_selected_is_the_top_by_brute_force():
    """Scores that are all zero, as relu makes them, among them."""
    torch.manual_seed(0)
    query = Query(torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3))
    keys = torch.randn(2, 9, 4)
    keys[:, 2:6] *= 0
    seen = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, -1, -1).clone()
    seen[1, :, 3] = False
    selection = choose(query, keys, seen, 3)
    found = [
        [set(slots[there].tolist()) for slots, there in zip(*pair, strict=True)]
        for pair in zip(selection.slots, selection.seen, strict=True)
    ]
    assert found == brute_force(query, keys, seen, 3)
    assert [len(chosen) for chosen in found[0]] == [1, 2, 3, 3, 3, 3, 3, 3, 3]


@pytest.mark.concept("X.04", part="nn/sparse.py")
def test_attention_is_dense_attention_over_what_is_selected():
    """Weights on request: zero outside, no more than top_k inside; outputs and gradients those of a mask."""
    torch.manual_seed(1)
    q, kv = torch.randn(2, 3, 7, 9, requires_grad=True), torch.randn(2, 7, 9, requires_grad=True)
    slots = torch.stack([torch.randperm(7)[:3] for _ in range(14)]).view(2, 7, 3)
    selection = Selection(slots, slots <= torch.arange(7)[:, None])
    found, weights = attend_selected(q, kv, 5, selection, scale=0.4)
    mask = torch.zeros(2, 7, 7, dtype=torch.bool).scatter(2, slots, selection.seen)
    scores = (q * 0.4 @ kv[:, None].transpose(-1, -2)).masked_fill(~mask[:, None], float("-inf"))
    naive = scores.softmax(-1).nan_to_num() @ kv[:, None, :, :5]
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-6)
    assert weights.shape == (2, 3, 7, 3) and found.isfinite().all()
    expected = torch.autograd.grad(naive.square().sum(), (q, kv))
    for a, b in zip(torch.autograd.grad(found.square().sum(), (q, kv)), expected, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), rtol=0, atol=1e-5)

    asked = indexed()(tokens(2, 12), weights=True).aux.weights[0]
    assert asked.shape == (2, 3, 12, 12)
    assert (asked > 0).any(1).sum(-1).max() == TOP_K
    torch.testing.assert_close(asked.sum(-1), torch.ones(2, 3, 12), rtol=0, atol=1e-5)


@pytest.mark.concept("X.04", part="nn/latent.py")
def test_its_keys_are_cached():
    model = indexed()
    cache = model.cache(rows=2, capacity=12)
    assert cache.bytes == 4 * 2 * 12 * 2 * (INDEXED.kv_rank + INDEXED.rope_dim + INDEXED.indexer.head_dim)
    x = tokens(2, 12)
    steps = torch.cat([model(Inputs(x[:, t : t + 1], cache=cache)).logits for t in range(12)], 1)
    torch.testing.assert_close(steps, model(x).logits, rtol=0, atol=1e-4)


@pytest.mark.concept("X.04", part="nn/sparse.py")
def test_core_attention_grows_with_what_is_selected():
    """Twice the tokens, twice the products; twice of what is selected, twice the products."""

    def flops(count: int, top_k: int) -> int:
        slots = torch.randint(0, count, (1, count, top_k))
        with FlopCounterMode(display=False) as mode:
            attend_selected(torch.randn(1, 2, count, 6), torch.randn(1, count, 6), 4, Selection(slots, slots >= 0), scale=1.0)
        return mode.get_total_flops()

    assert flops(600, 8) == 2 * flops(300, 8) == flops(300, 16) == 2 * 2 * 8 * 600 * (6 + 4)


def test_the_divergence_is_that_of_its_definition():
    torch.manual_seed(2)
    scores, looked = torch.randn(2, 5, 7), torch.rand(2, 5, 7)
    seen = torch.rand(2, 5, 7) < 0.6
    seen[0, 1] = False
    expected = 0.0
    for row in range(2):
        for t in range(5):
            at = seen[row, t]
            if at.any():
                p = looked[row, t, at] / looked[row, t, at].sum()
                expected += (p * (p.log() - scores[row, t, at].log_softmax(0))).sum().item()
    assert divergence(scores, seen, looked).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.concept("X.04", part="nn/sparse.py")
def test_the_indexer_learns_where_attention_looks():
    """Dense warm-up: its term falls, nothing else moves, and then a third of the tokens hold over 90% of what dense attention
    looks at; before, they held half. In the sparse stage the term is over what was selected alone."""
    x = tokens(6, 24)
    model = tiny(host(INDEXED.replace(indexer=Indexer(heads=12, head_dim=12, rope_dim=4, top_k=24)))).train()
    for name, parameter in model.named_parameters():
        if ".inp.q" in name or ".inp.rope" in name or ".q_up" in name:
            parameter.data.mul_(4)  # attention that looks somewhere
    own = [parameter for name, parameter in model.named_parameters() if ".indexer." in name]
    before, seen = recall(model, x), []
    optimizer = torch.optim.Adam(own, lr=0.02)
    for _ in range(60):
        term = model(x, keep="none").aux.total("indexer")
        model.zero_grad()
        term.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if ".indexer." not in name)
        optimizer.step()
        seen.append(term.item())
    assert seen[-1] < 0.2 * seen[0]
    assert before < 0.6 and recall(model, x) > 0.9
    for layer in model.layers:
        layer.mixer.indexer.spec = layer.mixer.indexer.spec.replace(top_k=8)
    sparse = model(x, keep="none").aux.total("indexer")
    assert 0 < sparse < seen[0]


@torch.no_grad()
def recall(model: TransformerModel, x: torch.Tensor, top_k: int = 8) -> float:
    """How much of the first layer's dense attention, in all heads together, the top of its indexer holds."""
    mixer = model.layers[0].mixer
    kept = []
    mixer.indexer.register_forward_hook(lambda module, given, out: kept.append(out))
    looked = model(x, weights=True, keep="none").aux.weights[0].mean(1)
    mixer.indexer._forward_hooks.clear()
    (query, keys), seen = kept[0], torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    selection = choose(query, keys[:, 0], seen[None], top_k)
    held = looked.gather(-1, selection.slots).masked_fill(~selection.seen, 0.0).sum(-1)
    return held[:, top_k:].mean().item()


@pytest.mark.parametrize("part", [INDEXED, CompressedAttention.tiny()], ids=["indexed", "compressed"])
def test_what_the_indexer_learns_is_the_same_with_checkpointing(part):
    model, x = tiny(host(part)).train(), tokens(2, 11)
    segments = segments_of([[6, 5], [-2, 9]], 11)

    def gradients() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        out = model(Inputs(x, segments=segments))
        (out.logits[segments >= 0].square().mean() + out.aux.total("indexer")).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    assert all(gradient.abs().sum() > 0 for name, gradient in expected.items() if ".indexer." in name)
    model.recompute = Recompute(every=2)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients().items())


def test_its_term_is_a_sum_over_documents():
    model, x = tiny(host(INDEXED)).train(), tokens(1, 12)
    packed = model(Inputs(x, segments=segments_of([[7, 5]], 12))).aux.total("indexer")
    apart = sum(model(part).aux.total("indexer") for part in x.split([7, 5], 1))
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
