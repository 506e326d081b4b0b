"""The family `llava`: an encoder of images, a projector of two maps, and a language model in which they stand as tokens.

Both are families of their own, which this one joins: CLIP's reader of images with any family here that makes a causal stack.
arXiv:2304.08485, arXiv:2310.03744. Features of several vision layers at once are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec, validate
from ...models.model import Model
from ...models.transformer import Transformer
from ...models.vision_language import VisionLanguage
from ...nn.activations import Activation
from ...nn.heads import LMHead, NoHead
from ...nn.heads_task import Project
from ...nn.resampler import MLPConnector
from ..rules import Rename, Rule, within
from . import Family, families
from .clip import CLIP_VISION, LEGACY, inner, outer
from .gpt2 import GPT2_ACTIVATIONS as ACTIVATIONS

UNREAD = LEGACY | {"ignore_index"}  # the loss's business
DEFAULT_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14, "image_size": 336, "num_hidden_layers": 24}
DEFAULTS = {  # what transformers takes where a part is left out altogether
    "vision_config": {"model_type": "clip_vision_model", **DEFAULT_VISION, "num_attention_heads": 16, "projection_dim": 768},
    "text_config": {"model_type": "llama"},
}


class Keys(Spec):
    """What is read from config.json."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    image_token_index: int = Field(32000, ge=0)
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_feature_layer: int = -2
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False


class Llava(Family):
    """LLaVA 1.5, and what has its shape."""

    model_type = "llava"
    architecture = "LlavaForConditionalGeneration"
    keys = Keys
    carried: Mapping[str, Any] = {"image_seq_length": 576}
    spelled = ("text_config", "vision_config", "projector_hidden_act", "vision_feature_layer", "tie_word_embeddings")

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        if "image_token_id" in config:
            config["image_token_index"] = config.pop("image_token_id")
        for name, default in DEFAULTS.items():
            config[name] = {"model_type": default["model_type"], **(config.get(name) or default)}
        config["text_config"] = family_of(config["text_config"]).modernize(config["text_config"])
        return config

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        return [key for key in super().unknown_keys(config) if key not in UNREAD]

    def to_hf(self, spec: Model, rest: Mapping[str, Any]) -> dict[str, Any]:
        config = super().to_hf(spec, rest)
        return {key: value for key, value in config.items() if value is not None or key in rest}

    def spec(self, keys: Any) -> VisionLanguage:
        if (kind := keys.vision_config.get("model_type")) != CLIP_VISION.model_type:
            message = f"vision_config.model_type {kind!r} is not supported (known: {CLIP_VISION.model_type})"
            raise ConfigError(f"config.json: {message}", field="vision_config.model_type", value=kind)
        vision = inner(CLIP_VISION, keys.vision_config).replace(head=NoHead())
        text = inner(family_of(keys.text_config), keys.text_config)
        if keys.tie_word_embeddings and isinstance(text.head, LMHead):
            text = text.replace(head=text.head.replace(tied=True))
        layers, layer = len(vision.layers), keys.vision_feature_layer
        if not -layers - 1 <= layer <= layers:
            message = f"vision_feature_layer {layer} is none of the {layers} layers of vision_config"
            raise ConfigError(f"config.json: {message}", field="vision_feature_layer", value=layer)
        said = {
            "vision": vision,
            "connector": MLPConnector(activation=activation_of(keys), bias=keys.multimodal_projector_bias),
            "text": text,
            "image_token": keys.image_token_index,
            "depth": layer % (layers + 1),
            "start": keys.vision_feature_select_strategy == "full",
        }
        return validate(VisionLanguage, said, where="config.json")

    def values(self, spec: Any) -> dict[str, Any]:
        if not isinstance(spec, VisionLanguage) or not isinstance(spec.connector, MLPConnector) or spec.depth is None:
            raise self.cannot("it must be a vision_language with a depth and a connector of kind mlp")
        activation = spec.connector.activation
        return {
            "vision_config": outer(CLIP_VISION, spec.vision.replace(head=Project())),
            "text_config": outer(self._text_family(spec.text), spec.text),
            "image_token_index": spec.image_token,
            "projector_hidden_act": next((name for name, one in ACTIVATIONS.items() if one == activation), "gelu"),
            "vision_feature_select_strategy": "full" if spec.start else "default",
            "vision_feature_layer": spec.depth - len(spec.vision.layers) - 1,
            "multimodal_projector_bias": spec.connector.bias,
            "tie_word_embeddings": isinstance(spec.text.head, LMHead) and spec.text.head.tied,
        }

    def rules(self, spec: VisionLanguage) -> list[Rule]:
        vision, text = CLIP_VISION.body(spec.vision), self._text_family(spec.text).rules(spec.text)
        projector = "multi_modal_projector"
        return [
            *within(text, disk="language_model.", ours="text."),
            Rename(f"{projector}.linear_1", "connector.up"),
            Rename(f"{projector}.linear_2", "connector.out"),
            *within(vision, disk="vision_tower.", ours="vision."),
            *within(vision, disk="vision_tower.vision_model.", ours="vision."),  # as transformers 4 wrote them
        ]

    def _text_family(self, spec: Transformer) -> Family:
        """The first family, of those whose models LLaVAs are made of, that has words for `spec`."""
        for name in ("llama", "mistral", "qwen2"):
            family = families.get(name)
            try:
                family.to_hf(spec, {})
            except ConfigError:
                continue
            return family
        raise self.cannot("its text is no model of type llama, mistral or qwen2")


def family_of(config: Mapping[str, Any]) -> Family:
    return families.get(str(config.get("model_type")), field="config.json.text_config.model_type")


def activation_of(keys: Any) -> Activation:
    name = keys.projector_hidden_act
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(f"config.json: projector_hidden_act {name!r} is not supported (known: {known})", field="projector_hidden_act")
    return ACTIVATIONS[name]


families.add(Llava.model_type, Llava())
