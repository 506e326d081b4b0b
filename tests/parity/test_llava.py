"""LLaVA against transformers, in fp32, on tiny models whose every parameter is redrawn (see `harness.py`), greedy answers among them.

Rows have one image, two or none, at different places.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import Family, Native, apart, config_of, tensors_of
from trivium.core.errors import ConfigError, TriviumError
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.io.hf import families
from trivium.models.vision_language import VisionLanguageModel
from trivium.nn.inputs import Inputs

IMAGE = 95
TOLERANCE = 3e-5  # of the logits' standard deviation
SEES: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 8, "patch_size": 4,
    "layer_norm_eps": 0.01, "model_type": "clip_vision_model",
}  # fmt: skip
SEES_TOO: dict[str, Any] = {
    "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 9, "patch_size": 3,
    "num_channels": 2, "layer_norm_eps": 0.02, "hidden_act": "gelu", "attention_dropout": 0.5, "model_type": "clip_vision_model",
}  # fmt: skip
WRITES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rms_norm_eps": 0.01,
    "model_type": "llama",
}  # fmt: skip
WRITES_TOO: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
    "head_dim": 8, "max_position_embeddings": 96, "rope_parameters": {"rope_type": "default", "rope_theta": 20.0}, "sliding_window": 9,
    "rms_norm_eps": 0.02, "tie_word_embeddings": True, "model_type": "mistral",
}  # fmt: skip


TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", {"vision_config": SEES, "text_config": WRITES, "image_token_index": IMAGE}),
    "llava-mistral": ("llava", {
        "vision_config": SEES_TOO, "text_config": WRITES_TOO, "image_token_index": IMAGE - 1, "image_seq_length": 10,
        "projector_hidden_act": "relu", "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
        "multimodal_projector_bias": False, "tie_word_embeddings": True,
    }),
}  # fmt: skip
TOLERANCE = 3e-5  # of the logits' standard deviation


def tiny(kind: str, keys: dict[str, Any]) -> transformers.LlavaForConditionalGeneration:
    parts = {name: transformers.AutoConfig.for_model(**keys[name]) for name in ("vision_config", "text_config")}
    model = hf.tiny(kind, **{**keys, **parts})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patch_embedding" in name:
                parameter.mul_(parameter.shape[1] ** 0.5 / parameter[0].numel() ** 0.5)
    return model


def vectors(config: Any) -> int:
    sees = config.vision_config
    return (sees.image_size // sees.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")


def rows(config: Any) -> list[list[int]]:
    """Texts with two images, none and one."""
    generator = torch.Generator().manual_seed(1)
    image = [config.image_token_index] * vectors(config)
    words = torch.randint(1, 90, (30,), generator=generator).tolist()
    return [words[:3] + image + words[3:5] + image, words[5:12], image + words[12:20]]


def pictures(config: Any) -> torch.Tensor:
    """For those rows, in order."""
    sees = config.vision_config
    shape = (3, sees.num_channels, sees.image_size, sees.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def batch(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens padded on the right, and which are there."""
    texts = rows(config)
    longest = max(len(text) for text in texts)
    there = torch.arange(longest) < torch.tensor([len(text) for text in texts])[:, None]
    return torch.tensor([text + [0] * (longest - len(text)) for text in texts]), there


@torch.no_grad()
def theirs_of(model: transformers.LlavaForConditionalGeneration) -> torch.Tensor:
    """[N, V], at each token that is there."""
    tokens, there = batch(model.config)
    return model(input_ids=tokens, pixel_values=pictures(model.config), attention_mask=there.long()).logits[there]


@torch.no_grad()
def ours_of(model: VisionLanguageModel, config: Any) -> torch.Tensor:
    tokens, there = batch(config)
    return model(Inputs(tokens, segments=there.long() - 1, images=pictures(config))).logits[there]


@pytest.mark.concept("T03.06", part="models/vision_language.py")
@pytest.mark.concept("T03.06", part="io/hf/llava.py")
class TestLlava(Family, Native):
    table = TABLE
    noise = 0.1
    tiny = staticmethod(tiny)
    theirs = staticmethod(theirs_of)
    ours = staticmethod(ours_of)
    tolerance = TOLERANCE
    moved = 3e-3
    spread = (0.5, math.inf)
    shown = ("max_position_embeddings",)
    heeded = ("layer_norm_eps", "rms_norm_eps", "vision_feature_layer", "rope_parameters")
    refused = ("vision_feature_select_strategy", "image_token_index", "multimodal_projector_bias", "hidden_size")

    def silent(self, name: str, spec: Any) -> bool:
        """A bias on the keys of what has no rotary positions, and what comes after the features."""
        return name.endswith("k.bias") or name.startswith((f"vision.layers.{spec.depth}.", "vision.final_norm."))

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if "hidden_act" in key:
            return "quick_gelu" if value != "quick_gelu" else "gelu"
        if key == "vision_feature_select_strategy":
            return "full" if value == "default" else "default"
        if key in ("architectures", "model_type"):
            return value
        return value - 1 if key == "vision_feature_layer" else super().other(key, value, config)

    def idle(self, config: dict[str, Any]) -> tuple[str, ...]:
        return ("tie_word_embeddings",)

    def test_gradients(self, case):
        theirs = case.theirs
        ours, (tokens, there) = case.read().model, batch(theirs.config)
        mine, other = (pictures(theirs.config).requires_grad_() for _ in range(2))
        weight = torch.randn(int(there.sum()), theirs.config.text_config.vocab_size, generator=torch.Generator().manual_seed(2))
        (ours(Inputs(tokens, segments=there.long() - 1, images=mine)).logits[there] * weight).sum().backward()
        (theirs(input_ids=tokens, pixel_values=other, attention_mask=there.long()).logits[there] * weight).sum().backward()
        pairs = {
            "pixels": (mine, other),
            "projector": (ours.connector.up.weight, theirs.model.multi_modal_projector.linear_1.weight),
            "table": (ours.text.embed.weight, theirs.model.language_model.embed_tokens.weight),
            "vision": (ours.vision.layers[0].ffn.out.weight, theirs.model.vision_tower.encoder.layers[0].mlp.fc2.weight),
        }
        for name, (a, b) in pairs.items():
            assert (a.grad - b.grad).abs().max() < 1e-4 * b.grad.std(), name
        theirs.zero_grad()

    def test_greedy_answers(self, case):
        """With the images given once, from the cache, in a batch of different lengths; and naively, and by transformers."""
        theirs, model = case.theirs, case.read().model
        texts, images = rows(theirs.config), pictures(theirs.config)
        given = [images[:2], None, images[2:]]
        sampling = Sampling(temperature=0, max_tokens=6)
        answers = [one.ids for one in generate(model, texts, sampling, images=given)]
        assert answers == generate_naive(model, texts, sampling, images=given)
        assert answers == [one.ids for one in generate(model, texts, sampling, images=given, batch=1, chunk=4)]
        for text, pixels, answer in zip(texts, given, answers, strict=True):
            prompt = torch.tensor([text])
            out = theirs.generate(
                input_ids=prompt,
                **({} if pixels is None else {"pixel_values": pixels}),
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert out[0, len(text) :].tolist() == answer
        swapped = [one.ids for one in generate(model, texts, sampling, images=[images[1:], None, images[:1]])]
        assert swapped[1] == answers[1] and swapped != answers


def test_files_of_transformers_4(tmp_path):
    """What the first files have beside, and the name of the encoder in its tensors."""
    theirs = tiny(*TABLE["llava"])
    config = config_of(hf.save(theirs, tmp_path))
    config |= {"ignore_index": -100, "vocab_size": 101, "pad_token_id": 96, "torch_dtype": "float32"}
    config["text_config"] |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "_name_or_path": "somewhere"}
    config["vision_config"] |= {"vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors_of(tmp_path).items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert apart(ours_of(directory.read(tmp_path).model, theirs.config), theirs_of(theirs)) < TOLERANCE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ({"vision_feature_layer": -5}, "none of the 3 layers"),
        ({"vision_config": {**SEES, "model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({"text_config": {**WRITES, "model_type": "lama"}}, "llama"),
        ({"projector_hidden_act": "mish"}, "projector_hidden_act 'mish'"),
        ({"image_token_index": 200}, "image_token"),
        ({"image_grid": 3}, "image_grid"),
    ],
)
def test_configs_that_cannot_be_read_say_why(change, message, tmp_path):
    config = config_of(hf.save(tiny(*TABLE["llava"]), tmp_path))
    with pytest.raises(TriviumError, match=message):
        families.get("llava").to_spec({**config, **change})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"depth": None}, "depth"),
        ({"connector": {"kind": "resampler", "latents": 3, "heads": 2, "head_dim": 4, "hidden": 9}}, "connector"),
        ({"connector": {"kind": "mlp", "hidden": 9}}, "hidden"),
    ],
)
def test_what_the_family_cannot_say_is_refused(change, reason, tmp_path):
    loaded = directory.read(hf.save(tiny(*TABLE["llava"]), tmp_path))
    with pytest.raises(ConfigError, match=reason):
        families.get("llava").to_hf(loaded.spec.replace(**change), loaded.rest)
