"""The family `olmo2`: as Llama, but each sublayer's output is normed rather than its input, and so are queries and keys, all
heads together. arXiv:2501.00656."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.norms import RMS
from . import families
from .llama import NAMES, Keys, Llama, attention, mlp, parts, shared_values, stack, without_implied


class Olmo2Keys(Keys):
    vocab_size: int = Field(50304, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    attention_bias: bool = False


class Olmo2(Llama):
    """OLMo 2."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    keys = Olmo2Keys
    carried = {
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "attention_dropout": 0.0,
    }
    names = {
        **{name: ours for name, ours in NAMES.items() if "norm" not in name},
        "self_attn.q_norm": "mixer.norms.q",
        "self_attn.k_norm": "mixer.norms.k",
        "post_attention_layernorm": "mixer_norm",
        "post_feedforward_layernorm": "ffn_norm",
    }

    def spec(self, keys: Any) -> Transformer:
        norm = RMS(eps=keys.rms_norm_eps, round_first=False)
        fields = {"bias": ("q", "k", "v", "out") if keys.attention_bias else (), "qk_norm": norm, "qk_norm_over": "projection"}
        block = Block(mixer=attention(keys, fields), ffn=mlp(keys), norm=norm, norm_at="reordered")
        return stack(keys, [block] * keys.num_hidden_layers).replace(final_norm=norm)

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, mlp = parts(self, spec)
        values = {**shared_values(spec, attention, mlp), "attention_bias": bool(attention.bias)}
        return without_implied(values)


families.add(Olmo2.model_type, Olmo2())
