"""The families `gpt2` and `openai-gpt` (GPT-1): learned positions, layer norms, plain feed-forward with GELU, biases everywhere.

GPT-1 has its norms after the sums and none at the end, GPT-2 before them. Both store every matrix the other way round
(their Conv1D), and q, k and v as one. Radford et al. 2018 and 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec
from ...models.block import Block
from ...models.transformer import Transformer
from ...nn.activations import GELU, Activation, ReLU, SiLU
from ...nn.attention import Attention, Scores
from ...nn.embeddings import Tokens
from ...nn.feedforward import MLP
from ...nn.heads import LMHead
from ...nn.norms import Layer, NoNorm, Norm
from ...nn.positions_absolute import Learned
from ..rules import Drop, Rename, Rule, Split, Transpose
from . import Family, families

# The first name of each activation is the one that is written where a file did not say another.
TANH = GELU(approximate="tanh")
GPT2_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": TANH,
    "gelu_pytorch_tanh": TANH,
    "gelu_fast": TANH,
    "gelu": GELU(),
    "gelu_python": GELU(),
    "quick_gelu": GELU(approximate="sigmoid"),
    "relu": ReLU(),
    "silu": SiLU(),
    "swish": SiLU(),
}
GPT1_ACTIVATIONS: Mapping[str, Activation] = {"gelu": TANH, "relu": ReLU(), "silu": SiLU(), "swish": SiLU()}
CARRIED = {
    "initializer_range": 0.02,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
}
LEGACY = frozenset({"n_ctx", "n_special", "predict_special_tokens"})  # written by early versions, read by none


class Keys(Spec):
    """What both families read from config.json."""

    vocab_size: int = Field(gt=0)
    n_positions: int = Field(gt=0)
    n_embd: int = Field(768, gt=0)
    n_layer: int = Field(12, gt=0, le=10_000)
    n_head: int = Field(12, gt=0)
    resid_pdrop: float = Field(0.1, ge=0, lt=1)
    embd_pdrop: float = Field(0.1, ge=0, lt=1)
    attn_pdrop: float = Field(0.1, ge=0, lt=1)
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = True


class GPT1Keys(Keys):
    vocab_size: int = Field(40478, gt=0)
    n_positions: int = Field(512, gt=0)
    afn: str = "gelu"


class GPT2Keys(Keys):
    vocab_size: int = Field(50257, gt=0)
    n_positions: int = Field(1024, gt=0)
    n_inner: int | None = Field(None, gt=0)
    activation_function: str = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: Literal[False] = False


class GPT1(Family):
    """GPT-1."""

    model_type = "openai-gpt"
    architecture = "OpenAIGPTLMHeadModel"
    keys = GPT1Keys
    carried = CARRIED
    activation_key = "afn"
    spelled = ("afn",)
    activations = GPT1_ACTIVATIONS
    tables = ("tokens_embed", "positions_embed")

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return config

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def spec(self, keys: Any) -> Transformer:
        return shape(keys, Block(mixer=self.attention(keys), ffn=self.mlp(keys, keys.afn, None), norm_at="post"), final_norm=NoNorm())

    def attention(self, keys: Keys, *, scale: float | None = None) -> Attention:
        if keys.n_embd % keys.n_head:
            raise ConfigError(f"config.json: n_embd ({keys.n_embd}) must be a multiple of n_head ({keys.n_head})", field="n_head")
        return Attention(
            heads=keys.n_head,
            kv_heads=keys.n_head,
            head_dim=keys.n_embd // keys.n_head,
            bias=("q", "k", "v", "out"),
            scores=Scores(scale=scale),
            dropout=keys.attn_pdrop,
        )

    def mlp(self, keys: Keys, activation: str, hidden: int | None) -> MLP:
        if activation not in self.activations:
            raise ConfigError(
                f"config.json: {self.activation_key} {activation!r} is not supported (known: {', '.join(self.activations)})",
                field=self.activation_key,
                value=activation,
                choices=self.activations,
            )
        return MLP(hidden=hidden or 4 * keys.n_embd, activation=self.activations[activation], gated=False, bias=True)

    def values(self, spec: Transformer) -> dict[str, Any]:
        block = spec.blocks[spec.layers[0]]
        if not isinstance(block.mixer, Attention) or not isinstance(block.ffn, MLP) or not isinstance(spec.embed, Tokens):
            raise self.cannot("each layer must be attention, then an mlp, over an embedding of tokens")
        if not isinstance(spec.embed.positions, Learned):
            raise self.cannot("its positions must be learned ones, added to the embedding")
        if block.ffn.gated or set(block.mixer.bias) != {"q", "k", "v", "out"}:
            raise self.cannot("its mlp must not be gated, and every map of its attention has a bias")
        return {
            "vocab_size": spec.vocab,
            "n_positions": spec.embed.positions.size,
            "n_embd": spec.dim,
            "n_layer": len(spec.layers),
            "n_head": block.mixer.heads,
            "resid_pdrop": block.dropout,
            "embd_pdrop": spec.embed.dropout,
            "attn_pdrop": block.mixer.dropout,
            "layer_norm_epsilon": block.norm.eps if isinstance(block.norm, Layer) else 1e-5,
            "tie_word_embeddings": isinstance(spec.head, LMHead) and spec.head.tied,
            self.activation_key: next((name for name, one in self.activations.items() if one == block.ffn.activation), "gelu"),
        }

    def rules(self, spec: Transformer) -> list[Rule]:
        tied = isinstance(spec.head, LMHead) and spec.head.tied
        head: Rule = Drop("lm_head", same_as=f"transformer.{self.tables[0]}") if tied else Rename("lm_head", "head.out")
        # Files made from the model without its head lack the prefix; the first names are the ones written.
        return [*self._body(spec, "transformer."), head, *self._body(spec, "")]

    def _body(self, spec: Transformer, prefix: str) -> list[Rule]:
        theirs, ours = f"{prefix}h.{{i}}", "layers.{i}"
        tokens, positions = self.tables
        return [
            Rename(f"{prefix}{tokens}", "embed"),
            Rename(f"{prefix}{positions}", "embed.positions"),
            Rename(f"{theirs}.ln_1", f"{ours}.mixer_norm"),
            Split(f"{theirs}.attn.c_attn", [f"{ours}.mixer.inp.{part}" for part in "qkv"], sizes=(spec.dim,) * 3, transposed=True),
            Transpose(f"{theirs}.attn.c_proj", f"{ours}.mixer.out"),
            Drop(f"{theirs}.attn"),  # the causal mask, which transformers stored before 4.31
            Rename(f"{theirs}.ln_2", f"{ours}.ffn_norm"),
            Transpose(f"{theirs}.mlp.c_fc", f"{ours}.ffn.inp.up"),
            Transpose(f"{theirs}.mlp.c_proj", f"{ours}.ffn.out"),
            Rename(f"{prefix}ln_f", "final_norm"),
        ]


class GPT2(GPT1):
    """GPT-2, and the dense part of GPT-3."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    keys = GPT2Keys
    carried = {**CARRIED, "use_cache": True, "bos_token_id": 50256, "eos_token_id": 50256, "reorder_and_upcast_attn": False}
    activation_key = "activation_function"
    spelled = ("activation_function", "n_inner")
    activations = GPT2_ACTIVATIONS
    tables = ("wte", "wpe")

    def spec(self, keys: Any) -> Transformer:
        scales: list[float | None] = [None if keys.scale_attn_weights else 1.0]
        if keys.scale_attn_by_inverse_layer_idx:
            base = (keys.n_embd // keys.n_head) ** -0.5 if keys.scale_attn_weights else 1.0
            scales = [base / (i + 1) for i in range(keys.n_layer)]
        mlp = self.mlp(keys, keys.activation_function, keys.n_inner)
        blocks = [Block(mixer=self.attention(keys, scale=scale), ffn=mlp) for scale in scales]
        return shape(keys, *blocks, final_norm=Layer(eps=keys.layer_norm_epsilon))

    def values(self, spec: Transformer) -> dict[str, Any]:
        values = super().values(spec)
        block = spec.blocks[spec.layers[0]]
        assert isinstance(block.mixer, Attention) and isinstance(block.ffn, MLP)
        return {
            **values,
            "n_inner": None if block.ffn.hidden == 4 * spec.dim else block.ffn.hidden,
            "scale_attn_weights": block.mixer.scores.scale in (None, block.mixer.head_dim**-0.5),
            "scale_attn_by_inverse_layer_idx": len(spec.blocks) > 1,
            "add_cross_attention": False,
        }


def shape(keys: Keys, *blocks: Block, final_norm: Norm) -> Transformer:
    """The spec that the shared keys say around its blocks: one for all layers, or one for each."""
    blocks = tuple(block.replace(norm=Layer(eps=keys.layer_norm_epsilon), dropout=keys.resid_pdrop) for block in blocks)
    names = tuple(f"layer{i}" for i in range(len(blocks))) if len(blocks) > 1 else ("layer",)
    return Transformer(
        dim=keys.n_embd,
        vocab=keys.vocab_size,
        layers=names if len(blocks) > 1 else names * keys.n_layer,
        blocks=dict(zip(names, blocks, strict=True)),
        embed=Tokens(positions=Learned(size=keys.n_positions), dropout=keys.embd_pdrop),
        head=LMHead(tied=keys.tie_word_embeddings),
        final_norm=final_norm,
        context=keys.n_positions,
    )


for _family in (GPT1(), GPT2()):
    families.add(_family.model_type, _family)
