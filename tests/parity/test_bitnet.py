"""transformers' BitNet b1.58 against ours: a Llama-shaped model under two passes, one of which carries the norms that BitNet
has before `o_proj` and `down_proj`. In fp32, every parameter redrawn; its linear maps are rounded online, as in training.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.integrations import bitnet
from transformers.utils.quantization_config import BitNetQuantConfig

from tests.parity import hf
from trivium.adapt.low_bit import LowBit, pack_weights
from trivium.models.block import Block
from trivium.models.transformer import Transformer, TransformerModel, build
from trivium.nn.activations import SiLU, SquaredReLU
from trivium.nn.attention import Attention
from trivium.nn.feedforward import MLP
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS
from trivium.nn.positions import Rope

TABLE: dict[str, dict[str, Any]] = {
    "grouped": {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "hidden_act": "relu2", "rms_norm_eps": 0.01, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "biases-tied": {
        "vocab_size": 89, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 5,
        "num_key_value_heads": 5, "hidden_act": "silu", "rms_norm_eps": 0.05, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "attention_bias": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
TOLERANCE = 1e-4  # of the logits' standard deviation
NAMES = {
    "input_layernorm": "mixer_norm", "self_attn.q_proj": "mixer.inp.q", "self_attn.k_proj": "mixer.inp.k",
    "self_attn.v_proj": "mixer.inp.v", "self_attn.o_proj": "mixer.out", "self_attn.attn_sub_norm": "mixer.out.norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn.inp.gate", "mlp.up_proj": "ffn.inp.up",
    "mlp.down_proj": "ffn.out", "mlp.ffn_sub_norm": "ffn.out.norm",
}  # fmt: skip


@pytest.fixture(scope="module", params=TABLE)
def pair(request) -> tuple[transformers.PreTrainedModel, TransformerModel]:
    torch.manual_seed(0)
    config = transformers.BitNetConfig(pad_token_id=None, bos_token_id=1, eos_token_id=2, **TABLE[request.param])
    theirs = transformers.BitNetForCausalLM._from_config(config, attn_implementation="eager").eval()
    rounding = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    bitnet.replace_with_bitnet_linear(theirs, modules_to_not_convert=["lm_head"], quantization_config=rounding)
    hf.redraw(theirs, seed=0)
    return theirs, ours(theirs)


def ours(theirs: transformers.PreTrainedModel) -> TransformerModel:
    config = theirs.config
    norm = RMS(eps=config.rms_norm_eps)
    attention = Attention(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        bias=("q", "k", "v", "out") if config.attention_bias else (),
        position=Rope(base=config.rope_parameters["rope_theta"]),
    )
    mlp = MLP(hidden=config.intermediate_size, activation=SquaredReLU() if config.hidden_act == "relu2" else SiLU())
    spec = Transformer(
        dim=config.hidden_size,
        vocab=config.vocab_size,
        layers=("layer",) * config.num_hidden_layers,
        blocks={"layer": Block(mixer=attention, ffn=mlp, norm=norm)},
        head=LMHead(tied=config.tie_word_embeddings),
        final_norm=norm,
    )
    model = build(spec)
    LowBit(targets=("q", "k", "v", "gate", "up")).apply(model)
    LowBit(targets=("mixer.out", "ffn.out"), norm=norm).apply(model)
    state = {}
    for name, tensor in theirs.named_parameters():
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        if module.startswith("layers."):
            _, layer, inside = module.split(".", 2)
            module = f"layers.{layer}.{NAMES[inside]}"
        state[f"{({'embed_tokens': 'embed', 'norm': 'final_norm', 'lm_head': 'head.out'}).get(module, module)}.{leaf}"] = (
            tensor.detach().clone()
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


@torch.no_grad()
def expected(theirs: transformers.PreTrainedModel, x: torch.Tensor) -> torch.Tensor:
    with torch.compiler.set_stance("force_eager"):
        return hf.logits(theirs, x)


def tokens(model: TransformerModel) -> torch.Tensor:
    return torch.randint(0, model.spec.vocab, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def off(model: TransformerModel, logits: torch.Tensor) -> float:
    return ((model(tokens(model)).logits - logits).abs().max() / logits.std()).item()


@pytest.mark.concept("X.27", part="adapt/low_bit.py")
def test_logits(pair):
    theirs, model = pair
    logits = expected(theirs, tokens(model))
    assert 0.5 < logits.std() < 5
    assert off(model, logits) < TOLERANCE


@pytest.mark.concept("X.27", part="adapt/low_bit.py")
def test_every_tensor_matters(pair):
    theirs, model = pair
    logits, generator = expected(theirs, tokens(model)), torch.Generator().manual_seed(0)
    for name, parameter in model.requires_grad_(False).named_parameters():
        before = parameter.clone()
        parameter.add_(0.3 * torch.randn(before.shape, generator=generator))
        assert off(model, logits) > 10 * TOLERANCE, name
        parameter.copy_(before)
    assert off(model, logits) < TOLERANCE


@pytest.mark.concept("X.27", part="nn/low_bit.py")
def test_packed_and_with_a_cache(pair):
    theirs, model = pair
    x = tokens(model)
    logits = expected(theirs, x)
    packed = pack_weights(ours(theirs))
    assert off(packed, logits) < TOLERANCE
    with torch.inference_mode():
        cache = packed.cache(rows=2, capacity=20)
        pieces = torch.cat([packed(Inputs(part, cache=cache)).logits for part in x.split((13, 1, 6), 1)], 1)
    assert (pieces - logits).abs().max() / logits.std() < TOLERANCE
