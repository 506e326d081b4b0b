"""The family `vit`: an encoder of image patches with a vector that stands for the whole, learned positions and norms before the sublayers.

`architectures` says which head there is: a classifier of images, or the pooler of the bare model. arXiv:2010.11929. Square images
and patches alone; the token that masks patches is read over, and what reconstructs them is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec
from ...models.block import Block
from ...models.model import Model
from ...models.transformer import Transformer
from ...nn.activations import Activation
from ...nn.attention import Attention
from ...nn.feedforward import MLP
from ...nn.heads import Head
from ...nn.heads_task import Classifier, Project
from ...nn.norms import Layer
from ...nn.patches import Patches
from ...nn.positions_absolute import Learned
from ..rules import Drop, Rename, Reshape, Rule
from . import Family, families, tasks
from .gpt2 import GPT2_ACTIVATIONS as ACTIVATIONS

TASKS = ("Model", "ForImageClassification")


class Keys(Spec):
    """What is read from config.json."""

    architectures: tuple[str, ...] | None = None
    hidden_size: int = Field(768, gt=0)
    num_hidden_layers: int = Field(12, gt=0, le=10_000)
    num_attention_heads: int = Field(12, gt=0)
    intermediate_size: int = Field(3072, gt=0)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = Field(0.0, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.0, ge=0, lt=1)
    layer_norm_eps: float = Field(1e-12, gt=0)
    image_size: int = Field(224, gt=0)
    patch_size: int = Field(16, gt=0)
    num_channels: int = Field(3, gt=0)
    qkv_bias: bool = True
    id2label: dict[str, str] | None = None
    pooler_act: Literal["tanh"] = "tanh"
    pooler_output_size: int | None = Field(None, gt=0)


class ViT(Family):
    """ViT."""

    model_type = "vit"
    architecture = "ViTModel"
    keys = Keys
    spelled = ("architectures", "hidden_act", "id2label", "pooler_output_size")
    carried: Mapping[str, Any] = {"initializer_range": 0.02, "encoder_stride": 16}

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return config

    def to_hf(self, spec: Model, rest: Mapping[str, Any]) -> dict[str, Any]:
        config = tasks.with_numbers(super().to_hf(spec, rest))
        return {key: value for key, value in config.items() if value is not None or key in rest}  # it has no tokens to name

    def spec(self, keys: Any) -> Transformer:
        if keys.pooler_output_size not in (None, keys.hidden_size):
            message = f"pooler_output_size ({keys.pooler_output_size}) other than hidden_size ({keys.hidden_size}) is not supported"
            raise ConfigError(f"config.json: {message}", field="pooler_output_size", value=keys.pooler_output_size)
        rate = keys.hidden_dropout_prob
        biases = ("q", "k", "v", "out") if keys.qkv_bias else ("out",)
        block = Block(
            mixer=heads_of(keys, bias=biases, dropout=keys.attention_probs_dropout_prob),
            ffn=MLP(hidden=keys.intermediate_size, activation=activation_of(keys), gated=False, bias=True),
            norm=Layer(eps=keys.layer_norm_eps),
            dropout=rate,
        )
        return encoder(keys, block, patches_of(keys).replace(dropout=rate), self.head(keys))

    def head(self, keys: Any) -> Head:
        if tasks.task_of(keys.architectures, "ViT", TASKS, default="Model") == "ForImageClassification":
            return Classifier(labels=tasks.labels_of(keys.id2label))
        return Project(inner=True)

    def values(self, spec: Any) -> dict[str, Any]:
        block, embed = parts(self, spec)
        classes = isinstance(spec.head, Classifier)
        said = {
            "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
            "hidden_dropout_prob": block.dropout,
            "attention_probs_dropout_prob": block.mixer.dropout,
            "qkv_bias": "q" in block.mixer.bias,
            "pooler_act": "tanh",
            "pooler_output_size": spec.dim,
            **shared_values(spec, block, embed),
        }
        return {**said, "id2label": tasks.names_of(spec.head.labels)} if classes else said

    def rules(self, spec: Transformer) -> list[Rule]:
        if isinstance(spec.head, Classifier):
            return [*self._body(spec, "vit."), Rename("classifier", "head.out")]
        return [
            *(rule for prefix in ("", "vit.") for rule in [*self._body(spec, prefix), Rename(f"{prefix}pooler.dense", "head.pooler.dense")])
        ]

    def _body(self, spec: Transformer, prefix: str) -> list[Rule]:
        embed, dim = spec.embed, spec.dim
        assert isinstance(embed, Patches)
        layer, first, rows = f"{prefix}encoder.layer.{{i}}", f"{prefix}embeddings", embed.count + 1
        names = {
            "attention.attention.query": "mixer.inp.q",
            "attention.attention.key": "mixer.inp.k",
            "attention.attention.value": "mixer.inp.v",
            "attention.output.dense": "mixer.out",
            "layernorm_before": "mixer_norm",
            "intermediate.dense": "ffn.inp.up",
            "output.dense": "ffn.out",
            "layernorm_after": "ffn_norm",
        }
        return [
            Reshape(f"{first}.cls_token", "embed.start.weight", there=(1, 1, dim), here=(1, dim)),
            Reshape(f"{first}.position_embeddings", "embed.positions.weight", there=(1, rows, dim), here=(rows, dim)),
            convolution(f"{first}.patch_embeddings.projection.weight", embed, dim),
            Rename(f"{first}.patch_embeddings.projection.bias", "embed.project.bias"),
            Drop(f"{first}.mask_token"),
            *(Rename(f"{layer}.{theirs}", f"layers.{{i}}.{mine}") for theirs, mine in names.items()),
            Rename(f"{prefix}layernorm", "final_norm"),
        ]


def activation_of(keys: Any) -> Activation:
    if keys.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(f"config.json: hidden_act {keys.hidden_act!r} is not supported (known: {known})", field="hidden_act")
    return ACTIVATIONS[keys.hidden_act]


def heads_of(keys: Any, *, bias: Any, dropout: float) -> Attention:
    heads = keys.num_attention_heads
    if keys.hidden_size % heads:
        message = f"hidden_size ({keys.hidden_size}) must be a multiple of num_attention_heads ({heads})"
        raise ConfigError(f"config.json: {message}", field="num_attention_heads")
    return Attention(heads=heads, kv_heads=heads, head_dim=keys.hidden_size // heads, bias=bias, dropout=dropout)


def patches_of(keys: Any) -> Patches:
    """The embedding that keys of this family, or of CLIP's, say."""
    if keys.image_size % keys.patch_size:
        message = f"image_size ({keys.image_size}) must be a multiple of patch_size ({keys.patch_size})"
        raise ConfigError(f"config.json: {message}", field="image_size")
    positions = Learned(size=(keys.image_size // keys.patch_size) ** 2 + 1)
    return Patches(image=keys.image_size, patch=keys.patch_size, channels=keys.num_channels, positions=positions)


def encoder(keys: Any, block: Block, embed: Patches, head: Head) -> Transformer:
    return Transformer(
        dim=keys.hidden_size,
        vocab=1,
        layers=("layer",) * keys.num_hidden_layers,
        blocks={"layer": block},
        embed=embed,
        head=head,
        final_norm=block.norm,
        causal=False,
    )


def parts(family: Family, spec: Any) -> tuple[Any, Patches]:
    """The block of the first layer and the embedding of a spec that has the shape, or the reason why it does not."""
    block = spec.blocks[spec.layers[0]] if isinstance(spec, Transformer) else None
    if block is None or not isinstance(block.mixer, Attention) or not isinstance(block.ffn, MLP) or not isinstance(spec.embed, Patches):
        raise family.cannot("it must embed patches, and each layer must be attention, then an mlp")
    return block, spec.embed


def shared_values(spec: Transformer, block: Any, embed: Patches) -> dict[str, Any]:
    """The keys of this family, and of CLIP's, that say the same."""
    return {
        "hidden_size": spec.dim,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": block.mixer.heads,
        "intermediate_size": block.ffn.hidden,
        "hidden_act": next((name for name, one in ACTIVATIONS.items() if one == block.ffn.activation), "gelu"),
        "layer_norm_eps": block.norm.eps if isinstance(block.norm, Layer) else 1e-5,
        "image_size": embed.image,
        "patch_size": embed.patch,
        "num_channels": embed.channels,
    }


def convolution(disk: str, embed: Patches, dim: int) -> Rule:
    """The map of patches, which transformers has as the weight of a convolution."""
    size = (embed.channels, embed.patch, embed.patch)
    return Reshape(disk, "embed.project.weight", there=(dim, *size), here=(dim, embed.channels * embed.patch**2))


families.add(ViT.model_type, ViT())
