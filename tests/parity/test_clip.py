"""ViT, CLIP's two readers and CLIP against transformers, in fp32, on tiny models whose every parameter is redrawn.

Rows of texts end at different places, and images differ (see `harness.py`).
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
from tests.parity.harness import TOLERANCE, Family, Native, Refusals, apart, config_of, tensors_of
from trivium.io import directory
from trivium.models.dual_encoder import DualEncoderModel
from trivium.models.model import BuiltModel
from trivium.nn.heads_task import Classifier, Project
from trivium.nn.inputs import Inputs
from trivium.nn.patches import Patches

SEES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6, "image_size": 12, "patch_size": 4,
    "layer_norm_eps": 0.01,
}  # fmt: skip
SEES_TOO: dict[str, Any] = {
    "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 10, "patch_size": 5,
    "num_channels": 2, "layer_norm_eps": 0.05, "hidden_act": "relu", "initializer_range": 0.03,
}  # fmt: skip
CLIPS = {"attention_dropout": 0.5, "initializer_factor": 0.5, "projection_dim": 7}
READS: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 19, "layer_norm_eps": 0.02, "eos_token_id": 90,
}  # fmt: skip
READS_TOO: dict[str, Any] = {
    "vocab_size": 89, "hidden_size": 30, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 25, "layer_norm_eps": 0.03, "hidden_act": "gelu", "initializer_range": 0.03, "pad_token_id": 3,
    "bos_token_id": 4, "eos_token_id": 2,
}  # fmt: skip
RATES = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.125, "qkv_bias": False, "encoder_stride": 5}
NAMES = {"id2label": {0: "no", 1: "perhaps", 2: "yes"}, "label2id": {"no": 0, "perhaps": 1, "yes": 2}}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", SEES),
    "vit-plain": ("ViTModel", SEES_TOO | RATES),
    "vit-classes": ("ViTForImageClassification", SEES_TOO | NAMES),
    "vit-two-classes": ("ViTForImageClassification", SEES),
    "vision": ("CLIPVisionModel", SEES),
    "vision-relu": ("CLIPVisionModel", SEES_TOO | CLIPS),
    "text": ("CLIPTextModel", READS),
    "text-gelu": ("CLIPTextModel", READS_TOO | CLIPS),
    "clip": ("CLIPModel", {"text_config": READS, "vision_config": SEES, "projection_dim": 14}),
    "clip-highest": (
        "CLIPModel",
        {
            "text_config": READS_TOO | CLIPS, "vision_config": SEES_TOO | CLIPS, "projection_dim": 22, "logit_scale_init_value": 2.0,
            "initializer_factor": 0.25,
        },
    ),
}  # fmt: skip
LENGTHS = [17, 9, 12]


def tiny(kind: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
    model = hf.tiny(kind, **keys)
    with torch.no_grad():
        for table, parameter in model.named_parameters():
            if table.endswith(("position_embedding.weight", "position_embeddings", "cls_token", "class_embedding")):
                parameter.mul_(2)
            elif "patch_embedding" in table and parameter.dim() == 4:
                parameter.mul_(parameter.shape[1] ** 0.5 / parameter[0].numel() ** 0.5)
            elif table == "logit_scale":
                parameter.fill_(1.3)
    return model


def pictures(config: Any, count: int = 4) -> torch.Tensor:
    shape = (count, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def texts(config: Any) -> torch.Tensor:
    """Rows that end with the end token, behind which there is anything; where it is 2, the highest token ends them."""
    tokens = torch.randint(7, 80, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(LENGTHS):
        tokens[row, length - 1] = 88 if config.eos_token_id == 2 else config.eos_token_id
    return tokens


@torch.no_grad()
def theirs_of(model: transformers.PreTrainedModel) -> torch.Tensor:
    """All that the model says, in one vector."""
    config = model.config
    match config.model_type:
        case "clip":
            out = model(input_ids=texts(config.text_config), pixel_values=pictures(config.vision_config))
            parts = [out.logits_per_image, out.logits_per_text.T, out.text_embeds, out.image_embeds]
        case "clip_text_model":
            out = model(input_ids=texts(config))
            parts = [out.pooler_output, *(row[:length] for row, length in zip(out.last_hidden_state, LENGTHS, strict=True))]
        case "clip_vision_model":
            out = model(pixel_values=pictures(config))
            parts = [out.pooler_output, model.post_layernorm(out.last_hidden_state)]
        case _:
            out = model(pixel_values=pictures(config))
            parts = [out.logits] if "logits" in out else [out.pooler_output, out.last_hidden_state]
    return torch.cat([part.flatten() for part in parts])


@torch.no_grad()
def ours_of(model: BuiltModel[Any], config: Any) -> torch.Tensor:
    """The same of ours; the bare reader of texts is told where each row ends, CLIP is not."""
    if isinstance(model, DualEncoderModel):
        tokens, images = texts(config.text_config), pictures(config.vision_config)
        logits = model(Inputs(tokens, images=images)).logits
        parts = [logits, logits, model.encode_text(tokens), model.encode_images(images)]
    elif isinstance(model.spec.embed, Patches):
        out = model(Inputs(images=pictures(config)))
        parts = [out.logits] if isinstance(model.spec.head, Classifier) else [out.logits, out.hidden]
    else:
        there = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        out = model(Inputs(texts(config), segments=there.long() - 1))
        parts = [out.logits, *(row[:length] for row, length in zip(out.hidden, LENGTHS, strict=True))]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.concept("T03.06", part="models/dual_encoder.py")
@pytest.mark.concept("T03.06", part="nn/patches.py")
@pytest.mark.concept("T03.06", part="io/hf/clip.py")
class TestClip(Family, Native, Refusals):
    table = TABLE
    noise = 0.1
    alike = ("architectures", "id2label", "pooler_act")
    tiny = staticmethod(tiny)
    theirs = staticmethod(theirs_of)
    ours = staticmethod(ours_of)
    spread = (0.2, math.inf)
    shown = ("logit_scale_init_value",)
    others = {"id2label": {str(i): str(i) for i in range(9)}, "hidden_act": "silu", "pooler_act": "gelu", "pooler_output_size": 3}
    heeded = ("hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_dropout", "num_attention_heads")
    refused = ("hidden_size", "num_hidden_layers", "intermediate_size")
    unreadable = [
        ("vit", {"image_size": 13}, "multiple of patch_size"),
        ("vit", {"image_size": [12, 12]}, "image_size"),
        ("vit", {"num_attention_heads": 5}, "num_attention_heads"),
        ("vit", {"pooler_output_size": 5}, "pooler_output_size"),
        ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "architectures"),
        ("vision", {"hidden_act": "mish"}, "hidden_act 'mish'"),
        ("vision", {"use_head": True}, "use_head"),
        ("clip", {"text_config": {**READS, "hiden_size": 3}}, "did you mean hidden_size"),
        ("clip", {"text_config": {**READS, "eos_token_id": [1, 5]}}, "eos_token_id"),
    ]
    unsayable = [
        ("vit", {"causal": True}, "causal"),
        ("vit", {"head": {"kind": "project", "pool": "mean"}}, "pool"),
        ("vit", {"embed": {"kind": "tokens"}}, "embed patches"),
        ("vision", {"embed": {"kind": "patches", "image": 12, "patch": 4}}, "positions"),
        ("text", {"causal": False}, "causal"),
        ("text", {"context": 7}, "positions.size"),
    ]

    def silent(self, name: str, spec: Any) -> bool:
        return name.endswith("k.bias")

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if key == "architectures":  # of the whole; parts name none
            return ["CLIPVisionModelWithProjection"] if value else None
        return super().other(key, value, config)

    def idle(self, config: dict[str, Any]) -> tuple[str, ...]:
        """`id2label` is read where there is a classifier, which then does not fit."""
        return "architectures", "id2label"

    def test_a_config_without_what_it_carried(self, case, tmp_path):
        """Written from the spec alone, a config says the same model; where a text ends is not for its bare reader to say."""
        if case.theirs.config.model_type == "clip_text_model":
            pytest.skip("the bare reader of texts")
        directory.write(tmp_path, case.read().model, family=case.read().family, overwrite=True)
        back = type(case.theirs).from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(theirs_of(back), case.expected)


@pytest.mark.parametrize("name", [name for name, (model, _) in TABLE.items() if model == "CLIPModel"])
def test_gradients(name, tmp_path):
    """Of everything, pixels and the scale included."""
    theirs = tiny(*TABLE[name])
    ours = directory.read(hf.save(theirs, tmp_path)).model
    tokens, mine = texts(theirs.config.text_config), pictures(theirs.config.vision_config).requires_grad_()
    other = pictures(theirs.config.vision_config).requires_grad_()
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    (ours(Inputs(tokens, images=mine)).logits * weight).sum().backward()
    (theirs(input_ids=tokens, pixel_values=other).logits_per_image * weight).sum().backward()
    pairs = {
        "pixels": (mine, other),
        "scale": (ours.scale.weight, theirs.logit_scale),
        "queries": (ours.text.layers[0].mixer.inp.q.weight, theirs.text_model.encoder.layers[0].self_attn.q_proj.weight),
        "start": (ours.vision.embed.start.weight, theirs.vision_model.embeddings.class_embedding),
        "patches": (ours.vision.embed.project.weight, theirs.vision_model.embeddings.patch_embedding.weight),
    }
    for name, (a, b) in pairs.items():
        assert (a.grad - b.grad.view_as(a)).abs().max() < 1e-4 * b.grad.std() if b.dim() else torch.isclose(a.grad, b.grad, rtol=1e-4), name


def test_files_of_transformers_4(tmp_path):
    """Settings of generation in every part, corrections of parts beside them, numbers of positions among the tensors."""
    theirs = tiny(*TABLE["clip-highest"])
    config = config_of(hf.save(theirs, tmp_path))
    for name in ("text_config", "vision_config"):
        settings = {"num_beams": 1, "top_p": 1.0, "is_decoder": False, "bad_words_ids": None, "architectures": None, "torchscript": False}
        config[f"{name}_dict"] = {"hidden_size": config[name]["hidden_size"]}
        config[name] |= {**settings, "hidden_size": 12}
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    weights = tensors_of(tmp_path)
    weights |= {f"{part}_model.embeddings.position_ids": torch.arange(9)[None] for part in ("text", "vision")}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    loaded = directory.read(tmp_path)
    assert apart(ours_of(loaded.model, theirs.config), theirs_of(theirs)) < TOLERANCE
    assert loaded.spec.end is None and loaded.spec.vision.head == Project(size=22, normalize=True)
