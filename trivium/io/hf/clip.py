"""The families `clip`, `clip_text_model` and `clip_vision_model`: a causal reader of texts and a reader of image patches, each with
learned positions and norms before the sublayers, alone or joined in one space.

The text's state is read at its end token; where `eos_token_id` is 2, as first files have it, that is the highest token of a row.
arXiv:2103.00020. Patches are normed before the first layer, and the projections have no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec
from ...models.block import Block
from ...models.dual_encoder import DualEncoder
from ...models.model import Model
from ...models.transformer import Transformer
from ...nn.attention import Attention
from ...nn.embeddings import Tokens
from ...nn.feedforward import MLP
from ...nn.heads_task import Project
from ...nn.norms import Layer
from ...nn.positions_absolute import Learned
from ..rules import Drop, Rename, Reshape, Rule, within
from . import Family, families, tasks, vit

BIASES = ("q", "k", "v", "out")
HIGHEST = 2  # the eos_token_id of first files, which means the highest token of a row
LEGACY = frozenset({  # settings of generation and the like that transformers 4 wrote into every part of a config
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "is_decoder", "is_encoder_decoder", "length_penalty", "max_length",
    "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript",
    "typical_p", "use_bfloat16", "vocab_size", "gradient_checkpointing", "dropout", "model_type",
})  # fmt: skip
NAMES = {
    "self_attn.q_proj": "mixer.inp.q",
    "self_attn.k_proj": "mixer.inp.k",
    "self_attn.v_proj": "mixer.inp.v",
    "self_attn.out_proj": "mixer.out",
    "layer_norm1": "mixer_norm",
    "mlp.fc1": "ffn.inp.up",
    "mlp.fc2": "ffn.out",
    "layer_norm2": "ffn_norm",
}


class TowerKeys(Spec):
    """What both encoders read."""

    architectures: tuple[str, ...] | None = None
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(12, gt=0, le=10_000)
    num_attention_heads: int = Field(gt=0)
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = Field(1e-5, gt=0)
    attention_dropout: float = Field(0.0, ge=0, lt=1)


class TextKeys(TowerKeys):
    vocab_size: int = Field(49408, gt=0)
    hidden_size: int = Field(512, gt=0)
    intermediate_size: int = Field(2048, gt=0)
    num_attention_heads: int = Field(8, gt=0)
    max_position_embeddings: int = Field(77, gt=0)


class VisionKeys(TowerKeys):
    hidden_size: int = Field(768, gt=0)
    intermediate_size: int = Field(3072, gt=0)
    num_attention_heads: int = Field(12, gt=0)
    image_size: int = Field(224, gt=0)
    patch_size: int = Field(32, gt=0)
    num_channels: int = Field(3, gt=0)


class Keys(Spec):
    """What is read of a config with both."""

    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    projection_dim: int = Field(512, gt=0)
    logit_scale_init_value: float = 2.6592


class Tower(Family):
    """What both encoders share."""

    spelled = ("architectures", "hidden_act")
    prefix: str
    stem: str

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return config

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def to_hf(self, spec: Model, rest: Mapping[str, Any]) -> dict[str, Any]:
        config = super().to_hf(spec, rest)
        return {key: value for key, value in config.items() if value is not None or key in rest}

    def block(self, keys: Any) -> Block:
        tasks.task_of(keys.architectures, self.prefix, ("Model",), default="Model")
        return Block(
            mixer=vit.heads_of(keys, bias=BIASES, dropout=keys.attention_dropout),
            ffn=MLP(hidden=keys.intermediate_size, activation=vit.activation_of(keys), gated=False, bias=True),
            norm=Layer(eps=keys.layer_norm_eps),
        )

    def rules(self, spec: Any) -> list[Rule]:
        """Names of today's files come first; a model of its own had its stem before them."""
        body = self.body(spec)
        return [*body, *within(body, disk=f"{self.stem}.", ours="")]

    def body(self, spec: Any) -> list[Rule]:
        raise NotImplementedError


class ClipText(Tower):
    """CLIP's reader of texts. The state of the last token of each document is its pooled output."""

    model_type = "clip_text_model"
    architecture = "CLIPTextModel"
    keys = TextKeys
    carried: Mapping[str, Any] = {
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
        "projection_dim": 512,
        "pad_token_id": 1,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    prefix = "CLIPText"
    stem = "text_model"

    def spec(self, keys: Any) -> Transformer:
        block = self.block(keys)
        return Transformer(
            dim=keys.hidden_size,
            vocab=keys.vocab_size,
            layers=("layer",) * keys.num_hidden_layers,
            blocks={"layer": block},
            embed=Tokens(positions=Learned(size=keys.max_position_embeddings)),
            head=Project(pool="last"),
            final_norm=block.norm,
            context=keys.max_position_embeddings,
        )

    def values(self, spec: Any) -> dict[str, Any]:
        block = spec.blocks[spec.layers[0]] if isinstance(spec, Transformer) else None
        if block is None or not isinstance(block.mixer, Attention) or not isinstance(block.ffn, MLP):
            raise self.cannot("each layer must be attention, then an mlp")
        return {
            "architectures": [self.architecture],
            "vocab_size": spec.vocab,
            "hidden_size": spec.dim,
            "intermediate_size": block.ffn.hidden,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": block.mixer.heads,
            "max_position_embeddings": spec.context or 77,
            "hidden_act": next((name for name, one in vit.ACTIVATIONS.items() if one == block.ffn.activation), "quick_gelu"),
            "layer_norm_eps": block.norm.eps if isinstance(block.norm, Layer) else 1e-5,
            "attention_dropout": block.mixer.dropout,
        }

    def body(self, spec: Any) -> list[Rule]:
        return [
            Rename("embeddings.position_embedding", "embed.positions"),
            Rename("embeddings.token_embedding", "embed"),
            Drop("embeddings.position_ids"),  # their numbers, which transformers stored before 4.31
            *(Rename(f"encoder.layers.{{i}}.{theirs}", f"layers.{{i}}.{mine}") for theirs, mine in NAMES.items()),
            Rename("final_layer_norm", "final_norm"),
        ]


class ClipVision(Tower):
    """CLIP's reader of images. The state of the vector that stands before the patches is its pooled output."""

    model_type = "clip_vision_model"
    architecture = "CLIPVisionModel"
    keys = VisionKeys
    carried: Mapping[str, Any] = {"initializer_range": 0.02, "initializer_factor": 1.0, "projection_dim": 512}
    prefix = "CLIPVision"
    stem = "vision_model"

    def spec(self, keys: Any) -> Transformer:
        block = self.block(keys)
        return vit.encoder(keys, block, vit.patches_of(keys).replace(bias=False, norm=block.norm), Project())

    def values(self, spec: Any) -> dict[str, Any]:
        block, embed = vit.parts(self, spec)
        shared = vit.shared_values(spec, block, embed)
        return {"architectures": [self.architecture], **shared, "attention_dropout": block.mixer.dropout}

    def body(self, spec: Any) -> list[Rule]:
        embed, dim = spec.embed, spec.dim
        return [
            Reshape("embeddings.class_embedding", "embed.start.weight", there=(dim,), here=(1, dim)),
            vit.convolution("embeddings.patch_embedding.weight", embed, dim),
            Rename("embeddings.position_embedding", "embed.positions"),
            Drop("embeddings.position_ids"),
            Rename("pre_layrnorm", "embed.norm"),
            *(Rename(f"encoder.layers.{{i}}.{theirs}", f"layers.{{i}}.{mine}") for theirs, mine in NAMES.items()),
            Rename("post_layernorm", "final_norm"),
        ]


class Clip(Family):
    """CLIP."""

    model_type = "clip"
    architecture = "CLIPModel"
    keys = Keys
    carried: Mapping[str, Any] = {"initializer_factor": 1.0}
    spelled = ("text_config", "vision_config")

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        """First files have corrections of each part beside it; parts may be left out."""
        for name in ("text_config", "vision_config"):
            config[name] = {**(config.get(name) or {}), **(config.pop(f"{name}_dict", None) or {})}
        return config

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in LEGACY]

    def to_hf(self, spec: Model, rest: Mapping[str, Any]) -> dict[str, Any]:
        config = super().to_hf(spec, rest)
        return {key: value for key, value in config.items() if value is not None or key in rest}

    def spec(self, keys: Any) -> DualEncoder:
        text, vision = inner(CLIP_TEXT, keys.text_config), inner(CLIP_VISION, keys.vision_config)
        end = keys.text_config.get("eos_token_id", CLIP_TEXT.carried["eos_token_id"])
        if not isinstance(end, int):
            raise ConfigError(f"config.json: text_config.eos_token_id {end!r} must be one token", field="text_config.eos_token_id")
        return DualEncoder(
            text=text.replace(head=Project(pool="last", size=keys.projection_dim, normalize=True)),
            vision=vision.replace(head=Project(size=keys.projection_dim, normalize=True)),
            scale=keys.logit_scale_init_value,
            end=None if end == HIGHEST else end,
        )

    def values(self, spec: Any) -> dict[str, Any]:
        if not isinstance(spec, DualEncoder):
            raise self.cannot("it must be a dual_encoder")
        size = spec.text.head.size if isinstance(spec.text.head, Project) else None
        return {
            "text_config": {
                **outer(CLIP_TEXT, spec.text.replace(head=Project(pool="last"))),
                "eos_token_id": HIGHEST if spec.end is None else spec.end,
            },
            "vision_config": outer(CLIP_VISION, spec.vision.replace(head=Project())),
            "projection_dim": spec.text.dim if size is None else size,
            "logit_scale_init_value": spec.scale,
        }

    def rules(self, spec: DualEncoder) -> list[Rule]:
        return [
            *within(CLIP_TEXT.body(spec.text), disk="text_model.", ours="text."),
            *within(CLIP_VISION.body(spec.vision), disk="vision_model.", ours="vision."),
            Rename("text_projection", "text.head.out"),
            Rename("visual_projection", "vision.head.out"),
            Reshape("logit_scale", "scale.weight", there=(), here=()),
        ]


def inner(family: Family, config: Mapping[str, Any]) -> Transformer:
    """The spec that a part of a config says."""
    spec, _ = family.to_spec({key: value for key, value in config.items() if key != "architectures"})
    assert isinstance(spec, Transformer)
    return spec


def outer(family: Family, spec: Transformer) -> dict[str, Any]:
    """The part of a config that says `spec`, with what transformers takes for all it does not read."""
    config = family.to_hf(spec, {})
    return {key: value for key, value in config.items() if key != "architectures" and (value is not None or key in family.carried)}


CLIP_TEXT, CLIP_VISION = ClipText(), ClipVision()
for _family in (CLIP_TEXT, CLIP_VISION, Clip()):
    families.add(_family.model_type, _family)
