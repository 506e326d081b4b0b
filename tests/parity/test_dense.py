"""Qwen 2 and 3, SmolLM 3, OLMo 2 and Phi 3 against transformers, in fp32, on tiny models whose every parameter is redrawn (see `harness.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.parity import hf
from tests.parity.harness import OTHER, SHAPE, Causal, Loss, off, tokens
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import families

TOLERANCE = 3e-5  # of the logits' standard deviation: products of other shapes than transformers' round differently
FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = {"rope_type": "default", "rope_theta": 40.0}
YARN = {"rope_type": "yarn", "rope_theta": 200.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.5, 2.5, 3.5],
    "partial_rotary_factor": 0.75,
}  # fmt: skip
ODD = {
    "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 3, "initializer_range": 0.03, "attention_dropout": 0.25,
    "use_cache": False,
}  # fmt: skip
PLAIN = {"num_key_value_heads": 2, "rms_norm_eps": 0.01, "max_position_embeddings": 64, "tie_word_embeddings": False}
TIED = {"num_key_value_heads": 1, "rms_norm_eps": 0.05, "max_position_embeddings": 96, "tie_word_embeddings": True}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-plain": ("qwen2", {**SHAPE, **PLAIN, "rope_parameters": ROPE}),
    "qwen2-window-tied": ("qwen2", {
        **OTHER, **TIED, **ODD, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "head_dim": 12,
    }),
    "qwen3-plain": ("qwen3", {**SHAPE, **PLAIN, "head_dim": 10}),
    "qwen3-yarn-window-tied": ("qwen3", {
        **OTHER, **TIED, **ODD, "head_dim": 14, "attention_bias": True, "use_sliding_window": True, "sliding_window": 9,
        "layer_types": [SLIDING, FULL], "max_window_layers": 5, "rope_parameters": YARN,
    }),
    "smollm3-plain": ("smollm3", {**SHAPE, **PLAIN, "num_hidden_layers": 4, "pad_token_id": 0}),
    "smollm3-window-tied": ("smollm3", {
        **OTHER, **TIED, **ODD, "num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [0, 1, 0],
        "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8, "rope_parameters": ROPE, "head_dim": 10,
    }),
    "olmo2-plain": ("olmo2", {**SHAPE, **PLAIN, "attention_bias": True}),
    "olmo2-tied": ("olmo2", {
        **OTHER, **TIED, **ODD, "rope_parameters": ROPE, "head_dim": 12,
    }),
    "phi3-plain": ("phi3", {**SHAPE, **PLAIN, "pad_token_id": 0, "head_dim": 10}),
    "phi3-long-tied": ("phi3", {
        **OTHER, **TIED, **ODD, "max_position_embeddings": 80, "original_max_position_embeddings": 8, "sliding_window": 25,
        "rope_parameters": LONG, "resid_pdrop": 0.1, "embd_pdrop": 0.2,
    }),
}  # fmt: skip


@pytest.mark.concept("T03.01", part="models/transformer.py")
@pytest.mark.concept("X.136", part="io/hf/qwen.py")
@pytest.mark.concept("X.138", part="io/hf/smollm3.py")
@pytest.mark.concept("X.147", part="io/hf/olmo.py")
@pytest.mark.concept("X.149", part="io/hf/phi3.py")
class TestDense(Causal, Loss):
    table = TABLE
    alike = ("hidden_act",)
    tolerance = TOLERANCE
    swaps = (("mixer_norm", "ffn_norm"),)
    heeded = ("rms_norm_eps", "rope_parameters", "sliding_window", "no_rope_layers")

    def silent(self, name: str, spec: Any) -> bool:
        """Without positions a bias on the keys adds the same to every score."""
        if not name.endswith("k.bias"):
            return False
        return spec.blocks[spec.layers[int(name.split(".")[1])]].mixer.position is None

    def mutations(self, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of the keys that the family reads, those that its transformers model heeds."""
        types = config.get("layer_types")
        out: dict[str, Any] = {
            "hidden_act": "gelu",
            "num_attention_heads": 2 * config["num_attention_heads"],
            "num_hidden_layers": config["num_hidden_layers"] + 1,
            "rope_parameters": {**config["rope_parameters"], "rope_theta": 3 * config["rope_parameters"]["rope_theta"]},
        }
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps"):
            out[key] = 2 * config[key]
        for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if key in config:
                out[key] = not config[key]
        if config.get("sliding_window"):
            out["sliding_window"] = config["sliding_window"] - 4
        if types is not None and SLIDING in types:
            out["layer_types"] = [SLIDING if kind == FULL else FULL for kind in types]
            out["use_sliding_window"] = False
        if "no_rope_layers" in config:
            out["no_rope_layers"] = [1 - turned for turned in config["no_rope_layers"]]
        if "head_dim" in config:
            out["head_dim"] = 2 * config["head_dim"]
        yield from ((key, {**config, key: value}) for key, value in out.items())


@pytest.mark.concept("T02.06", part="io/hf/smollm3.py")
@pytest.mark.parametrize("name", ["smollm3-plain", "smollm3-window-tied"])
def test_layers_without_positions(name, tmp_path):
    """Every fourth layer by default, any that the config names otherwise; a new block, not a flag."""
    theirs = hf.tiny(*TABLE[name][:1], **TABLE[name][1])
    loaded = directory.read(hf.save(theirs, tmp_path))
    turned = [loaded.spec.blocks[name].mixer.position is not None for name in loaded.spec.layers]
    assert turned == [bool(flag) for flag in theirs.config.no_rope_layers] and len(set(turned)) == 2
    x = tokens(theirs.config.vocab_size)
    assert off(loaded.model, hf.logits(theirs, x), x) < TOLERANCE


@pytest.mark.concept("T01.09", part="nn/attention.py")
@pytest.mark.parametrize("name", ["qwen3-plain", "qwen3-yarn-window-tied", "olmo2-plain", "olmo2-tied"])
def test_normed_queries_and_keys(name, tmp_path):
    theirs = hf.tiny(*TABLE[name][:1], **TABLE[name][1])
    loaded = directory.read(hf.save(theirs, tmp_path))
    (block, *_) = loaded.spec.blocks.values()
    assert block.mixer.qk_norm is not None and block.mixer.qk_norm_over == ("head" if "qwen3" in name else "projection")
    x = tokens(theirs.config.vocab_size)
    assert off(loaded.model, hf.logits(theirs, x), x) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", {"layer_types": [FULL]}, "layer_types lists 1"),
        ("qwen3", {"layer_types": [FULL, SLIDING, FULL]}, "no window"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers lists 1"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {**LONG, "rope_type": "su", "long_factor": [2.0, 3.0]}}, "long_factor has 2 numbers"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope", "rope_theta": 1.0}}, "short_factor"),
    ],
)
def test_configs_that_cannot_be_read_say_why(tmp_path, name, change, message):
    config = {**hf.MODELS[name][0](**SHAPE, **PLAIN, pad_token_id=0).to_diff_dict(), **change}
    if "rope_scaling" in change:
        del config["rope_parameters"]
    theirs = hf.tiny(name, **SHAPE, **PLAIN, pad_token_id=0)
    hf.save(theirs, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TriviumError, match=message):
        directory.read(tmp_path).model(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("qwen3", {"qk_norm": None}, "qk_norm"),
        ("qwen2", {"qk_norm": "rms"}, "qk_norm"),
        ("qwen2", {"bias": []}, "bias"),
        ("olmo2", {"qk_norm_over": "head"}, "qk_norm_over"),
        ("smollm3", {"position": {"kind": "rope", "layout": "interleaved"}}, "layout"),
        ("llama", {"position": {"kind": "rope", "share": 0.5}}, "partial_rotary_factor"),
        ("llama", {"position": {"kind": "rope", "scaling": {"kind": "ntk", "factor": 2.0}}}, "no rotary type 'ntk'"),
    ],
)
def test_what_a_family_cannot_say_is_refused(name, change, reason):
    family = families.get(name)
    spec, rest = family.to_spec({**hf.MODELS[name][0](**SHAPE, **PLAIN, pad_token_id=0).to_diff_dict()})
    blocks = {key: block.to_dict() for key, block in spec.blocks.items()}
    first = spec.layers[0]
    blocks[first]["mixer"] = {**blocks[first]["mixer"], **change}
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(blocks=blocks), rest)
