"""The families `qwen2` (Qwen 2 and 2.5) and `qwen3`: as Llama, with a window in the upper layers where a config asks for one.

Qwen 2 has biases on queries, keys and values; Qwen 3 norms each head's queries and keys in their place.
arXiv:2407.10671, arXiv:2412.15115, arXiv:2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.attention import Attention
from ...nn.norms import RMS
from ...nn.patterns import Full, Pattern, Window
from . import Family, families
from .llama import NAMES, Keys, Llama, attention, mlp, shared_values, stack, turning, without_implied

FULL, SLIDING = "full_attention", "sliding_attention"
CARRIED = {
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}


class WindowKeys(Keys):
    """What families read whose layers may have a window."""

    use_sliding_window: bool = False
    sliding_window: int | None = Field(4096, gt=0)
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None


class Qwen2Keys(WindowKeys):
    vocab_size: int = Field(151936, gt=0)
    intermediate_size: int = Field(22016, gt=0)
    num_key_value_heads: int | None = Field(32, gt=0)
    max_position_embeddings: int = Field(32768, gt=0)
    max_window_layers: int = Field(28, ge=0)


class Qwen3Keys(Qwen2Keys):
    head_dim: int | None = Field(128, gt=0)
    attention_bias: bool = False


class Qwen2(Llama):
    """Qwen 2 and 2.5, dense."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    keys = Qwen2Keys
    carried: ClassVar[Mapping[str, Any]] = CARRIED
    spelled = ("rope_parameters", "max_window_layers")

    def spec(self, keys: Any) -> Transformer:
        return self.of(keys, {"bias": ("q", "k", "v")})

    def of(self, keys: Any, fields: Mapping[str, Any]) -> Transformer:
        """The spec whose attention has these fields."""
        norm, ffn = RMS(eps=keys.rms_norm_eps), mlp(keys)
        upper = [SLIDING if i >= keys.max_window_layers else FULL for i in range(keys.num_hidden_layers)]
        mixers = [attention(keys, {**fields, "pattern": pattern}) for pattern in patterns(keys, upper)]
        return stack(keys, [Block(mixer=mixer, ffn=ffn, norm=norm) for mixer in mixers])

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, mlp = turning(self, spec)
        values = {**shared_values(spec, attention, mlp), **window_values(self, spec), "max_window_layers": 28}
        return without_implied(values)


class Qwen3(Qwen2):
    """Qwen 3, dense."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    keys = Qwen3Keys
    names = {**NAMES, "self_attn.q_norm": "mixer.norms.q", "self_attn.k_norm": "mixer.norms.k"}

    def spec(self, keys: Any) -> Transformer:
        return self.of(keys, {"bias": ("q", "k", "v", "out") if keys.attention_bias else (), "qk_norm": RMS(eps=keys.rms_norm_eps)})

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, _ = turning(self, spec)
        return {**super().values(spec), "head_dim": attention.head_dim, "attention_bias": bool(attention.bias)}


def patterns(keys: WindowKeys, default: Sequence[str]) -> list[Pattern]:
    """Each layer's pattern. `default`: the layers' types where the config does not list them and has a window."""
    window = keys.sliding_window if keys.use_sliding_window else None
    types = keys.layer_types or (default if window is not None else [FULL] * keys.num_hidden_layers)
    if len(types) != keys.num_hidden_layers:
        raise ConfigError(
            f"config.json: layer_types lists {len(types)} layers, num_hidden_layers says {keys.num_hidden_layers}", field="layer_types"
        )
    if window is None and SLIDING in types:
        raise ConfigError(
            f"config.json: layer_types has {SLIDING!r} layers, but there is no window (use_sliding_window)", field="layer_types"
        )
    return [Window(size=window) if kind == SLIDING and window is not None else Full() for kind in types]


def window_values(family: Family, spec: Transformer) -> dict[str, Any]:
    """The keys that say the layers' patterns. Raises `ConfigError` where they differ by more than one window."""
    mixers = [spec.blocks[name].mixer for name in spec.layers]
    found = [mixer.pattern for mixer in mixers if isinstance(mixer, Attention)]
    sizes = {pattern.size for pattern in found if isinstance(pattern, Window)}
    if len(sizes) > 1:
        raise family.cannot(f"its layers have windows of several sizes ({', '.join(map(str, sorted(sizes)))})")
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": next(iter(sizes), None),
        "layer_types": [SLIDING if isinstance(pattern, Window) else FULL for pattern in found],
    }


for _family in (Qwen2(), Qwen3()):
    families.add(_family.model_type, _family)
