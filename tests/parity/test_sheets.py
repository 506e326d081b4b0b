"""Reference sheets against transformers: parameters of every family on the meta device, tiny and as published; bytes of cache
against caches that are measured, ours and theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.parity import (
    hf,
    test_bart,
    test_bert,
    test_causal_classifiers,
    test_clip,
    test_deepseek,
    test_dense,
    test_gemma,
    test_gpt2,
    test_gpt_oss,
    test_llama,
    test_llava,
    test_mamba,
    test_mixtral,
    test_qwen3_next,
    test_t5,
)
from trivium.io import directory
from trivium.io.hf import families
from trivium.nn.inputs import Inputs
from trivium.recipes.inspect import inspect
from trivium.recipes.sheet import sheet, unloaded

FAMILIES = (
    *(test_bart, test_bert, test_causal_classifiers, test_clip, test_deepseek, test_dense, test_gemma, test_gpt2, test_gpt_oss, test_llama),
    *(test_llava, test_mamba, test_mixtral, test_qwen3_next, test_t5),
)
TABLE: dict[str, tuple[str, dict[str, Any]]] = {f"{m.__name__[18:]}-{name}": case for m in FAMILIES for name, case in m.TABLE.items()}
# What transformers keeps, and stores, as buffers: parameters of ours that no gradient or none of its own trains.
BUFFERS = {"bart": "final_logits_bias", "deepseek_v3": "e_score_correction_bias", "deepseek_v32": "e_score_correction_bias"}
# Sizes as published, which are the defaults of transformers' configs; those that take seconds to build are left out.
PUBLISHED = ("bart", "bert", "gemma2", "gemma3_text", "gpt2", "llama", "mamba", "mamba2", "mistral", "mixtral", "olmo2", "openai-gpt")
PUBLISHED += ("clip", "clip_text_model", "clip_vision_model", "phi3", "qwen2", "qwen3", "roberta", "smollm3", "t5", "vit", "xlm-roberta")


def theirs_of(kind: str, keys: dict[str, Any], *, device: str = "meta") -> transformers.PreTrainedModel:
    if kind == "llava":
        return test_llava.tiny(kind, keys)
    config_class, model_class = hf.classes(kind)
    with torch.device(device):
        model = model_class._from_config(config_class(**keys), attn_implementation="eager").eval()
        if kind == "t5" and keys.get("tie_word_embeddings") is False:  # fresh ones are tied even so; files of T5 v1.1 hold two tables
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    model.config.architectures = [model_class.__name__]
    return model


def counted(model: transformers.PreTrainedModel) -> int:
    stored = set(model.state_dict())
    kept = {name: buffer.numel() for name, buffer in model.named_buffers() if name in stored}
    assert all(name.endswith(BUFFERS.get(model.config.model_type, "none")) for name in kept), kept
    return model.num_parameters() + sum(kept.values())


@pytest.mark.concept("X.21", part="recipes/sheet.py")
@pytest.mark.parametrize("name", TABLE)
def test_sheet(name, tmp_path):
    """Of a bare config.json. Bytes per token and per row are those of two caches of ours that differ in length alone."""
    theirs = theirs_of(*TABLE[name])
    theirs.config.save_pretrained(tmp_path)
    model = unloaded(tmp_path / directory.CONFIG)
    assert model is not None and next(model.parameters()).is_meta
    found = sheet(model, context=600)
    assert found["parameters"] == counted(theirs), name
    decoders = [stack for stack in found["stacks"].values() if "cache_bytes" in stack["at"]]
    if not decoders:
        assert model.spec.kind == "dual_encoder" or not any(stack["causal"] for stack in found["stacks"].values())
        assert not any(stack["cache_bytes_per_token"] + stack["state_bytes_per_row"] for stack in found["stacks"].values())
        return
    (stack,) = decoders
    long, short = (model.cache(1, capacity).bytes for capacity in (1200, 600))
    assert stack["cache_bytes_per_token"] * 600 == long - short
    assert stack["state_bytes_per_row"] == short - 600 * stack["cache_bytes_per_token"]
    assert stack["at"]["cache_bytes"] == short + 600 * stack.get("memory_bytes_per_token", 0)


def test_every_family_has_a_sheet():
    kinds = {hf.classes(kind)[0].model_type for kind, _ in TABLE.values()}
    assert kinds == set(families.names())


@pytest.mark.concept("X.21", part="recipes/sheet.py")
@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_sizes(kind, tmp_path):
    theirs = theirs_of(families.get(kind).architecture, {})
    theirs.config.save_pretrained(tmp_path)
    model = unloaded(tmp_path)  # a directory without weights
    assert model is not None and sheet(model, context=8)["parameters"] == counted(theirs)


@pytest.mark.concept("X.21", part="recipes/sheet.py")
@pytest.mark.parametrize("name", ["llama-llama-gqa-biases", "gpt2-gpt2", "dense-qwen3-plain", "dense-olmo2-tied", "mixtral-window"])
def test_cache_bytes_are_those_that_transformers_holds(name, tmp_path):
    """By one more token, where all layers keep all tokens."""
    kind, keys = TABLE[name]
    if "sliding_window" in keys:
        keys = {**keys, "sliding_window": None}
    theirs = theirs_of(kind, {**keys, "use_cache": True}, device="cpu")
    theirs.config.save_pretrained(tmp_path)
    model = unloaded(tmp_path)
    assert model is not None
    held = []
    for length in (5, 6):
        cache = theirs(input_ids=torch.full((1, length), 7), use_cache=True).past_key_values
        held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    assert sheet(model)["stacks"]["transformer"]["cache_bytes_per_token"] == held[1] - held[0]


@pytest.mark.concept("X.21", part="recipes/sheet.py")
@pytest.mark.parametrize("name", ["bart-bart", "t5-t5", "t5-t5-v1.1"])
def test_what_a_memory_takes(name, tmp_path):
    """Measured in the cache: the keys and values of one more token of the source."""
    theirs = theirs_of(*TABLE[name], device="cpu")
    hf.save(theirs, tmp_path)
    model = directory.read(tmp_path).model
    held = []
    for length in (4, 5):
        cache = model.cache(1, 8)
        with torch.inference_mode():
            model(Inputs(torch.full((1, 2), 7), source=Inputs(torch.full((1, length), 7)), cache=cache))
        held.append(cache.bytes)
    assert sheet(model)["stacks"]["decoder"]["memory_bytes_per_token"] == held[1] - held[0]


def test_a_directory_with_weights_of_two_stacks_has_a_sheet(tmp_path: Path):
    hf.save(theirs_of(*test_t5.TABLE["t5"], device="cpu"), tmp_path)
    found = inspect(tmp_path)
    assert set(found["sheet"]["stacks"]) == {"encoder", "decoder"} and found["spec"]["kind"] == "encoder_decoder"
    assert any(row["what"] == "mixer attention, cross cross, ffn mlp" for row in found["layers"])
