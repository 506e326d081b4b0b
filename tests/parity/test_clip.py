"""ViT, CLIP's two readers and CLIP against transformers, in fp32, on tiny models whose every parameter is redrawn.

Rows of texts end at different places, and images differ. The way there and back. A mutation of any one tensor or key on our side
alone must show.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import families
from trivium.io.tensors import read_weights
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
TOLERANCE = 1e-5  # of the outputs' standard deviation


def tiny(name: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
    model_class = getattr(transformers, name)
    model = model_class._from_config(model_class.config_class(**keys), attn_implementation="eager").eval()
    hf.redraw(model, seed=0)
    with torch.no_grad():
        for table, parameter in model.named_parameters():
            if table.endswith(("position_embedding.weight", "position_embeddings", "cls_token", "class_embedding")):
                parameter.mul_(2)
            elif "patch_embedding" in table and parameter.dim() == 4:
                parameter.mul_(parameter.shape[1] ** 0.5 / parameter[0].numel() ** 0.5)
            elif table == "logit_scale":
                parameter.fill_(1.3)
    return model


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model = tiny(*TABLE[request.param])
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


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


def off(model: BuiltModel[Any], config: Any, expected: torch.Tensor) -> float:
    """The largest difference, in standard deviations."""
    return ((ours_of(model, config) - expected).abs().max() / expected.std()).item()


@pytest.mark.concept("T03.06", part="models/dual_encoder.py")
@pytest.mark.concept("T03.06", part="nn/patches.py")
def test_outputs(case):
    theirs, path = case
    expected = theirs_of(theirs)
    assert expected.std() > 0.2
    assert off(directory.read(path).model, theirs.config, expected) < TOLERANCE


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


def test_every_tensor_matters(case):
    """Changing any one tensor on our side alone breaks parity; a bias on the keys moves no score in exact arithmetic."""
    theirs, path = case
    expected = theirs_of(theirs)
    model = directory.read(path).model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.add_(0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0)))
        there = off(model, theirs.config, expected)
        assert there < 10 * TOLERANCE if name.endswith("k.bias") else there > 100 * TOLERANCE, name
        parameter.copy_(before)


def keys_of(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key that a family reads, with the way to it and its value; those of the parts too."""
    for key in sorted(families.get(config["model_type"]).keys.model_fields):
        value = config.get(key)
        if isinstance(value, dict) and "model_type" in value:
            yield from keys_of(value, (*path, key))
        else:
            yield (*path, key), value


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = path
    return {**config, key: changed(config[key], tuple(rest), value) if rest else value}


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity, is refused, or (dropout, where training starts) shows in the spec."""
    theirs, path = case
    expected = theirs_of(theirs)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    spec, refused = directory.read(path).spec, set()
    for where, value in keys_of(config):
        key = where[-1]
        if isinstance(value, bool):
            other: Any = not value
        elif key == "architectures":
            other = ["CLIPVisionModelWithProjection"] if len(where) == 1 else None
        elif key == "id2label":
            other = {str(i): str(i) for i in range(9)}
        elif key == "hidden_act":
            other = "silu"
        elif key == "pooler_act":
            other = "gelu"
        elif key == "pooler_output_size":
            other = 3
        else:
            other = 0.75 if "dropout" in key else 2 * value
        (tmp_path / "config.json").write_text(json.dumps(changed(config, where, other)))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            refused.add(key)
            continue
        if "dropout" in key or key == "logit_scale_init_value":
            assert loaded.spec != spec and off(loaded.model, theirs.config, expected) < TOLERANCE, where
        elif key not in ("architectures", "id2label"):  # id2label is read where there is a classifier, which then does not fit
            assert off(loaded.model, theirs.config, expected) > 100 * TOLERANCE, where
    assert not refused & {"hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_dropout", "num_attention_heads"}
    assert refused >= {"hidden_size", "num_hidden_layers", "intermediate_size"}


def test_every_key_takes_two_values():
    for name in ("vit", "clip_text_model", "clip_vision_model", "clip"):
        family = families.get(name)
        configs = [getattr(transformers, one).config_class(**keys).to_dict() for one, keys in TABLE.values()]
        written = [config for config in configs if config["model_type"] == name]
        for key in {*family.keys.model_fields, *family.carried} - {"architectures", "id2label", "pooler_act"}:
            assert len({json.dumps(config[key], sort_keys=True, default=str) for config in written}) > 1, f"{name}: {key}"


@pytest.mark.concept("T03.06", part="io/hf/clip.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    """Files equal byte for byte; transformers loads ours, gives the same and writes the same again."""
    theirs, path = case
    loaded = directory.read(path)
    directory.write(tmp_path / "ours", loaded.model, family=loaded.family, rest=loaded.rest)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    back, report = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(theirs_of(back), theirs_of(theirs))
    ours, wanted = (json.loads((where / "config.json").read_text()) for where in (tmp_path / "ours", path))
    assert ours == wanted
    again = directory.read(tmp_path / "ours")
    assert again.spec == loaded.spec and again.rest == loaded.rest
    directory.write(tmp_path / "native", loaded.model)
    native = directory.read(tmp_path / "native")
    assert native.spec == loaded.spec and torch.equal(ours_of(native.model, theirs.config), ours_of(loaded.model, theirs.config))


@pytest.mark.parametrize("name", [name for name, (model, _) in TABLE.items() if model != "CLIPTextModel"])
def test_a_config_without_what_it_carried(name, tmp_path):
    """Written from the spec alone, a config says the same model; where a text ends is not for its bare reader to say."""
    theirs = tiny(*TABLE[name])
    loaded = directory.read(hf.save(theirs, tmp_path / "theirs"))
    directory.write(tmp_path / "ours", loaded.model, family=loaded.family)
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(theirs_of(back), theirs_of(theirs))


def test_files_of_transformers_4(tmp_path):
    """Settings of generation in every part, corrections of parts beside them, numbers of positions among the tensors."""
    theirs = tiny(*TABLE["clip-highest"])
    hf.save(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("text_config", "vision_config"):
        settings = {"num_beams": 1, "top_p": 1.0, "is_decoder": False, "bad_words_ids": None, "architectures": None, "torchscript": False}
        config[f"{name}_dict"] = {"hidden_size": config[name]["hidden_size"]}
        config[name] |= {**settings, "hidden_size": 12}
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    weights = {name: lazy.load().clone() for name, lazy in read_weights(tmp_path).items()}
    weights |= {f"{part}_model.embeddings.position_ids": torch.arange(9)[None] for part in ("text", "vision")}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    loaded = directory.read(tmp_path)
    assert off(loaded.model, theirs.config, theirs_of(theirs)) < TOLERANCE
    assert loaded.spec.end is None and loaded.spec.vision.head == Project(size=22, normalize=True)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("vit", {"image_size": 13}, "multiple of patch_size"),
        ("vit", {"image_size": [12, 12]}, "image_size"),
        ("vit", {"num_attention_heads": 5}, "num_attention_heads"),
        ("vit", {"pooler_output_size": 5}, "pooler_output_size"),
        ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "architectures"),
        ("vision", {"hidden_act": "mish"}, "hidden_act 'mish'"),
        ("vision", {"use_head": True}, "use_head"),
        ("clip", {"text_config": {**READS, "hiden_size": 3}}, "did you mean hidden_size"),
        ("clip", {"text_config": {**READS, "eos_token_id": [1, 5]}}, "eos_token_id"),
    ],
)
def test_configs_that_cannot_be_read_say_why(name, change, message):
    model, keys = TABLE[name]
    config = getattr(transformers, model).config_class(**keys).to_diff_dict()
    with pytest.raises(ConfigError, match=message):
        families.get(config["model_type"]).to_spec({**config, **change})


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("vit", {"causal": True}, "causal"),
        ("vit", {"head": {"kind": "project", "pool": "mean"}}, "pool"),
        ("vit", {"embed": {"kind": "tokens"}}, "embed patches"),
        ("vision", {"embed": {"kind": "patches", "image": 12, "patch": 4}}, "positions"),
        ("text", {"causal": False}, "causal"),
        ("text", {"context": 7}, "positions.size"),
    ],
)
def test_what_the_families_cannot_say_is_refused(name, change, reason):
    model, keys = TABLE[name]
    config = getattr(transformers, model).config_class(**keys).to_diff_dict()
    family = families.get(config["model_type"])
    spec, rest = family.to_spec(config)
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(**change), rest)
