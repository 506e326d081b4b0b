"""The family `smollm3`: as Llama, but every fourth layer (or any that a config names) has no positions at all.

arXiv:2404.12224 (no positions); such a layer may have a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ...core.errors import ConfigError
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.attention import Attention
from ...nn.norms import RMS
from . import families, rope
from .llama import Llama, attention, mlp, shared_values, stack, turning, without_implied
from .qwen import FULL, SLIDING, WindowKeys, patterns, window_values

LEGACY = frozenset({"max_window_layers", "pretraining_tp"})  # written by some, read by none


class SmolLM3Keys(WindowKeys):
    vocab_size: int = Field(128256, gt=0)
    hidden_size: int = Field(2048, gt=0)
    num_hidden_layers: int = Field(36, gt=0, le=10_000)
    num_attention_heads: int = Field(16, gt=0)
    num_key_value_heads: int | None = Field(4, gt=0)
    max_position_embeddings: int = Field(32768, gt=0)
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = Field(None, gt=0)
    no_rope_layers: tuple[int, ...] | None = Field(None, description="1 for each layer with positions, 0 for one without")
    no_rope_layer_interval: int = Field(4, gt=0)


class SmolLM3(Llama):
    """SmolLM 3."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    keys = SmolLM3Keys
    carried = {
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 128004,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "attention_dropout": 0.0,
    }
    spelled = ("rope_parameters", "no_rope_layer_interval")

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return rope.modernize(config, theta=2_000_000.0)

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def spec(self, keys: Any) -> Transformer:
        layers, interval = range(keys.num_hidden_layers), keys.no_rope_layer_interval
        turned = keys.no_rope_layers or tuple(int((i + 1) % interval != 0) for i in layers)
        if len(turned) < len(layers):
            raise ConfigError(
                f"config.json: no_rope_layers lists {len(turned)} layers, num_hidden_layers says {len(layers)}", field="no_rope_layers"
            )
        fields: dict[str, Any] = {"bias": ("q", "k", "v", "out") if keys.attention_bias else ()}
        found = patterns(keys, [FULL if turned[i] else SLIDING for i in layers])
        mixers = [
            attention(keys, {**fields, "pattern": found[i]} if turned[i] else {**fields, "pattern": found[i], "position": None})
            for i in layers
        ]
        ffn, norm = mlp(keys, bias=keys.mlp_bias), RMS(eps=keys.rms_norm_eps)
        return stack(keys, [Block(mixer=mixer, ffn=ffn, norm=norm) for mixer in mixers])

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, mlp = turning(self, spec)
        mixers = [spec.blocks[name].mixer for name in spec.layers]
        values = {
            **shared_values(spec, attention, mlp),
            **window_values(self, spec),
            "attention_bias": bool(attention.bias),
            "mlp_bias": mlp.bias,
            "no_rope_layers": [int(isinstance(mixer, Attention) and mixer.position is not None) for mixer in mixers],
            "no_rope_layer_interval": 4,
        }
        return without_implied(values)


families.add(SmolLM3.model_type, SmolLM3())
