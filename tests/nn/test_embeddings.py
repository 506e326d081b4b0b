"""The table at both ends of a model: looked up at its start, and where it is tied, multiplied with at its end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.parity import hf
from tests.tiny import host, redraw, segments_of, tiny, tokens
from trivium.io import directory
from trivium.nn.embeddings import Tokens
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs
from trivium.nn.step import Step
from trivium.train import cross_entropy
from trivium.train.cross_entropy import linear_cross_entropy_sum


@pytest.mark.concept("X.16", part="nn/embeddings.py")
def test_a_lookup_is_torchs():
    x, weight = tokens(2, 5, vocab=13), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    step = Step.begin(Inputs(x), causal=True)
    for scale in (None, 16**0.5):
        embed = redraw(Tokens(scale=scale).build(13, 16))
        table = embed.weight.detach().clone().requires_grad_()
        ours, expected = embed(x, step), F.embedding(x, table) * (1.0 if scale is None else scale)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
        (ours * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(embed.weight.grad, table.grad, rtol=0, atol=1e-6)


@pytest.mark.concept("X.16", part="nn/embeddings.py")
def test_a_row_that_stands_at_padding_alone_is_never_trained():
    """What `padding_idx` is for: padding is said by segments, so any token can stand there."""
    model, x = tiny(host(LMHead(tied=False))), tokens(2, 9, vocab=60) + 1
    segments = segments_of([[6, -3], [-2, 7]], 9)
    x[segments < 0] = 0
    logits = model(Inputs(x, segments=segments)).logits[segments >= 0]
    logits.square().sum().backward()
    found = model.embed.weight.grad.clone()
    theirs = torch.nn.Embedding(61, 24, padding_idx=0)
    theirs.weight.data.copy_(model.embed.weight.detach())
    model.zero_grad()
    again = model(Inputs(embeds=theirs(x), segments=segments)).logits[segments >= 0]
    again.square().sum().backward()
    assert not found[0].any() and not theirs.weight.grad[0].any() and found[1:].any()
    torch.testing.assert_close(found, theirs.weight.grad)


@pytest.mark.concept("X.17", part="nn/heads.py")
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_a_tied_table_are_transformers(tied, tmp_path):
    theirs = hf.tiny(
        "llama", vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=tied
    )
    model, x = directory.read(hf.save(theirs, tmp_path)).model, tokens(2, 9, vocab=37)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    assert ("head.out.weight" in dict(model.named_parameters())) != tied
    assert (model.head.table(model.embed) is model.embed.weight) == tied
    for logits in (model(x).logits, theirs(x).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    pairs = [(model.embed.weight, theirs.model.embed_tokens.weight)]
    pairs += [] if tied else [(model.head.out.weight, theirs.lm_head.weight)]
    for ours, expected in pairs:
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.concept("X.17", part="train/cross_entropy.py")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("at_once", [1, 300, 1 << 24])
def test_a_loss_in_chunks_is_the_loss_over_all_logits(tied, at_once, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", at_once)
    monkeypatch.setattr(cross_entropy, "LOGITS_TRAINED", at_once)
    model, x = tiny(host(LMHead(tied=tied))), tokens(2, 9)
    labels, found = x[:, 1:].flatten(), []
    for chunked in (True, False):
        model.zero_grad()
        out = model(x, keep="none" if chunked else "all")
        if chunked:
            table = model.head.table(model.embed)
            loss = linear_cross_entropy_sum(out.hidden[:, :-1].flatten(0, 1), table, labels, label_smoothing=0.1)
        else:
            loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels, reduction="sum", label_smoothing=0.1)
        loss.backward()
        found.append((loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (ours, mine), (expected, theirs) = found
    assert abs(ours - expected) <= 1e-6 * expected
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-4)
