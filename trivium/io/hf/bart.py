"""The family `bart`: encoder and decoder with learned positions, normed embeddings, norms after the sums and biases everywhere.

One table of tokens serves both stacks and the output, to which a bias for each token is added. arXiv:1910.13461. Dropout inside
the feed-forward parts and of whole layers, which only training sees, is carried along and not done; classifiers are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec
from ...models.block import Block
from ...models.encoder_decoder import EncoderDecoder
from ...models.transformer import Transformer
from ...nn.attention import Attention
from ...nn.cross import CrossAttention
from ...nn.embeddings import Tokens
from ...nn.feedforward import MLP
from ...nn.heads import Head, LMHead, NoHead
from ...nn.norms import Layer, NoNorm
from ...nn.positions_absolute import Learned
from ..rules import Drop, Rename, Rule
from ..tensors import Lazy
from . import Family, families, tasks
from .gpt2 import GPT2_ACTIVATIONS as ACTIVATIONS

OFFSET = 2  # rows of the positions' table that are never read
NORM = Layer(eps=1e-5)
BIASES = ("q", "k", "v", "out")
LEGACY = frozenset({  # of early files: settings of generation, and what is read by none
    "_num_labels", "classif_dropout", "gradient_checkpointing", "num_hidden_layers", "extra_pos_embeddings", "add_bias_logits", "prefix",
    "output_past", "early_stopping", "forced_bos_token_id", "no_repeat_ngram_size", "num_beams", "max_length", "min_length", "length_penalty",
})  # fmt: skip


class Keys(Spec):
    """What is read from config.json."""

    architectures: tuple[str, ...] | None = None
    vocab_size: int = Field(50265, gt=0)
    d_model: int = Field(1024, gt=0)
    max_position_embeddings: int = Field(1024, gt=0)
    encoder_layers: int = Field(12, gt=0, le=10_000)
    encoder_attention_heads: int = Field(16, gt=0)
    encoder_ffn_dim: int = Field(4096, gt=0)
    decoder_layers: int = Field(12, gt=0, le=10_000)
    decoder_attention_heads: int = Field(16, gt=0)
    decoder_ffn_dim: int = Field(4096, gt=0)
    activation_function: str = "gelu"
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    scale_embedding: bool = False
    tie_word_embeddings: Literal[True] = True
    is_encoder_decoder: Literal[True] = True
    is_decoder: Literal[False] = False
    # What early files could say otherwise, for models (mBART) that are families of their own today.
    normalize_before: Literal[False] = False
    normalize_embedding: Literal[True] = True
    add_final_layer_norm: Literal[False] = False
    static_position_embeddings: Literal[False] = False


class AsRow(Rule):
    """A vector of ours is stored as a matrix of one row."""

    def __init__(self, disk: str, ours: str):
        super().__init__([disk], [ours])

    def forward(self, tensors: list[Lazy]) -> list[Lazy]:
        (row,) = tensors
        return [row.derive(row.shape[1:], lambda value: value[0])]

    def backward(self, tensors: list[Lazy]) -> list[Lazy]:
        (vector,) = tensors
        return [vector.derive((1, *vector.shape), lambda value: value[None])]


class Bart(Family):
    """BART."""

    model_type = "bart"
    architecture = "BartForConditionalGeneration"
    keys = Keys
    spelled = ("activation_function", "normalize_before", "normalize_embedding", "add_final_layer_norm", "static_position_embeddings")
    carried: Mapping[str, Any] = {
        "activation_dropout": 0.0,
        "classifier_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "init_std": 0.02,
        "use_cache": True,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return config

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def spec(self, keys: Any) -> EncoderDecoder:
        tasks.task_of(keys.architectures, "Bart", ("ForConditionalGeneration",), default="ForConditionalGeneration")
        if keys.activation_function not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            message = f"activation_function {keys.activation_function!r} is not supported (known: {known})"
            raise ConfigError(f"config.json: {message}", field="activation_function")
        return EncoderDecoder(
            encoder=self._stack(keys, "encoder", keys.encoder_layers, keys.encoder_attention_heads, keys.encoder_ffn_dim),
            decoder=self._stack(keys, "decoder", keys.decoder_layers, keys.decoder_attention_heads, keys.decoder_ffn_dim),
        )

    def _stack(self, keys: Any, name: str, layers: int, heads: int, hidden: int) -> Transformer:
        if keys.d_model % heads:
            message = f"d_model ({keys.d_model}) must be a multiple of {name}_attention_heads ({heads})"
            raise ConfigError(f"config.json: {message}", field=f"{name}_attention_heads")
        writes, width = name == "decoder", keys.d_model // heads
        block = Block(
            mixer=Attention(heads=heads, kv_heads=heads, head_dim=width, bias=BIASES, dropout=keys.attention_dropout),
            cross=CrossAttention(heads=heads, kv_heads=heads, head_dim=width, bias=BIASES, dropout=keys.attention_dropout)
            if writes
            else None,
            ffn=MLP(hidden=hidden, activation=ACTIVATIONS[keys.activation_function], gated=False, bias=True),
            norm=NORM,
            norm_at="post",
            dropout=keys.dropout,
        )
        head: Head = LMHead(tied=True, bias=True) if writes else NoHead()
        return Transformer(
            dim=keys.d_model,
            vocab=keys.vocab_size,
            layers=("layer",) * layers,
            blocks={"layer": block},
            embed=Tokens(
                scale=keys.d_model**0.5 if keys.scale_embedding else None,
                positions=Learned(size=keys.max_position_embeddings, offset=OFFSET),
                norm=NORM,
                dropout=keys.dropout,
            ),
            head=head,
            final_norm=NoNorm(),
            causal=writes,
            context=keys.max_position_embeddings,
        )

    def values(self, spec: Any) -> dict[str, Any]:
        if not isinstance(spec, EncoderDecoder):
            raise self.cannot("it must be an encoder_decoder")
        said: dict[str, Any] = {}
        for name, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
            block = stack.blocks[stack.layers[0]]
            if not isinstance(block.mixer, Attention) or not isinstance(block.ffn, MLP):
                raise self.cannot("each layer must be attention, then an mlp")
            said |= {f"{name}_layers": len(stack.layers), f"{name}_attention_heads": block.mixer.heads, f"{name}_ffn_dim": block.ffn.hidden}
        embed = spec.decoder.embed
        if not isinstance(embed, Tokens) or not isinstance(embed.positions, Learned):
            raise self.cannot("its embeddings must have learned positions")
        return {
            **said,
            "architectures": [self.architecture],
            "vocab_size": spec.decoder.vocab,
            "d_model": spec.decoder.dim,
            "max_position_embeddings": embed.positions.size,
            "activation_function": next((name for name, one in ACTIVATIONS.items() if one == block.ffn.activation), "gelu"),
            "dropout": block.dropout,
            "attention_dropout": block.mixer.dropout,
            "scale_embedding": embed.scale is not None,
            "tie_word_embeddings": True,
            "is_encoder_decoder": True,
            "is_decoder": False,
        }

    def rules(self, spec: EncoderDecoder) -> list[Rule]:
        tables = ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
        return [
            Rename("model.shared", "encoder.embed"),
            AsRow("final_logits_bias", "decoder.head.bias"),
            *(Drop(name, same_as="model.shared") for name in tables),
            *(rule for stack in ("encoder", "decoder") for rule in self._rules(stack)),
        ]

    def _rules(self, stack: str) -> Sequence[Rule]:
        layer, ours = f"model.{stack}.layers.{{i}}", f"{stack}.layers.{{i}}"
        maps = {"q_proj": "inp.q", "k_proj": "inp.k", "v_proj": "inp.v", "out_proj": "out"}
        crosses = {"q_proj": "inp.q", "k_proj": "memory.k", "v_proj": "memory.v", "out_proj": "out"}
        names = {
            **{f"self_attn.{theirs}": f"mixer.{mine}" for theirs, mine in maps.items()},
            **{f"encoder_attn.{theirs}": f"cross.{mine}" for theirs, mine in crosses.items()},
            "self_attn_layer_norm": "mixer_norm",
            "encoder_attn_layer_norm": "cross_norm",
            "fc1": "ffn.inp.up",
            "fc2": "ffn.out",
            "final_layer_norm": "ffn_norm",
        }
        return [
            Rename(f"model.{stack}.embed_positions", f"{stack}.embed.positions"),
            Rename(f"model.{stack}.layernorm_embedding", f"{stack}.embed.norm"),
            *(Rename(f"{layer}.{theirs}", f"{ours}.{mine}") for theirs, mine in names.items()),
        ]


families.add(Bart.model_type, Bart())
