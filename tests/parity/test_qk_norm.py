"""QK-norm layer by layer against Qwen3's and AFMoE's attention, the bound that it sets on scores, and a whole AFMoE (Arcee
Trinity) of dense layers: windows with rotary positions, global layers without any, gates, sandwich norms."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.afmoe.modeling_afmoe import AfmoeAttention, AfmoeRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from tests.parity import hf
from tests.parity.harness import cached_greedy
from trivium.models.block import Block
from trivium.models.transformer import Transformer, build
from trivium.nn.attention import Attention
from trivium.nn.embeddings import Tokens
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS
from trivium.nn.patterns import Full, Window
from trivium.nn.positions import Rope
from trivium.nn.step import Step

SIZES = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 0.01}
ROPE = {"rope_type": "default", "rope_theta": 50.0}
OURS = {
    "q_proj": "inp.q", "k_proj": "inp.k", "v_proj": "inp.v", "gate_proj": "inp.gate", "o_proj": "out",
    "q_norm": "norms.q", "k_norm": "norms.k",
}  # fmt: skip


def qwen3(local: bool, bias: bool):
    config = transformers.Qwen3Config(
        **SIZES, attention_bias=bias, rope_parameters=dict(ROPE), num_hidden_layers=1, use_sliding_window=local, sliding_window=4,
        max_window_layers=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    spec = Attention(
        heads=6, kv_heads=2, head_dim=10, bias=("q", "k", "v", "out") if bias else (), qk_norm=RMS(eps=0.01), position=Rope(base=50.0),
        pattern=Window(size=4) if local else Full(),
    )  # fmt: skip
    return Qwen3Attention(config, 0), Qwen3RotaryEmbedding(config), spec


def afmoe(local: bool, bias: bool):
    config = transformers.AfmoeConfig(
        **SIZES, attention_bias=bias, rope_parameters=dict(ROPE), num_hidden_layers=1, sliding_window=4,
        layer_types=["sliding_attention" if local else "full_attention"],
    )  # fmt: skip
    config._attn_implementation = "eager"
    spec = Attention(
        heads=6, kv_heads=2, head_dim=10, bias=("q", "k", "v", "out") if bias else (), qk_norm=RMS(eps=0.01, round_first=False),
        position=Rope(base=50.0) if local else None, pattern=Window(size=4) if local else Full(), gate="channel",
    )  # fmt: skip
    return AfmoeAttention(config, 0), AfmoeRotaryEmbedding(config), spec


@pytest.mark.concept("T01.09", part="nn/attention.py")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("local", [False, True], ids=["global", "window"])
@pytest.mark.parametrize("make", [qwen3, afmoe])
def test_one_layer_with_copied_weights(make, local, bias):
    theirs, rotary, spec = make(local, bias)
    hf.redraw(theirs, seed=0)
    ours = spec.build(24)
    ours.load_state_dict(renamed(theirs.state_dict()))
    x = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(1))
    distance = torch.arange(11)[:, None] - torch.arange(11)
    hidden = (distance < 0) | (distance >= 4 if local else distance < 0)
    mask = torch.zeros(11, 11).masked_fill(hidden, -torch.inf)[None, None]
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, _ = theirs(hidden_states=a, position_embeddings=rotary(a, torch.arange(11)[None]), attention_mask=mask)
    step = Step.begin(Inputs(torch.zeros(2, 11, dtype=torch.int64)), causal=True)
    found = ours(b, step, step.handle(0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-4)
    theirs_grad = renamed({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_grad[name], rtol=1e-5, atol=2e-4)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = ((name.rpartition("."), value) for name, value in state.items())
    return {f"{OURS[module]}.{leaf}": value for (module, _, leaf), value in parts}


@pytest.mark.concept("T01.09", part="nn/attention.py")
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_scores_are_bounded_by_the_norms_scale(size):
    """|q . k| / sqrt(D) <= scale_q scale_k sqrt(D), however large the input's maps grow; without the norm nothing bounds it."""
    scale, dim = 1.7, 10
    x = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(1))
    step = Step.begin(Inputs(torch.zeros(2, 50, dtype=torch.int64)), causal=True)
    largest = []
    for norm in (RMS(eps=1e-6), None):
        layer = Attention(heads=6, kv_heads=6, head_dim=dim, qk_norm=norm, position=Rope(base=50.0)).build(24)
        hf.redraw(layer, seed=0)
        with torch.no_grad():
            for name in "qk":
                layer.inp.get_submodule(name).weight.mul_(size)
                if norm is not None:
                    layer.norms[name].weight.fill_(scale)
            given = dict(zip(layer.inp.names, layer.inp(x, step), strict=True))
            q, k = (layer._heads(given[name], name, step) for name in "qk")
            largest.append((q @ k.mT * layer.scale).abs().max().item())
    bound = scale**2 * dim**0.5
    assert 0.5 * bound < largest[0] <= bound * (1 + 1e-5)
    assert largest[1] > size


@pytest.mark.concept("T02.06", part="nn/attention.py")
@pytest.mark.concept("T01.09", part="nn/attention.py")
def test_a_whole_trinity_of_dense_layers():
    theirs = transformers.AfmoeForCausalLM._from_config(
        transformers.AfmoeConfig(
            **SIZES, vocab_size=61, intermediate_size=40, num_hidden_layers=4, num_dense_layers=4, sliding_window=7, mup_enabled=True,
            global_attn_every_n_layers=2, rope_parameters=dict(ROPE), max_position_embeddings=64,
        ),
        attn_implementation="eager",
    ).eval()  # fmt: skip
    hf.redraw(theirs, seed=0)
    norm = RMS(eps=0.01, round_first=False)
    blocks = {
        name: Block(
            mixer=Attention(heads=6, kv_heads=2, head_dim=10, qk_norm=norm, gate="channel", position=position, pattern=pattern),
            ffn=MLP(hidden=40), norm=norm, norm_at="sandwich",
        )
        for name, position, pattern in (("local", Rope(base=50.0), Window(size=7)), ("whole", None, Full()))
    }  # fmt: skip
    spec = Transformer(dim=24, vocab=61, layers="2*(local whole)", blocks=blocks, embed=Tokens(scale=24**0.5), final_norm=norm)
    model = build(spec, device="cpu")
    names = {
        "input_layernorm": "mixer_norm", "post_attention_layernorm": "mixer_out_norm", "pre_mlp_layernorm": "ffn_norm",
        "post_mlp_layernorm": "ffn_out_norm", "mlp.gate_proj": "ffn.inp.gate", "mlp.up_proj": "ffn.inp.up", "mlp.down_proj": "ffn.out",
        **{f"self_attn.{theirs}": f"mixer.{mine}" for theirs, mine in OURS.items()},
    }  # fmt: skip
    state = {}
    for name, value in theirs.state_dict().items():
        if name.startswith("model.layers."):
            _, _, index, inner = name.removesuffix(".weight").split(".", 3)
            state[f"layers.{index}.{names[inner]}.weight"] = value
        else:
            state[
                {"model.embed_tokens": "embed", "model.norm": "final_norm", "lm_head": "head.out"}[name.removesuffix(".weight")] + ".weight"
            ] = value
    model.load_state_dict(state)
    model.eval()
    x = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x).logits, hf.logits(theirs, x), rtol=0, atol=1e-4)
    assert torch.equal(cached_greedy(model, x[:, :9], 12), hf.greedy(theirs, x[:, :9], 12))
