"""Gemma 2 and 3 against transformers, as Llama is in `test_llama.py`, whose tests run here too; and their rolling caches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.test_llama import (  # noqa: F401 - the tests among them are collected here
    OTHER,
    SHAPE,
    cached_greedy,
    every_tensor_matters,
    off,
    test_export_is_what_transformers_writes,
    test_round_trip_is_bit_exact,
    tokens,
)
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import families
from trivium.models import count
from trivium.nn.inputs import Inputs

FULL, SLIDING = "full_attention", "sliding_attention"
TOLERANCE = 3e-5  # of the logits' standard deviation
ODD = {
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "pad_token_id": 3,
    "initializer_range": 0.03,
    "attention_dropout": 0.25,
    "use_cache": False,
}
PLAIN = {"num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 0.01, "max_position_embeddings": 64, "sliding_window": 7}
LOOSE = {
    **OTHER, **ODD, "num_key_value_heads": 1, "head_dim": 14, "rms_norm_eps": 0.05, "max_position_embeddings": 256, "sliding_window": 5,
    "attention_bias": True, "tie_word_embeddings": False, "query_pre_attn_scalar": 24, "hidden_activation": "gelu",
    "layer_types": [FULL, SLIDING],
}  # fmt: skip
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {**SHAPE, **PLAIN, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 8.0}),
    "gemma2-loose": ("gemma2", {
        **LOOSE, "attn_logit_softcapping": None, "final_logit_softcapping": None, "use_bidirectional_attention": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 40.0},
    }),
    "gemma3": ("gemma3_text", {**SHAPE, **PLAIN, "num_hidden_layers": 6, "query_pre_attn_scalar": 16}),
    "gemma3-loose": ("gemma3_text", {
        **LOOSE, "final_logit_softcapping": 3.0, "sliding_window_pattern": 2,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 90.0, "factor": 3.0}, SLIDING: {"rope_type": "default", "rope_theta": 30.0},
        },
    }),
    "gemma3-both-ways": ("gemma3_text", {
        **SHAPE, **PLAIN, "layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 8, "use_bidirectional_attention": True,
    }),
}  # fmt: skip


@pytest.fixture(scope="module", params=[name for name in TABLE if name != "gemma3-both-ways"])
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model_type, keys = TABLE[request.param]
    model = hf.tiny(model_type, **keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("bias"):
                parameter -= 1.0  # norms add one to their weight
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def test_every_key_takes_two_values():
    for name in ("gemma2", "gemma3_text"):
        family = families.get(name)
        written = [hf.MODELS[kind][0](**keys).to_dict() for kind, keys in TABLE.values() if kind == name]
        for key in {*family.keys.model_fields, *family.carried} - ({"attn_logit_softcapping"} if name == "gemma3_text" else set()):
            assert len({json.dumps(config.get(key), sort_keys=True) for config in written}) > 1, f"{name}: {key}"


@pytest.mark.concept("X.10", part="io/hf/gemma.py")
@pytest.mark.concept("T13.05", part="nn/patterns.py")
def test_logits(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    assert expected.std() > 1
    assert off(directory.read(path).model, expected, x) < 1e-5


@pytest.mark.concept("X.10", part="io/hf/gemma.py")
@pytest.mark.concept("T13.05", part="nn/ring.py")
def test_logits_token_by_token_and_the_bytes_that_they_take(case):
    """A global layer keeps every token, a local one its window: 5 to 1 in Gemma 3, by turns in Gemma 2."""
    theirs, path = case
    model, x = directory.read(path).model, tokens(theirs.config.vocab_size)
    expected, config = hf.logits(theirs, x), theirs.config
    cache = model.cache(rows=len(x), capacity=x.shape[1])
    with torch.inference_mode():
        out = torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split((12, *[1] * (x.shape[1] - 12)), 1)], 1)
    assert (out - expected).abs().max() < 1e-5 * expected.std()
    slots = [config.sliding_window if kind == SLIDING else x.shape[1] for kind in config.layer_types]
    assert SLIDING in config.layer_types and FULL in config.layer_types
    assert cache.bytes == sum(slots) * len(x) * 2 * config.num_key_value_heads * config.head_dim * 4
    assert count.cache_bytes(model)[config.layer_types.index(SLIDING)] == 0


def test_greedy_tokens_with_a_cache(case):
    theirs, path = case
    prompt = tokens(theirs.config.vocab_size, seed=1)[:, :12]
    expected = hf.greedy(theirs, prompt, 24)
    assert torch.equal(cached_greedy(directory.read(path).model, prompt, 24), expected)
    assert len(expected.unique()) > 5 or theirs.config.tie_word_embeddings  # scaled and tied, tokens repeat themselves


def test_every_tensor_matters(case):
    every_tensor_matters(*case)


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity or is refused."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    nested = SLIDING in config["rope_parameters"]
    bases = {kind: {**part, "rope_theta": 3 * part["rope_theta"]} for kind, part in config["rope_parameters"].items()} if nested else {}
    changes: dict[str, Any] = {
        f"rope {kind}": {"rope_parameters": {**config["rope_parameters"], kind: part}} for kind, part in bases.items()
    }
    for key in families.get(config["model_type"]).keys.model_fields:
        value: Any = config.get(key)
        if key == "rope_parameters":
            value = {"rope_type": "default", "rope_theta": 7.0} if not nested else bases
        elif key == "hidden_activation":
            value = "silu"
        elif key == "layer_types":
            value = [FULL if kind == SLIDING else SLIDING for kind in value]
        elif isinstance(value, bool) or value is None:
            value = not value if key != "final_logit_softcapping" and key != "attn_logit_softcapping" else 2.0
        else:
            value = 2 * value
        changes[key] = {key: value}
    refused = set()
    for key, change in changes.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            refused.add(key)
            continue
        assert key == "max_position_embeddings" or off(loaded.model, expected, x) > 20 * TOLERANCE, key
    kept = {"rope_parameters", "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping", "hidden_activation"}
    assert not refused & kept


def test_attention_both_ways(tmp_path):
    """EmbeddingGemma's body: no causality, and a window of half the size to either side."""
    model_type, keys = TABLE["gemma3-both-ways"]
    theirs = hf.tiny(model_type, **keys)
    loaded = directory.read(hf.save(theirs, tmp_path / "a"))
    x = tokens(theirs.config.vocab_size)
    assert not loaded.spec.causal
    assert off(loaded.model, hf.logits(theirs, x), x) < TOLERANCE
    directory.write(tmp_path / "b", loaded.model, family=loaded.family, rest=loaded.rest)
    mine, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert mine == written


def test_the_keys_of_published_files():
    """Gemma 3's one base and one scaling, and its pattern as a number; Gemma 2 without a list of types."""
    family = families.get("gemma3_text")
    old = {
        "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window_pattern": 3, "rope_theta": 500.0, "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "cache_implementation": "hybrid",
    }  # fmt: skip
    spec, _ = family.to_spec(old)
    assert spec.layers == ("layer0", "layer0", "layer1") * 2 + ("layer0",)
    near, far = (spec.blocks[name].mixer for name in ("layer0", "layer1"))
    assert (near.position.base, near.position.scaling) == (20.0, None)
    assert (far.position.base, far.position.scaling.factor, far.pattern.kind) == (500.0, 8.0, "full")
    today = transformers.Gemma3TextConfig(**{key: value for key, value in old.items() if key not in ("model_type", "cache_implementation")})
    assert family.to_spec(today.to_diff_dict())[0] == spec
    spec, _ = families.get("gemma2").to_spec({"model_type": "gemma2", "num_hidden_layers": 3, "hidden_act": "gelu_pytorch_tanh"})
    assert [spec.blocks[name].mixer.pattern.kind for name in spec.layers] == ["window", "full", "window"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": [FULL]}, "lists 1 layers"),
        ({"sliding_window": None}, "gives no size"),
        ({"hidden_activation": "tanh"}, "hidden_activation 'tanh'"),
        ({"rope_parameters": {"rope_theta": 3.0}}, "rope_parameters"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"num_key_value_heads": 4}, "kv_heads"),
    ],
)
def test_configs_that_cannot_be_read_say_why(change, reason):
    config = hf.MODELS["gemma3_text"][0](**TABLE["gemma3"][1]).to_diff_dict()
    with pytest.raises(ConfigError, match=reason):
        families.get("gemma3_text").to_spec({**config, **change})


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gemma2", {"qk_norm": "rms"}, "qk_norm"),
        ("gemma3_text", {"scores": {"softcap": 3.0, "scale": 0.25}}, "softcap"),
        ("gemma3_text", {"pattern": {"kind": "chunk", "size": 4}}, "chunk"),
        ("gemma2", {"position": None}, "rotary"),
    ],
)
def test_what_a_family_cannot_say_is_refused(name, change, reason):
    family = families.get(name)
    spec, rest = family.to_spec(hf.MODELS[name][0](**next(keys for kind, keys in TABLE.values() if kind == name)).to_diff_dict())
    blocks = {key: block.to_dict() for key, block in spec.blocks.items()}
    blocks[spec.layers[0]]["mixer"] = {**blocks[spec.layers[0]]["mixer"], **change}
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(blocks=blocks), rest)


def test_windows_of_two_sizes_or_two_directions_are_refused():
    family = families.get("gemma2")
    spec, rest = family.to_spec(hf.MODELS["gemma2"][0](**TABLE["gemma2-loose"][1]).to_diff_dict())
    blocks = {key: block.to_dict() for key, block in spec.blocks.items()}
    blocks["layer0"]["mixer"]["pattern"] = {"kind": "window", "size": 3}
    with pytest.raises(ConfigError, match="one size"):
        family.to_hf(spec.replace(blocks=blocks), rest)
    with pytest.raises(ConfigError, match="causal"):
        family.to_hf(spec.replace(causal=False), rest)
