"""Latent attention: transformers' DeepSeek attention weight by weight, its two forms, what its cache takes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from tests.parity.hf import redraw
from tests.tiny import host, segments_of, tiny, tokens
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.models import count
from trivium.models.block import Block
from trivium.models.transformer import Transformer, TransformerModel, build
from trivium.nn.attention import Attention, use_backend
from trivium.nn.inputs import Inputs
from trivium.nn.latent import LatentAttention, LatentMixer
from trivium.nn.positions import Rope
from trivium.nn.step import Step
from trivium.nn.store import Store

DIM = 27
SHAPE = {
    "hidden_size": DIM, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 10, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 8, "rope_theta": 50.0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "v2": {"version": 2, "q_lora_rank": 14},
    "v2-lite": {"version": 2, "q_lora_rank": None},
    "v3": {"version": 3, "q_lora_rank": 14, "attention_bias": True},
    "v3-halves": {"version": 3, "q_lora_rank": None, "rope_interleave": False},
}


def pair(name: str) -> tuple[Any, Any, LatentMixer]:
    """transformers' attention, redrawn, with what computes its positions, and ours of the same weights."""
    keys = dict(CASES[name])
    of_v2 = keys.pop("version") == 2
    config = (DeepseekV2Config if of_v2 else DeepseekV3Config)(**SHAPE, **keys)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = (v2.DeepseekV2Attention if of_v2 else v3.DeepseekV3Attention)(config, 0).eval()
    rotary = (v2.DeepseekV2RotaryEmbedding if of_v2 else v3.DeepseekV3RotaryEmbedding)(config)
    redraw(attention, seed=1)
    low, biased = keys["q_lora_rank"] is not None, keys.get("attention_bias", False)
    spec = LatentAttention(
        heads=3, kv_rank=10, q_rank=keys["q_lora_rank"], head_dim=6, rope_dim=4, v_dim=8, bias=("q", "kv", "rope", "out") if biased else (),
        position=Rope(base=50.0, layout="interleaved" if keys.get("rope_interleave", True) else "half"),
    )  # fmt: skip
    names = {"kv_a_layernorm": "kv_norm", "o_proj": "out", "q_proj": "inp.q"}
    names |= {"q_a_proj": "inp.q", "q_a_layernorm": "q_norm", "q_b_proj": "q_up"} if low else {}
    values = {}
    for key, value in attention.state_dict().items():
        module, leaf = key.rsplit(".", 1)
        if module == "kv_a_proj_with_mqa":
            values[f"inp.kv.{leaf}"], values[f"inp.rope.{leaf}"] = value.split([10, 4])
        elif module == "kv_b_proj":
            k, v = value.view(3, 14, 10).split([6, 8], 1)
            values |= {"up.k.weight": k.flatten(0, 1), "up.v.weight": v.flatten(0, 1)}
        else:
            values[f"{names[module]}.{leaf}"] = value
    mixer = LatentMixer(spec, DIM).eval()
    mixer.load_state_dict(values)
    return attention, rotary, mixer


def run_theirs(attention, rotary, x: torch.Tensor, start: int = 0, cache: DynamicCache | None = None) -> torch.Tensor:
    positions = torch.arange(start, start + x.shape[1])[None]
    later = torch.arange(start + x.shape[1])[None] > positions.T
    mask = torch.zeros(later.shape).masked_fill(later, float("-inf"))[None, None]
    return attention(x, attention_mask=mask, past_key_values=cache, position_embeddings=rotary(x, positions))[0]


def run_ours(mixer: LatentMixer, x: torch.Tensor, store: Store | None = None) -> torch.Tensor:
    step = Step.begin(Inputs(embeds=x, cache=store), causal=True)
    y = mixer(x, step, step.handle(0))
    step.commit()
    return y


@pytest.mark.concept("T19.02", part="nn/latent.py")
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_transformers(name, form):
    attention, rotary, mixer = pair(name)
    mixer.form = form
    x = torch.randn(2, 11, DIM, generator=torch.Generator().manual_seed(2))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    expected, found = run_theirs(attention, rotary, a), run_ours(mixer, b)
    assert expected.std() > 0.2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.concept("T19.02", part="nn/latent.py")
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_its_cache_is_transformers(name):
    attention, rotary, mixer = pair(name)
    x = torch.randn(2, 12, DIM, generator=torch.Generator().manual_seed(2))
    cache, start = DynamicCache(), 0
    store = Store([mixer.state()], rows=2, capacity=12, dtype=torch.float32, device=torch.device("cpu"))
    for piece in x.split([5, 1, 1, 4, 1], 1):
        expected = run_theirs(attention, rotary, piece, start, cache)
        torch.testing.assert_close(run_ours(mixer, piece, store), expected, rtol=0, atol=1e-5)
        start += piece.shape[1]


def formed(form: str, spec: LatentAttention | None = None) -> TransformerModel:
    model = tiny(host(spec or LatentAttention.tiny()))
    for layer in model.layers:
        layer.mixer.form = form
    return model


@pytest.mark.concept("T19.02", part="nn/latent.py")
@pytest.mark.parametrize("packed", [False, True])
def test_the_absorbed_form_is_the_expanded_one(packed):
    """Logits and every gradient."""
    x = tokens(3, 12)
    segments = segments_of([[5, 7], [-2, 9, 1], [12]], 12) if packed else None
    gradients = []
    for form in ("expanded", "absorbed"):
        model = formed(form)
        logits = model(Inputs(x, segments=segments)).logits
        real = logits if segments is None else logits[segments >= 0]
        real.square().mean().backward()
        gradients.append((real.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (a, expected), (b, found) = gradients
    torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * expected[name].std().item(), msg=name)


@pytest.mark.concept("T19.02", part="nn/latent.py")
@torch.no_grad()
def test_decoding_absorbs():
    """It is equal to what the expanded form gives, takes fewer products, and as many as were counted."""
    x, found, flops = tokens(1, 40), {}, {}
    for form in ("auto", "expanded"):
        model = formed(form)
        use_backend(model, "eager")
        cache = model.cache(rows=1, capacity=40)
        model(Inputs(x[:, :39], cache=cache))
        with FlopCounterMode(display=False) as mode:
            found[form] = model(Inputs(x[:, 39:], cache=cache)).logits
        flops[form] = mode.get_total_flops()
        assert count.decoding_flops(model, held=39) == flops[form]
    torch.testing.assert_close(found["auto"], found["expanded"], rtol=0, atol=1e-4)
    assert flops["auto"] < 0.5 * flops["expanded"]


@torch.no_grad()
def test_adapted_maps_decode_as_they_prefill():
    model, x = formed("auto"), tokens(2, 9)
    LoRA(rank=3).apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith((".A", ".B")):
            parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    cache = model.cache(rows=2, capacity=9)
    steps = torch.cat([model(Inputs(x[:, t : t + 1], cache=cache)).logits for t in range(9)], 1)
    torch.testing.assert_close(steps, model(x).logits, rtol=0, atol=1e-4)


@pytest.mark.concept("T19.02", part="nn/latent.py")
def test_a_cache_holds_the_latent_and_the_rotary_key():
    spec = LatentAttention.tiny()
    model = tiny(host(spec))
    per_token = (spec.kv_rank + spec.rope_dim) * len(model.layers)
    assert sum(count.cache_bytes(model)) == per_token * 4
    assert model.cache(rows=3, capacity=7).bytes == per_token * 4 * 3 * 7


def per_token(mixer: Attention | LatentAttention, layers: int) -> int:
    """Elements that a token takes in the cache of a model of so many layers."""
    spec = Transformer(dim=8, vocab=8, layers=("a",) * layers, blocks={"a": Block(mixer=mixer)})
    return sum(count.cache_bytes(build(spec))) // 4


@pytest.mark.concept("T19.02", part="nn/latent.py")
def test_the_published_saving_is_against_another_baseline():
    """The abstract of arXiv:2405.04434: a cache smaller by 93.3%. That is DeepSeek-V2 (60 layers) with 6 bits an element against
    DeepSeek 67B (95 layers of grouped attention, 8 kv heads) with 16. Latents alone save 82.2%; against multi-head attention
    of DeepSeek-V2's own 128 heads of 128, they save 98.2%."""
    latent = per_token(LatentAttention(heads=128, kv_rank=512, q_rank=1536, head_dim=128, rope_dim=64, v_dim=128), 60)
    grouped = per_token(Attention(heads=64, kv_heads=8, head_dim=128), 95)
    multi_head = per_token(Attention(heads=128, kv_heads=128, head_dim=128), 60)
    assert (latent, grouped, multi_head) == (34_560, 194_560, 1_966_080)
    saved = {
        "paper": 1 - Fraction(latent * 6, grouped * 16),
        "grouped": 1 - Fraction(latent, grouped),
        "heads": 1 - Fraction(latent, multi_head),
    }
    assert {name: round(float(share) * 100, 1) for name, share in saved.items()} == {"paper": 93.3, "grouped": 82.2, "heads": 98.2}
    assert latent / 60 == 4.5 * 128, "as much as grouped attention with 2.25 groups, as the paper says"


def test_keys_that_would_have_to_be_turned_again_are_refused():
    with pytest.raises(ConfigError, match="places in the cache"):
        validate(LatentAttention, {**LatentAttention.tiny().to_dict(), "pattern": {"kind": "sink_window", "size": 4, "rebase": True}})
    with pytest.raises(ConfigError, match="indexer's rope_dim"):
        LatentAttention.tiny().replace(indexer={"heads": 2, "head_dim": 4, "rope_dim": 6, "top_k": 3})
