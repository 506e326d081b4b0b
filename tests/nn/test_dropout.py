"""Dropout on embeddings, attention weights and sublayers' outputs: torch's own draws, off in eval, right on average."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.parity import hf
from tests.tiny import DIM, VOCAB, segments_of, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.io import directory
from trivium.models.block import Block
from trivium.models.transformer import Transformer, TransformerModel
from trivium.nn.attention import Attention, use_backend
from trivium.nn.embeddings import Tokens
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.step import Step

pytestmark = [
    pytest.mark.concept("T17.04", part="nn/embeddings.py"),
    pytest.mark.concept("T17.04", part="models/block.py"),
    pytest.mark.concept("T17.04", part="nn/attention.py"),
]


def dropping(*, embed: float = 0.0, attention: float = 0.0, block: float = 0.0, kind: str = "learned") -> TransformerModel:
    positions = {"kind": kind, "size": 20} if kind == "learned" else None
    mixer = Attention(heads=4, kv_heads=2, head_dim=6, dropout=attention)
    layer = Block(mixer=mixer, ffn=MLP(hidden=40), dropout=block)
    spec = Transformer(dim=DIM, vocab=VOCAB, layers="2*a", blocks={"a": layer}, embed=Tokens(positions=positions, dropout=embed))
    return tiny(spec)


def test_the_embeddings_draws_are_torchs():
    x, model = tokens(2, 9), dropping(embed=0.3)
    step = Step.begin(Inputs(x), causal=True)
    plain = model.embed(x, step)
    model.train()
    torch.manual_seed(5)
    out = model.embed(x, step)
    torch.manual_seed(5)
    assert torch.equal(out, F.dropout(plain, 0.3)) and (out == 0).float().mean() > 0.2


@pytest.mark.parametrize("rates", [{}, {"resid_pdrop": 0.3, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, {"resid_pdrop": 0.0, "attn_pdrop": 0.4}])
@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_training_draws_what_transformers_draws(model_type, rates, tmp_path):
    """Every draw in the same place, of the same size, in the same order: logits and gradients in training mode agree."""
    theirs = hf.tiny(model_type, vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=32, **rates)
    ours = directory.read(hf.save(theirs, tmp_path)).model
    x = tokens(2, 12)
    quiet = hf.logits(theirs, x)
    theirs.train()
    ours.train().requires_grad_(True)
    torch.manual_seed(11)
    expected = theirs(input_ids=x, attention_mask=torch.ones_like(x)).logits
    torch.manual_seed(11)
    found = ours(x).logits
    assert ((expected - quiet).abs().max() / quiet.std()).item() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * quiet.std().item())
    for logits in (expected, found):
        logits.square().mean().backward()
    torch.testing.assert_close(ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rates", [{"embed": 0.4}, {"attention": 0.4}, {"block": 0.4}], ids=str)
def test_off_in_eval_and_seeded_in_training(rates):
    x, model, plain = tokens(2, 9), dropping(**rates), dropping()
    assert torch.equal(model(x).logits, plain(x).logits)
    model.train()

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(x).logits

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not torch.allclose(run(0), plain(x).logits, atol=1e-2)


def test_a_dropped_sum_is_the_sum_on_average():
    x, model = tokens(1, 6), dropping(embed=0.25)
    step = Step.begin(Inputs(x), causal=True)
    plain = model.embed(x, step).detach()
    model.train()
    torch.manual_seed(0)
    draws = torch.stack([model.embed(x, step).detach() for _ in range(4000)])
    error = (draws.mean(0) - plain).abs() / (plain.abs() * (0.25 / 0.75 / 4000) ** 0.5)
    assert error.max() < 4.5 and error.square().mean() < 1.5  # in standard errors


def test_attention_weights_are_dropped_before_they_meet_the_values():
    """A value of one everywhere: what attention gives is the sum of the kept weights over 1 - p."""
    from trivium.nn.backends import attend, eager_weights

    q, k = (torch.randn(2, 4, 9, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    step = Step.begin(Inputs(tokens(2, 9)), causal=True)
    torch.manual_seed(3)
    out = attend(q, k, torch.ones_like(k), step.view(), scale=0.4, backend="auto", dropout=0.5)
    torch.manual_seed(3)
    weights = F.dropout(eager_weights(q, k, scale=0.4, causal=True, mask=None), 0.5)
    torch.testing.assert_close(out, weights.sum(-1, keepdim=True).expand_as(out))


def test_attention_dropout_is_eagers_alone():
    x, model = tokens(2, 9), dropping(attention=0.3).train()
    outs = {}
    for name in ("auto", "eager"):
        use_backend(model, name)
        torch.manual_seed(2)
        outs[name] = model(x).logits
    assert torch.equal(outs["auto"], outs["eager"])
    use_backend(model, "sdpa")
    with pytest.raises(ConfigError, match="'sdpa' cannot drop weights; use 'eager' or 'auto'"):
        model(x)
    model.eval()(x)


def test_packed_documents_and_padding_are_dropped_too():
    """A document's draws are not those it gets alone but nothing leaks."""
    model, x = dropping(attention=0.2, embed=0.1, block=0.1).train(), tokens(1, 12)
    segments = segments_of([[5, 4, -3]], 12)
    torch.manual_seed(0)
    draws = torch.stack([model(Inputs(x, segments=segments)).hidden for _ in range(20)])
    assert draws.isfinite().all() and draws.std(0)[segments >= 0].min() > 0
    y = x.clone()
    y[:, 5:] = tokens(1, 7, seed=4)
    torch.manual_seed(1)
    a = model(Inputs(x, segments=segments)).hidden[:, :5]
    torch.manual_seed(1)
    assert torch.equal(a, model(Inputs(y, segments=segments)).hidden[:, :5])
