"""Layers that attend to the keys and values of an earlier one: transformers' Gemma 4, the cache, gradients, recomputation."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from tests.parity.hf import greedy, redraw
from tests.tiny import DIM, VOCAB, segments_of, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.models import count
from trivium.models.block import Block
from trivium.models.checkpointing import Recompute
from trivium.models.transformer import Transformer, TransformerModel, build
from trivium.nn.activations import GELU
from trivium.nn.attention import Attention, Scores
from trivium.nn.embeddings import Tokens
from trivium.nn.feedforward import MLP
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS
from trivium.nn.patterns import Window
from trivium.nn.positions import Rope

OWNER = Attention(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0), qk_norm=RMS())
LOCAL = OWNER.replace(pattern=Window(size=3), kv_heads=3)
LAYERS = ("local", "full", "full", "local_too", "full_too", "full_too")  # the third and the first layer lend


def shared(*, layers: tuple[str, ...] = LAYERS) -> Transformer:
    mixers = {"full": OWNER, "local": LOCAL, "full_too": OWNER.replace(share="full"), "local_too": LOCAL.replace(share="local")}
    blocks = {name: Block(mixer=mixers[name], ffn=MLP(hidden=20), norm=RMS(eps=1e-4)) for name in dict.fromkeys(layers)}
    return Transformer(dim=DIM, vocab=VOCAB, layers=layers, blocks=blocks)


GEMMA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "global_head_dim": 10, "rms_norm_eps": 1e-3, "sliding_window": 5, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 2,
    "max_position_embeddings": 64, "vocab_size_per_layer_input": 97,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding", "sliding", "full")],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "default", "rope_theta": 400.0},
    },
}  # fmt: skip


def gemma() -> tuple[Gemma4ForCausalLM, TransformerModel]:
    """transformers' model, redrawn, and ours of the same weights. Its embeddings of each layer, which are no matter here, come to
    nothing: the norm that they pass last is zero."""
    torch.manual_seed(0)
    theirs = Gemma4ForCausalLM._from_config(Gemma4TextConfig(**GEMMA), attn_implementation="eager").eval()
    redraw(theirs, seed=0)
    for layer in theirs.model.layers:
        layer.post_per_layer_input_norm.weight.data.zero_()
    norm = RMS(eps=1e-3, round_first=False)
    shape = {"heads": 4, "kv_heads": 2, "qk_norm": norm, "v_norm": norm.replace(affine=False), "scores": Scores(scale=1.0)}
    local = Attention(**shape, head_dim=6, position=Rope(base=50.0), pattern=Window(size=5))
    full = Attention(**shape, head_dim=10, position=Rope(base=400.0))
    mixers = {"local": local, "full": full, "local_too": local.replace(share="local"), "full_too": full.replace(share="full")}
    mlp = MLP(hidden=40, activation=GELU(approximate="tanh"))
    spec = Transformer(
        dim=32, vocab=97, layers=("local", "full", "local", "full", "local_too", "local_too", "full_too"), final_norm=norm,
        blocks={name: Block(mixer=mixer, ffn=mlp, norm=norm, norm_at="sandwich") for name, mixer in mixers.items()},
        embed=Tokens(scale=32**0.5), head=LMHead(tied=True),
    )  # fmt: skip
    names = {
        "self_attn.q_proj": "mixer.inp.q", "self_attn.k_proj": "mixer.inp.k", "self_attn.v_proj": "mixer.inp.v", "self_attn.o_proj": "mixer.out",
        "self_attn.q_norm": "mixer.norms.q", "self_attn.k_norm": "mixer.norms.k", "mlp.gate_proj": "ffn.inp.gate",
        "mlp.up_proj": "ffn.inp.up", "mlp.down_proj": "ffn.out", "input_layernorm": "mixer_norm", "post_attention_layernorm": "mixer_out_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "ffn_out_norm",
    }  # fmt: skip
    values = {"embed.weight": theirs.model.embed_tokens.weight, "final_norm.weight": theirs.model.norm.weight}
    for name, value in theirs.model.named_parameters():
        if name.startswith("layers.") and "per_layer" not in name:
            _, index, rest = name.split(".", 2)
            values[f"layers.{index}.{names[rest.removesuffix('.weight')]}.weight"] = value
    ours = build(spec, device="cpu").eval()
    ours.load_state_dict(values)
    return theirs, ours


@pytest.mark.concept("X.01", part="nn/attention.py")
def test_it_is_gemma_4():
    """Logits, and the gradient of every weight: what a layer lends is trained by those that borrow."""
    theirs, ours = gemma()
    x = tokens(2, 19, vocab=97)
    expected, found = theirs(input_ids=x, attention_mask=torch.ones_like(x)).logits, ours(x).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), rtol=0, atol=1e-5)
    expected.square().mean().backward()
    found.square().mean().backward()
    lender = theirs.model.layers[2].self_attn
    mine = ours.layers[2].mixer.inp
    for a, b in ((mine.k.weight.grad, lender.k_proj.weight.grad), (mine.v.weight.grad, lender.v_proj.weight.grad)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.std().item())


@pytest.mark.concept("X.01", part="nn/attention.py")
@torch.no_grad()
def test_its_cached_tokens_are_gemma_4s():
    theirs, ours = gemma()
    step = prompt = tokens(2, 6, vocab=97, seed=3)
    expected = greedy(theirs, prompt, 14)
    cache, out = ours.cache(rows=2, capacity=20), []
    for _ in range(14):
        step = ours(Inputs(step, cache=cache), keep="last").logits.argmax(-1, keepdim=True)
        out.append(step)
    assert torch.equal(torch.cat(out, 1), expected) and len(expected.unique()) > 4


@pytest.mark.concept("X.01", part="nn/attention.py")
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 4, 3)], ids=str)
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(chunks):
    model, x = tiny(shared()), tokens(3, 12)
    cache = model.cache(rows=3, capacity=12)
    found = torch.cat([model(Inputs(part, cache=cache)).logits for part in x.split(chunks, 1)], 1)
    torch.testing.assert_close(found, model(x).logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_rows_documents_and_rollback():
    model, x = tiny(shared()), tokens(3, 9)
    segments = segments_of([[9], [4, 3], [-2, 6]], 9)
    packed = model(Inputs(x, segments=segments)).logits
    for row, name in ((0, 0), (1, 0), (1, 1), (2, 1)):
        at = segments[row] == name
        torch.testing.assert_close(packed[row, at], model(x[row, at][None]).logits[0], rtol=0, atol=2e-5)
    cache = model.cache(rows=3, capacity=12, rollback=2)
    model(Inputs(x[:, :5], cache=cache))
    expected = model(Inputs(x[:, 5:7], cache=cache)).logits
    cache.drop_last(2)
    torch.testing.assert_close(model(Inputs(x[:, 5:7], cache=cache)).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.concept("X.01", part="nn/attention.py")
def test_the_cache_is_smaller_by_the_shared_part():
    """Half of six layers borrow, of two widths: exactly theirs is saved, in what is counted and in what is allocated."""
    spec = shared(layers=("full", "full", "full_too", "full", "full_too", "full_too"))
    alike = shared(layers=("full",) * 6)
    a, b = tiny(spec), tiny(alike)
    assert sum(count.cache_bytes(a)) * 2 == sum(count.cache_bytes(b)) > 0
    assert a.cache(rows=2, capacity=10).bytes * 2 == b.cache(rows=2, capacity=10).bytes
    assert [n == 0 for n in count.cache_bytes(a)] == [False, False, True, False, True, True]
    saved = count.parameters(b).total - count.parameters(a).total
    assert saved == 3 * (2 * DIM * 2 * 8 + 8)  # k and v maps, and the norm of keys


@pytest.mark.concept("X.01", part="nn/attention.py")
def test_the_nearest_earlier_layer_lends_and_is_trained_by_who_borrows():
    model = tiny(shared()).train()
    for layer in (1, 2):  # nothing of the lenders but keys and values reaches the end
        model.layers[layer].mixer.out.weight.data.zero_()
        model.layers[layer].mixer.out.weight.requires_grad_(False)
    model(tokens(2, 8)).logits.square().mean().backward()
    k = [model.layers[index].mixer.inp.k.weight.grad.abs().sum().item() for index in (0, 1, 2)]
    assert k[0] > 0 and k[1] == 0 and k[2] > 0


@pytest.mark.concept("X.01", part="nn/attention.py")
@pytest.mark.parametrize("policy", [Recompute(), Recompute(every=4), Recompute(only="mixer"), Recompute(only="ffn")], ids=str)
def test_checkpointing_recomputes_what_was_lent(policy):
    model, x = tiny(shared()).train(), tokens(2, 9)
    segments = segments_of([[4, 5], [7]], 9)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(Inputs(x, segments=segments)).logits[segments >= 0].square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    model.recompute = policy
    found = gradients()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_spec_that_cannot_be_is_refused():
    again = validate(Transformer, json.loads(shared().canonical()))
    assert again == shared()
    with pytest.raises(ConfigError, match="no layer before it"):
        build(shared(layers=("full_too", "full")))
