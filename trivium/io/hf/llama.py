"""The families `llama` (Llama 1, 2, 3, SmolLM2) and `mistral`: pre-norm RMS, grouped attention, rotary positions, SwiGLU.

They differ in what their configs can say: biases in Llama's, a sliding window in Mistral's. arXiv:2302.13971,
arXiv:2407.21783, arXiv:2310.06825.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec, validate
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.activations import Activation, SiLU
from ...nn.attention import Attention
from ...nn.feedforward import MLP
from ...nn.heads import LMHead
from ...nn.norms import RMS
from ...nn.patterns import Full, Pattern, Window
from ...nn.positions import Rope
from ..rules import Drop, Rename, Rule
from . import Family, families, rope

ACTIVATIONS: Mapping[str, Activation] = {"silu": SiLU()}
CARRIED = {
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}


NAMES = {
    "input_layernorm": "mixer_norm",
    "self_attn.q_proj": "mixer.inp.q",
    "self_attn.k_proj": "mixer.inp.k",
    "self_attn.v_proj": "mixer.inp.v",
    "self_attn.o_proj": "mixer.out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn.inp.gate",
    "mlp.up_proj": "ffn.inp.up",
    "mlp.down_proj": "ffn.out",
}


class Keys(Spec):
    """What both families read from config.json."""

    vocab_size: int = Field(32000, gt=0)
    hidden_size: int = Field(4096, gt=0)
    intermediate_size: int = Field(11008, gt=0)
    num_hidden_layers: int = Field(32, gt=0, le=10_000)
    num_attention_heads: int = Field(32, gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0)
    hidden_act: str = "silu"
    max_position_embeddings: int = Field(2048, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any]


class LlamaKeys(Keys):
    attention_bias: bool = False
    mlp_bias: bool = False


class MistralKeys(Keys):
    intermediate_size: int = Field(14336, gt=0)
    num_key_value_heads: int | None = Field(8, gt=0)
    max_position_embeddings: int = Field(131072, gt=0)
    sliding_window: int | None = Field(4096, gt=0)


class Llama(Family):
    """Llama 1, 2 and 3, and SmolLM2."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    keys = LlamaKeys
    carried = {**CARRIED, "pretraining_tp": 1}
    spelled: ClassVar[tuple[str, ...]] = ("rope_parameters",)
    names: ClassVar[Mapping[str, str]] = NAMES  # the modules of a layer, theirs and ours

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return rope.modernize(config)

    def spec(self, keys: Any) -> Transformer:
        return shape(keys, attention_bias=keys.attention_bias, mlp_bias=keys.mlp_bias)

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, mlp = parts(self, spec)
        if spec.dim % attention.heads:
            raise self.cannot(f"transformers wants a width ({spec.dim}) that is a multiple of the number of heads ({attention.heads})")
        return {**shared_values(spec, attention, mlp), "attention_bias": bool(attention.bias), "mlp_bias": mlp.bias}

    def rules(self, spec: Transformer) -> list[Rule]:
        layer = "model.layers.{i}"
        tied = isinstance(spec.head, LMHead) and spec.head.tied
        return [
            Rename("model.embed_tokens", "embed"),
            *self.layer_rules(spec, layer, "layers.{i}"),
            Rename("model.norm", "final_norm"),
            Drop("lm_head", same_as="model.embed_tokens") if tied else Rename("lm_head", "head.out"),
            Drop(f"{layer}.self_attn.rotary_emb"),  # transformers before 4.32 stored the frequencies
        ]

    def layer_rules(self, spec: Transformer, theirs: str, ours: str) -> list[Rule]:
        """The rules of one layer, in the order in which transformers has its modules."""
        return [Rename(f"{theirs}.{name}", f"{ours}.{mine}") for name, mine in self.names.items()]


class Mistral(Llama):
    """Mistral 7B and its kin: no biases; a sliding window, or none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    keys = MistralKeys
    carried = CARRIED

    def spec(self, keys: Any) -> Transformer:
        return shape(keys, pattern=Full() if keys.sliding_window is None else Window(size=keys.sliding_window))

    def values(self, spec: Transformer) -> dict[str, Any]:
        attention, mlp = parts(self, spec)
        return {
            **shared_values(spec, attention, mlp),
            "sliding_window": attention.pattern.size if isinstance(attention.pattern, Window) else None,
        }


def shape(keys: Keys, *, pattern: Pattern = Full(), attention_bias: bool = False, mlp_bias: bool = False) -> Transformer:  # noqa: B008 - frozen
    """The spec that the shared keys say, with what a family's own keys add."""
    fields = {"bias": ("q", "k", "v", "out") if attention_bias else (), "pattern": pattern}
    block = Block(mixer=attention(keys, fields), ffn=mlp(keys, bias=mlp_bias), norm=RMS(eps=keys.rms_norm_eps))
    return stack(keys, [block] * keys.num_hidden_layers)


def attention(keys: Keys, fields: Mapping[str, Any], *, partial: bool = False) -> Attention:
    """The attention that the shared keys say, with rotary positions, and with what `fields` say beside or in place of that.
    `partial`: whether positions may turn a part of each head only."""
    said = {
        "heads": keys.num_attention_heads,
        "kv_heads": keys.num_key_value_heads or keys.num_attention_heads,
        "head_dim": keys.head_dim or keys.hidden_size // keys.num_attention_heads,
        "position": rope.to_rope(keys.rope_parameters, positions=keys.max_position_embeddings, partial=partial),
    }
    return validate(Attention, {**said, **fields}, where="config.json")


def mlp(keys: Keys, *, bias: bool = False) -> MLP:
    """The gated feed-forward part that the shared keys say."""
    if keys.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(
            f"config.json: hidden_act {keys.hidden_act!r} is not supported (known: {known})", field="hidden_act", choices=ACTIVATIONS
        )
    return MLP(hidden=keys.intermediate_size, activation=ACTIVATIONS[keys.hidden_act], bias=bias)


def stack(keys: Keys, blocks: Sequence[Block]) -> Transformer:
    """The model of these layers, one block for each, within what the shared keys say."""
    kinds = list(dict.fromkeys(blocks))
    names = {block: "layer" if len(kinds) == 1 else f"layer{number}" for number, block in enumerate(kinds)}
    turned = rope.to_rope(keys.rope_parameters, positions=keys.max_position_embeddings, partial=True)
    return Transformer(
        dim=keys.hidden_size,
        vocab=keys.vocab_size,
        layers=tuple(names[block] for block in blocks),
        blocks={name: block for block, name in names.items()},
        head=LMHead(tied=keys.tie_word_embeddings),
        final_norm=RMS(eps=keys.rms_norm_eps),
        context=rope.context(turned, keys.max_position_embeddings),
    )


def parts(family: Family, spec: Transformer) -> tuple[Attention, MLP]:
    """The one attention and the one MLP of a spec that has the shape, or the reason why it does not."""
    if len(spec.blocks) != 1:
        raise family.cannot(f"all its layers must be alike, and this one has {len(spec.blocks)} kinds ({', '.join(spec.blocks)})")
    return turning(family, spec)


def turning(family: Family, spec: Transformer) -> tuple[Attention, MLP]:
    """The attention and the MLP of the first layer that has rotary positions, or the reason why there is none."""
    for name in spec.layers:
        block = spec.blocks[name]
        if not isinstance(block.mixer, Attention) or not isinstance(block.ffn, MLP):
            break
        if isinstance(block.mixer.position, Rope):
            return block.mixer, block.ffn
    raise family.cannot("each layer must be attention, then an mlp, with rotary positions")


def shared_values(spec: Transformer, attention: Attention, mlp: MLP) -> dict[str, Any]:
    """The shared keys that say `spec`; what they cannot say shows when they are read back."""
    assert isinstance(attention.position, Rope)
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.dim,
        "intermediate_size": mlp.hidden,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": next((name for name, activation in ACTIVATIONS.items() if activation == mlp.activation), "silu"),
        "max_position_embeddings": rope.positions(attention.position, spec.context or 2048),
        "rms_norm_eps": spec.final_norm.eps if isinstance(spec.final_norm, RMS) else 1e-6,
        "tie_word_embeddings": isinstance(spec.head, LMHead) and spec.head.tied,
        "rope_parameters": rope.from_rope(attention.position),
    }


def without_implied(values: dict[str, Any]) -> dict[str, Any]:
    """The keys without a head_dim that width and heads imply: families whose configs have no such key of their own."""
    implied = values["head_dim"] * values["num_attention_heads"] == values["hidden_size"]
    return {key: value for key, value in values.items() if key != "head_dim" or not implied}


for _family in (Llama(), Mistral()):
    families.add(_family.model_type, _family)
