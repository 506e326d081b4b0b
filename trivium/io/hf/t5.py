"""The family `t5`: encoder and decoder with relative biases, RMS norms before the sublayers, no biases and unscaled attention.

The first layer of each stack holds the table of biases. T5 ties its head to the one table of tokens and scales what goes in; v1.1
(and Flan) has a head of its own and gated feed-forward parts. arXiv:1910.10683, arXiv:2002.05202. Dropout inside feed-forward parts
and after the last norm, which only training sees, is not done; models of the encoder alone are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec, validate
from ...models.block import Block
from ...models.encoder_decoder import EncoderDecoder
from ...models.model import Model
from ...models.transformer import Transformer
from ...nn.activations import GELU, Activation
from ...nn.attention import Attention, Scores
from ...nn.cross import CrossAttention
from ...nn.embeddings import Tokens
from ...nn.feedforward import MLP
from ...nn.heads import Head, LMHead, NoHead
from ...nn.norms import RMS
from ...nn.positions_relative import RelativeBias
from ..rules import Drop, Rename, Rule
from . import Family, families, tasks
from .gpt2 import GPT2_ACTIVATIONS as ACTIVATIONS

LEGACY = frozenset({"n_positions", "output_past", "decoder_start_token_id"})  # lengths are not bounded; the rest is generation's


class Keys(Spec):
    """What is read from config.json."""

    architectures: tuple[str, ...] | None = None
    vocab_size: int = Field(32128, gt=0)
    d_model: int = Field(512, gt=0)
    d_kv: int = Field(64, gt=0)
    d_ff: int = Field(2048, gt=0)
    num_layers: int = Field(6, gt=0, le=10_000)
    num_decoder_layers: int | None = Field(None, gt=0, le=10_000)
    num_heads: int = Field(8, gt=0)
    relative_attention_num_buckets: int = Field(32, gt=0)
    relative_attention_max_distance: int = Field(128, gt=0)
    dropout_rate: float = Field(0.1, ge=0, lt=1)
    layer_norm_epsilon: float = Field(1e-6, gt=0)
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None  # what feed_forward_proj says, and is_gated_act too
    is_gated_act: bool | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # where absent: tie_word_embeddings, which transformers 5 always writes as true
    is_encoder_decoder: Literal[True] = True
    is_decoder: Literal[False] = False


class T5(Family):
    """T5, T5 v1.1 and Flan-T5."""

    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    keys = Keys
    spelled = ("feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs")
    carried: Mapping[str, Any] = {
        "classifier_dropout": 0.0,
        "initializer_factor": 1.0,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return config

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def to_hf(self, spec: Model, rest: Mapping[str, Any]) -> dict[str, Any]:
        config = super().to_hf(spec, rest)
        return config if "bos_token_id" in rest else {key: value for key, value in config.items() if key != "bos_token_id"}

    def spec(self, keys: Any) -> EncoderDecoder:
        tasks.task_of(keys.architectures, "T5", ("ForConditionalGeneration",), default="ForConditionalGeneration")
        scaled = keys.tie_word_embeddings if keys.scale_decoder_outputs is None else keys.scale_decoder_outputs
        head = LMHead(tied=True, scale=keys.d_model**-0.5) if scaled else LMHead()
        return EncoderDecoder(
            encoder=self._stack(keys, keys.num_layers, NoHead(), writes=False),
            decoder=self._stack(keys, keys.num_decoder_layers or keys.num_layers, head, writes=True),
        )

    def _stack(self, keys: Any, layers: int, head: Head, *, writes: bool) -> Transformer:
        gated, activation = feed_forward(keys)
        norm, heads, rate = RMS(eps=keys.layer_norm_epsilon), keys.num_heads, keys.dropout_rate
        buckets = {"buckets": keys.relative_attention_num_buckets, "distance": keys.relative_attention_max_distance}
        position = validate(RelativeBias, {**buckets, "bidirectional": not writes}, where="config.json")
        attention = Attention(heads=heads, kv_heads=heads, head_dim=keys.d_kv, position=position, scores=Scores(scale=1.0), dropout=rate)
        cross = CrossAttention(heads=heads, kv_heads=heads, head_dim=keys.d_kv, scale=1.0, dropout=rate) if writes else None
        mlp = MLP(hidden=keys.d_ff, activation=activation, gated=gated)
        return Transformer(
            dim=keys.d_model,
            vocab=keys.vocab_size,
            layers=("layer",) * layers,
            blocks={"layer": Block(mixer=attention, cross=cross, ffn=mlp, norm=norm, dropout=rate)},
            embed=Tokens(dropout=rate),
            head=head,
            final_norm=norm,
            causal=writes,
        )

    def values(self, spec: Any) -> dict[str, Any]:
        if not isinstance(spec, EncoderDecoder):
            raise self.cannot("it must be an encoder_decoder")
        block = spec.decoder.blocks[spec.decoder.layers[0]]
        if not isinstance(block.mixer, Attention) or not isinstance(block.ffn, MLP) or not isinstance(block.mixer.position, RelativeBias):
            raise self.cannot("each layer must be attention with relative biases, then an mlp")
        gated, head = block.ffn.gated, spec.decoder.head
        name = next((name for name, one in ACTIVATIONS.items() if one == block.ffn.activation), "relu")
        tied = isinstance(head, LMHead) and head.tied
        return {
            "architectures": [self.architecture],
            "vocab_size": spec.decoder.vocab,
            "d_model": spec.decoder.dim,
            "d_kv": block.mixer.head_dim,
            "d_ff": block.ffn.hidden,
            "num_layers": len(spec.encoder.layers),
            "num_decoder_layers": len(spec.decoder.layers),
            "num_heads": block.mixer.heads,
            "relative_attention_num_buckets": block.mixer.position.buckets,
            "relative_attention_max_distance": block.mixer.position.distance,
            "dropout_rate": block.dropout,
            "layer_norm_epsilon": block.norm.eps if isinstance(block.norm, RMS) else 1e-6,
            "feed_forward_proj": ("gated-gelu" if name == "gelu_new" else f"gated-{name}") if gated else name,
            "dense_act_fn": name,
            "is_gated_act": gated,
            "tie_word_embeddings": tied,
            "scale_decoder_outputs": tied,
            "is_encoder_decoder": True,
            "is_decoder": False,
        }

    def rules(self, spec: EncoderDecoder) -> list[Rule]:
        tied = isinstance(spec.decoder.head, LMHead) and spec.decoder.head.tied
        return [
            Rename("shared", "encoder.embed"),
            *(Drop(f"{stack}.embed_tokens", same_as="shared") for stack in ("encoder", "decoder")),
            Drop("lm_head", same_as="shared") if tied else Rename("lm_head", "decoder.head.out"),
            Drop("decoder.block.{i}.layer.1.EncDecAttention.relative_attention_bias"),  # early files have one, which nothing reads
            *self._rules("encoder", spec.encoder),
            *self._rules("decoder", spec.decoder),
        ]

    def _rules(self, stack: str, spec: Transformer) -> list[Rule]:
        ffn = spec.blocks[spec.layers[0]].ffn
        maps = {"wi_0": "gate", "wi_1": "up"} if isinstance(ffn, MLP) and ffn.gated else {"wi": "up"}
        layer, ours, wide = f"{stack}.block.{{i}}.layer", f"{stack}.layers.{{i}}", 2 if stack == "decoder" else 1
        names = {
            **{f"0.SelfAttention.{name}": f"mixer.inp.{name}" for name in "qkv"},
            "0.SelfAttention.o": "mixer.out",
            "0.SelfAttention.relative_attention_bias": "mixer.table",
            "0.layer_norm": "mixer_norm",
            **{f"{wide}.DenseReluDense.{theirs}": f"ffn.inp.{mine}" for theirs, mine in maps.items()},
            f"{wide}.DenseReluDense.wo": "ffn.out",
            f"{wide}.layer_norm": "ffn_norm",
        }
        if stack == "decoder":
            crosses = {"q": "inp.q", "k": "memory.k", "v": "memory.v", "o": "out"}
            names |= {f"1.EncDecAttention.{theirs}": f"cross.{mine}" for theirs, mine in crosses.items()} | {"1.layer_norm": "cross_norm"}
        rules: list[Rule] = [Rename(f"{layer}.{theirs}", f"{ours}.{mine}") for theirs, mine in names.items()]
        return [*rules, Rename(f"{stack}.final_layer_norm", f"{stack}.final_norm")]


def feed_forward(keys: Any) -> tuple[bool, Activation]:
    """Whether it is gated, and by what. `gated-gelu` means the tanh form, whatever its name says."""
    gate, _, name = keys.feed_forward_proj.rpartition("-")
    if gate not in ("", "gated") or name not in ACTIVATIONS:
        known = ", ".join(f"[gated-]{name}" for name in ACTIVATIONS)
        message = f"feed_forward_proj {keys.feed_forward_proj!r} is not supported (known: {known})"
        raise ConfigError(f"config.json: {message}", field="feed_forward_proj", value=keys.feed_forward_proj)
    gated, activation = gate == "gated", ACTIVATIONS[name]
    if gated and name == "gelu":
        activation = GELU(approximate="tanh")
    if keys.is_gated_act not in (None, gated) or (keys.dense_act_fn is not None and ACTIVATIONS.get(keys.dense_act_fn) != activation):
        message = f"feed_forward_proj {keys.feed_forward_proj!r}, is_gated_act {keys.is_gated_act} and dense_act_fn {keys.dense_act_fn!r}"
        raise ConfigError(f"config.json: {message} disagree; one of them is wrong", field="feed_forward_proj")
    return gated, activation


families.add(T5.model_type, T5())
