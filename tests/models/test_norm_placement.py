"""Where norms stand, each place against a layer of torch's or transformers' with the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, Olmo2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer

from tests.nn.test_parts import apart_with_gradients, draw
from tests.parity.hf import redraw as redraw_wide
from tests.tiny import host, redraw, tiny, tokens
from trivium.models.block import Block, Layer
from trivium.models.transformer import Transformer, build, initialize
from trivium.nn.activations import GELU, ReLU
from trivium.nn.attention import Attention, Place
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS
from trivium.nn.norms import Layer as LayerNorm
from trivium.nn.positions import Rope
from trivium.nn.residual import Plain
from trivium.nn.step import Step

pytestmark = pytest.mark.concept("T17.03", part="models/block.py")
LLAMA_NAMES = {
    "mixer.inp.q": "self_attn.q_proj", "mixer.inp.k": "self_attn.k_proj", "mixer.inp.v": "self_attn.v_proj", "mixer.out": "self_attn.o_proj",
    "ffn.inp.gate": "mlp.gate_proj", "ffn.inp.up": "mlp.up_proj", "ffn.out": "mlp.down_proj",
}  # fmt: skip


@torch.no_grad()
def redraw_theirs(module: nn.Module) -> None:
    """Every parameter anew, matrices small enough that values stay near 1 and differences are those of rounding."""
    redraw_wide(module, seed=0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(0.4)


def run(layer: Layer, x: torch.Tensor, *, causal: bool) -> torch.Tensor:
    step = Step.begin(Inputs(torch.zeros(x.shape[:2], dtype=torch.int64)), causal=causal)
    return layer(x, step)


def load(layer: Layer, theirs: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
    layer.load_state_dict(
        {
            f"{mine}.{leaf}": theirs[key]
            for mine, name in names.items()
            for leaf in ("weight", "bias")
            if (key := f"{name}.{leaf}") in theirs
        }
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_pre_and_post_are_torchs(norm_first, activation):
    theirs = nn.TransformerEncoderLayer(
        24, 4, 40, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first, layer_norm_eps=1e-3
    )
    redraw_theirs(theirs)
    block = Block(
        mixer=Attention(heads=4, kv_heads=4, head_dim=6, bias=("q", "k", "v", "out")),
        ffn=MLP(hidden=40, activation=ReLU() if activation == "relu" else GELU(), gated=False, bias=True),
        norm=LayerNorm(eps=1e-3),
        norm_at="pre" if norm_first else "post",
    )
    layer, state = block.build(24, Place()), theirs.state_dict()
    for leaf in ("weight", "bias"):
        for part, rows in zip("qkv", state[f"self_attn.in_proj_{leaf}"].chunk(3), strict=True):
            state[f"{part}.{leaf}"] = rows
    names = {"mixer_norm": "norm1", "mixer.out": "self_attn.out_proj", "ffn_norm": "norm2", "ffn.inp.up": "linear1", "ffn.out": "linear2"}
    load(layer, state, names | {f"mixer.inp.{part}": part for part in "qkv"})
    assert apart_with_gradients(lambda x: run(layer, x, causal=False), theirs, draw(2, 9, 24)) <= 1e-6
    for name, other in names.items():
        for leaf in ("weight", "bias"):
            a, b = layer.get_parameter(f"{name}.{leaf}").grad, theirs.get_parameter(f"{other}.{leaf}").grad
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    other_place = Block(**{**dict(block), "norm_at": "post" if norm_first else "pre"}).build(24, Place())
    other_place.load_state_dict(layer.state_dict())
    x = draw(2, 9, 24)
    assert (run(other_place, x, causal=False) - theirs(x)).abs().max() > 0.1


def transformers_layer(kind: type[nn.Module], config: object, x: torch.Tensor) -> tuple[nn.Module, object]:
    """The layer, redrawn, and a function of the stream alone."""
    config._attn_implementation = "eager"
    theirs = kind(config, 0).eval()
    redraw_theirs(theirs)
    count = x.shape[1]
    turns = LlamaRotaryEmbedding(config)(x, torch.arange(count)[None])
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    return theirs, lambda y: theirs(y, attention_mask=mask, position_embeddings=turns)


SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-3,
}


def test_reordered_is_olmo2s():
    """But for OLMo 2's norms of queries and keys, which are taken out."""
    x = draw(2, 9, 24)
    config = Olmo2Config(**{**SHAPE, "head_dim": 6}, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    theirs, call = transformers_layer(Olmo2DecoderLayer, config, x)
    theirs.self_attn.q_norm = theirs.self_attn.k_norm = nn.Identity()
    attention = Attention(heads=4, kv_heads=2, head_dim=6, position=Rope(base=100.0))
    layer = Block(mixer=attention, ffn=MLP(hidden=40), norm=RMS(eps=1e-3, round_first=False), norm_at="reordered").build(24, Place())
    load(layer, theirs.state_dict(), {**LLAMA_NAMES, "mixer_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"})
    assert apart_with_gradients(lambda y: run(layer, y, causal=True), call, x) <= 1e-5


def test_sandwich_is_gemma2s():
    x = draw(2, 9, 24)
    config = Gemma2Config(
        **SHAPE, attn_logit_softcapping=None, query_pre_attn_scalar=16, layer_types=["full_attention"], num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    theirs, call = transformers_layer(Gemma2DecoderLayer, config, x)
    block = Block(
        mixer=Attention(heads=4, kv_heads=2, head_dim=8, position=Rope(base=100.0), scores={"scale": 16**-0.5}),
        ffn=MLP(hidden=40, activation=GELU(approximate="tanh")),
        norm=RMS(eps=1e-3, offset=1.0, round_first=False),
        norm_at="sandwich",
    )
    layer = block.build(24, Place())
    norms = {
        "mixer_norm": "input_layernorm",
        "mixer_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_out_norm": "post_feedforward_layernorm",
    }
    load(layer, theirs.state_dict(), LLAMA_NAMES | norms)
    assert apart_with_gradients(lambda y: run(layer, y, causal=True), call, x) <= 1e-5


def test_deep_norm_is_post_with_a_smaller_branch():
    """norm(alpha x + f(x)) = norm(x + f(x) / alpha), as a norm does not see scale (eps aside)."""
    alpha = 2.5
    block = Block(mixer=Attention(heads=4, kv_heads=2, head_dim=6), ffn=MLP(hidden=40), norm=LayerNorm(eps=1e-12), norm_at="post")
    layer = redraw(block.replace(residual=Plain(scale=1 / alpha)).build(24, Place()))
    x = draw(2, 9, 24)
    step = Step.begin(Inputs(torch.zeros(2, 9, dtype=torch.int64)), causal=True)
    middle = layer.mixer_norm(alpha * x + layer.mixer(x, step, step.handle(0)))
    expected = layer.ffn_norm(alpha * middle + layer.ffn(middle, step))
    torch.testing.assert_close(run(layer, x, causal=True), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm_at", ["pre", "post", "reordered", "sandwich"])
def test_every_place_decodes_with_a_cache(norm_at):
    spec = host(LayerNorm(eps=1e-4))
    block = spec.blocks["a"].replace(norm_at=norm_at)
    model, x = tiny(spec.replace(blocks={"a": block})), tokens(2, 9)
    cache = model.cache(rows=2, capacity=9)
    with torch.inference_mode():
        pieces = torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split([4, 1, 1, 3], 1)], 1)
        torch.testing.assert_close(pieces, model(x).logits, rtol=0, atol=2e-5)
    assert len([name for name, _ in model.layers[0].named_parameters() if "norm" in name]) == (8 if norm_at == "sandwich" else 4)


def test_at_the_start_post_norms_gradients_do_not_shrink_with_depth_and_pre_norms_do():
    """arXiv:2002.04745, theorem 1: the last layer's gradient is of order 1 with post-norm, 1 / sqrt(layers) with pre-norm."""
    norms: dict[tuple[str, int], float] = {}
    for norm_at in ("pre", "post"):
        for depth in (2, 32):
            mixer = Attention(heads=4, kv_heads=4, head_dim=8)
            block = Block(mixer=mixer, ffn=MLP(hidden=128, activation=ReLU(), gated=False), norm=LayerNorm(), norm_at=norm_at)
            final = LayerNorm() if norm_at == "pre" else {"kind": "none"}
            spec = Transformer(dim=32, vocab=61, layers=f"{depth}*a", blocks={"a": block}, final_norm=final)
            model = initialize(build(spec, device="cpu"), seed=0, std=1.0, start="xavier")
            x = tokens(4, 17)
            F.cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).backward()
            norms[norm_at, depth] = model.layers[-1].ffn.out.weight.grad.norm().item()
    assert 0.7 < norms["post", 32] / norms["post", 2] < 1.5
    assert 0.15 < norms["pre", 32] / norms["pre", 2] < 0.45  # sqrt(2 / 32) = 0.25
