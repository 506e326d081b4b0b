"""The families `gemma2` and `gemma3_text`: local and global layers by turns, four norms a layer, scaled embeddings.

Norms add one to their weight and round last. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys instead, and gives
local and global layers each a rotary base of their own; bidirectional, it is EmbeddingGemma's body. arXiv:2408.00118,
arXiv:2503.19786.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec, validate
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.activations import GELU, Activation, ReLU, SiLU
from ...nn.attention import Attention, Scores
from ...nn.embeddings import Tokens
from ...nn.feedforward import MLP
from ...nn.heads import LMHead
from ...nn.norms import RMS
from ...nn.patterns import Full, Window
from ...nn.positions import Rope
from . import families, rope
from .llama import NAMES, Llama

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_pytorch_tanh": GELU(approximate="tanh"),
    "gelu": GELU(),
    "relu": ReLU(),
    "silu": SiLU(),
}
CARRIED = {
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "attention_dropout": 0.0,
}
LEGACY = frozenset(
    {"cache_implementation", "hidden_act", "sliding_window_pattern"}
)  # early versions wrote them; the last stands for a list
BASES = {FULL: 1_000_000.0, SLIDING: 10_000.0}


class Gemma2Keys(Spec):
    vocab_size: int = Field(256000, gt=0)
    hidden_size: int = Field(2304, gt=0)
    intermediate_size: int = Field(9216, gt=0)
    num_hidden_layers: int = Field(26, gt=0, le=10_000)
    num_attention_heads: int = Field(8, gt=0)
    num_key_value_heads: int = Field(4, gt=0)
    head_dim: int = Field(256, gt=0)
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = Field(8192, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any]
    attention_bias: bool = False
    query_pre_attn_scalar: float = Field(256, gt=0)
    sliding_window: int | None = Field(4096, gt=0)
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...]
    final_logit_softcapping: float | None = Field(30.0, gt=0)
    attn_logit_softcapping: float | None = Field(50.0, gt=0)
    use_bidirectional_attention: Literal[False] | None = None


class Gemma3Keys(Gemma2Keys):
    vocab_size: int = Field(262208, gt=0)
    max_position_embeddings: int = Field(131072, gt=0)
    final_logit_softcapping: float | None = Field(None, gt=0)
    attn_logit_softcapping: None = None  # transformers' Gemma 3 reads it and caps nothing
    use_bidirectional_attention: bool | None = False  # type: ignore[assignment]


class Gemma2(Llama):
    """Gemma 2."""

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    keys: ClassVar[type[Gemma2Keys]] = Gemma2Keys
    carried: ClassVar[Mapping[str, Any]] = CARRIED
    spelled = ("rope_parameters", "sliding_window", "use_bidirectional_attention")
    names = {
        **NAMES,
        "post_attention_layernorm": "mixer_out_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "ffn_out_norm",
    }
    every: ClassVar[int] = 2  # one layer in so many is global, where a file does not list them

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return rope.modernize(self._with_types(config))

    def _with_types(self, config: Mapping[str, Any]) -> dict[str, Any]:
        config = dict(config)
        every = config.get("sliding_window_pattern", self.every)
        layers = config.get("num_hidden_layers", self.keys.model_fields["num_hidden_layers"].default)
        if config.get("layer_types") is None and isinstance(layers, int) and isinstance(every, int) and every > 0 and layers <= 10_000:
            config["layer_types"] = [SLIDING if (i + 1) % every else FULL for i in range(layers)]
        return config

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def spec(self, keys: Any) -> Transformer:
        if len(keys.layer_types) != keys.num_hidden_layers:
            raise ConfigError(
                f"config.json: layer_types lists {len(keys.layer_types)} layers, num_hidden_layers says {keys.num_hidden_layers}",
                field="layer_types",
            )
        if keys.sliding_window is None and SLIDING in keys.layer_types:
            raise ConfigError("config.json: layer_types has sliding attention, and sliding_window gives no size", field="sliding_window")
        made = {kind: self._block(keys, kind) for kind in dict.fromkeys(keys.layer_types)}
        names = {kind: "layer" if len(made) == 1 else f"layer{number}" for number, kind in enumerate(made)}
        return Transformer(
            dim=keys.hidden_size,
            vocab=keys.vocab_size,
            layers=tuple(names[kind] for kind in keys.layer_types),
            blocks={names[kind]: block for kind, block in made.items()},
            embed=Tokens(scale=keys.hidden_size**0.5),
            head=LMHead(tied=keys.tie_word_embeddings, softcap=keys.final_logit_softcapping),
            final_norm=_norm(keys),
            causal=not keys.use_bidirectional_attention,
            context=keys.max_position_embeddings,
        )

    def _block(self, keys: Any, kind: str) -> Block:
        if keys.hidden_activation not in ACTIVATIONS:
            raise ConfigError(
                f"config.json: hidden_activation {keys.hidden_activation!r} is not supported (known: {', '.join(ACTIVATIONS)})",
                field="hidden_activation",
                choices=ACTIVATIONS,
            )
        window = keys.sliding_window // 2 + 1 if keys.use_bidirectional_attention and keys.sliding_window else keys.sliding_window
        attention = {
            "heads": keys.num_attention_heads,
            "kv_heads": keys.num_key_value_heads,
            "head_dim": keys.head_dim,
            "bias": ("q", "k", "v", "out") if keys.attention_bias else (),
            "position": self.position(keys, kind),
            "pattern": Full() if kind == FULL else Window(size=window),
            "scores": Scores(scale=keys.query_pre_attn_scalar**-0.5, softcap=keys.attn_logit_softcapping),
            "qk_norm": self.qk_norm(keys),
        }
        mlp = MLP(hidden=keys.intermediate_size, activation=ACTIVATIONS[keys.hidden_activation])
        return Block(mixer=validate(Attention, attention, where="config.json"), ffn=mlp, norm=_norm(keys), norm_at="sandwich")

    def position(self, keys: Any, kind: str) -> Rope:
        """The positions of layers of this type."""
        return rope.to_rope(keys.rope_parameters, positions=keys.max_position_embeddings)

    def qk_norm(self, keys: Any) -> RMS | None:
        """The norm of queries and keys."""
        return None

    def values(self, spec: Transformer) -> dict[str, Any]:
        blocks = [spec.blocks[name] for name in spec.layers]
        mixers = [block.mixer for block in blocks if isinstance(block.mixer, Attention) and isinstance(block.mixer.position, Rope)]
        mlp = blocks[0].ffn
        if len(mixers) < len(blocks) or not isinstance(mlp, MLP) or not isinstance(spec.head, LMHead):
            raise self.cannot("each layer must be attention with rotary positions, then an mlp")
        sizes = {mixer.pattern.size for mixer in mixers if isinstance(mixer.pattern, Window)}
        if len(sizes) > 1:
            raise self.cannot(f"its windows must be of one size, not {', '.join(map(str, sorted(sizes)))}")
        first, window = mixers[0], next(iter(sizes), None)
        scale = first.head_dim**-0.5 if first.scores.scale is None else first.scores.scale
        return {
            "vocab_size": spec.vocab,
            "hidden_size": spec.dim,
            "intermediate_size": mlp.hidden,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": first.heads,
            "num_key_value_heads": first.kv_heads,
            "head_dim": first.head_dim,
            "hidden_activation": next((name for name, one in ACTIVATIONS.items() if one == mlp.activation), "gelu_pytorch_tanh"),
            "max_position_embeddings": spec.context or 8192,
            "rms_norm_eps": spec.final_norm.eps if isinstance(spec.final_norm, RMS) else 1e-6,
            "tie_word_embeddings": spec.head.tied,
            "attention_bias": bool(first.bias),
            "query_pre_attn_scalar": _whole(scale**-2),
            "sliding_window": window if window is None or spec.causal else 2 * (window - 1),
            "layer_types": [SLIDING if isinstance(mixer.pattern, Window) else FULL for mixer in mixers],
            "final_logit_softcapping": spec.head.softcap,
            "attn_logit_softcapping": first.scores.softcap,
            "use_bidirectional_attention": self.said_of_direction(spec),
            "rope_parameters": self.rope_values(mixers),
        }

    def said_of_direction(self, spec: Transformer) -> bool | None:
        """`use_bidirectional_attention`."""
        if not spec.causal:
            raise self.cannot("its attention must be causal")
        return None

    def rope_values(self, mixers: Sequence[Attention]) -> dict[str, Any]:
        """The rotary parameters that say the layers' positions."""
        assert isinstance(mixers[0].position, Rope)
        return rope.from_rope(mixers[0].position)


class Gemma3(Gemma2):
    """Gemma 3, text alone."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    keys = Gemma3Keys
    carried = {**CARRIED, "_sliding_window_pattern": 6}
    names = {
        **Gemma2.names,
        "self_attn.q_norm": "mixer.norms.q",
        "self_attn.k_norm": "mixer.norms.k",
    }
    every = 6

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        config = self._with_types(config)
        given = config.pop("rope_parameters", None) or {}
        if not isinstance(given, Mapping) or set(given) - set(BASES):
            raise ConfigError(
                f"config.json: rope_parameters must have {FULL} and {SLIDING} alone, got {given!r:.80}", field="rope_parameters"
            )
        older = {FULL: ("rope_theta", config.pop("rope_scaling", None) or {}), SLIDING: ("rope_local_base_freq", {})}
        made = {}
        for kind, (key, scaling) in older.items():
            base, own = config.pop(key, BASES[kind]), {**(given.get(kind) or {}), **scaling}
            part = {"rope_parameters": own, "max_position_embeddings": config.get("max_position_embeddings")}
            made[kind] = rope.modernize(part, theta=base)["rope_parameters"]
        return {**config, "rope_parameters": made}

    def position(self, keys: Any, kind: str) -> Rope:
        return rope.to_rope(keys.rope_parameters[kind], positions=keys.max_position_embeddings)

    def qk_norm(self, keys: Any) -> RMS | None:
        return _norm(keys)

    def said_of_direction(self, spec: Transformer) -> bool:
        return not spec.causal

    def rope_values(self, mixers: Sequence[Attention]) -> dict[str, Any]:
        found = {FULL if isinstance(mixer.pattern, Full) else SLIDING: mixer.position for mixer in mixers}
        return {
            kind: rope.from_rope(position if isinstance(position := found.get(kind), Rope) else Rope(base=base))
            for kind, base in BASES.items()
        }


def _norm(keys: Any) -> RMS:
    return RMS(eps=keys.rms_norm_eps, offset=1.0, round_first=False)


def _whole(value: float) -> float:
    """A number that was whole before it was a root."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


for _family in (Gemma2(), Gemma3()):
    families.add(_family.model_type, _family)
