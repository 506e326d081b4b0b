"""Llama and Mistral against transformers, in fp32, on tiny models whose every parameter is redrawn (see `harness.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import OTHER, SHAPE, TOLERANCE, Causal, Loss, changed, config_of, off, tensors_of, tokens
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import Family, families

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-biases": ("llama", {
        **SHAPE, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 0.01, "attention_bias": True, "max_position_embeddings": 64,
    }),
    "llama-mqa-llama3-tied": ("llama", {
        **OTHER, "num_key_value_heads": 1, "head_dim": 14, "rms_norm_eps": 0.05, "mlp_bias": True, "tie_word_embeddings": True,
        "max_position_embeddings": 256, "rope_parameters": LLAMA3, "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 3,
        "initializer_range": 0.03, "attention_dropout": 0.25, "use_cache": False, "pretraining_tp": 2,
    }),
    "llama-mha-linear": ("llama", {**OTHER, "rms_norm_eps": 0.02, "rope_parameters": {"rope_type": "linear", "rope_theta": 30.0, "factor": 2.5}}),
    "mistral-window": ("mistral", {
        **SHAPE, "num_key_value_heads": 3, "head_dim": 4, "rms_norm_eps": 0.01, "sliding_window": 7, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }),
    "mistral-full-tied": ("mistral", {
        **OTHER, "num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 0.05, "sliding_window": None, "tie_word_embeddings": True,
    }),
}  # fmt: skip


@pytest.mark.concept("X.130", "X.133", part="io/hf/llama.py")
@pytest.mark.concept("T03.01", part="models/transformer.py")
@pytest.mark.concept("T19.01", part="nn/attention.py")
@pytest.mark.concept("X.88", part="io/directory.py")
class TestLlama(Causal, Loss):
    table = TABLE
    swaps = (("mixer_norm", "ffn_norm"),)
    others = {"hidden_act": "gelu"}
    heeded = (
        *("rms_norm_eps", "max_position_embeddings", "rope_parameters", "sliding_window"),
        *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    )

    def said_alike(self, family: Family) -> set[str]:
        return {"hidden_act", *(family.carried if family.model_type == "mistral" else ())}

    def mutations(self, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each value inside `rope_parameters` too."""
        yield from super().mutations(config)
        rope = config["rope_parameters"]
        yield from ((key, changed(config, ("rope_parameters", key), 2 * value)) for key, value in rope.items() if key != "rope_type")

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if key != "rope_parameters":
            return super().other(key, value, config)
        plain = {"rope_type": "default", "rope_theta": value["rope_theta"]}
        return plain if value["rope_type"] == "linear" else {**plain, "rope_type": "linear", "factor": 3.0}

    def test_shards_both_ways(self, case, tmp_path):
        hf.save(case.theirs, tmp_path / "theirs", max_shard_size="20KB")
        assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
        loaded = directory.read(tmp_path / "theirs")
        assert self.off(loaded.model, case) < self.tolerance
        directory.write(tmp_path / "ours", loaded.model, family=loaded.family, rest=loaded.rest, shard_bytes=20_000)
        assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
        back = type(case.theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert torch.equal(self.theirs(back), case.expected)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {k: v for k, v in LLAMA3.items() if k != "rope_theta"}])
def test_layout_of_transformers_4(tmp_path, scaling):
    """`rope_theta` and `rope_scaling`, `torch_dtype`, no `head_dim`, the rotary frequencies among the weights."""
    theirs = hf.tiny("llama", **OTHER, rope_theta=50.0, rope_scaling=scaling and dict(scaling), max_position_embeddings=128)
    hf.save(theirs, tmp_path / "x")
    old = config_of(tmp_path / "x")
    for key in ("rope_parameters", "dtype", "head_dim", "num_key_value_heads", "mlp_bias", "attention_bias", "pad_token_id"):
        del old[key]
    old |= {
        "rope_theta": 50.0,
        "rope_scaling": scaling,
        "torch_dtype": "float32",
        "_name_or_path": "somewhere",
        "transformers_version": "4.40.0",
    }
    (tmp_path / "x" / "config.json").write_text(json.dumps(old))
    weights = tensors_of(tmp_path / "x")
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    safetensors.torch.save_file(weights, tmp_path / "x" / "model.safetensors")
    loaded = directory.read(tmp_path / "x")
    x = tokens(OTHER["vocab_size"])
    assert off(loaded.model, hf.logits(theirs, x), x) < TOLERANCE
    directory.write(tmp_path / "ours", loaded.model, family="llama", rest=loaded.rest)
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    hf.save(back, tmp_path / "again")
    ours, again = (config_of(tmp_path / name) for name in ("ours", "again"))
    assert ours.pop("transformers_version") == "4.40.0" and again.pop("transformers_version") == transformers.__version__
    assert ours == again
    assert torch.equal(hf.logits(back, x), hf.logits(theirs, x))


def test_stored_copy_of_a_tied_head_is_checked(tmp_path):
    theirs = hf.tiny(*TABLE["mistral-full-tied"][:1], **TABLE["mistral-full-tied"][1])
    hf.save(theirs, tmp_path)
    weights = tensors_of(tmp_path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    directory.read(tmp_path)
    weights["lm_head.weight"][0, 0] += 1
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(TriviumError, match="tied"):
        directory.read(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "faktor": 1}}, "faktor"),
        ({"rope_scaling": 3}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 10.0, "factor": 2.0}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"num_key_value_heads": 4}, "kv_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 2**62}, "these sizes"),
        ({"vocab_size": 2**80}, "these sizes"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": "big"}}, "base"),
        ({"rope_parameters": {"rope_theta": None}}, "base"),
        ({"hiden_size": 3}, "did you mean hidden_size"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"model_type": "lama"}, "llama"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_configs_that_cannot_be_read_say_why(tmp_path, change, message):
    config = hf.MODELS["llama"][0](**SHAPE).to_diff_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(TriviumError, match=message):
        directory.read(tmp_path)


def test_unknown_keys_can_be_allowed_and_stay_allowed(tmp_path):
    theirs = hf.tiny("llama", **OTHER, favourite_color="blue")
    hf.save(theirs, tmp_path / "x")
    with pytest.raises(ConfigError, match="favourite_color"):
        directory.read(tmp_path / "x")
    loaded = directory.read(tmp_path / "x", allow_unknown=["favourite_color"])
    directory.write(tmp_path / "y", loaded.model, family="llama", rest=loaded.rest)
    assert directory.read(tmp_path / "y").rest["favourite_color"] == "blue"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"context": None}, "context = None"),
        ({"causal": False}, "causal = False"),
        ({"embed": {"kind": "tokens", "scale": 2.0}}, "embed.scale = 2.0"),
        ({"final_norm": {"kind": "none"}}, "final_norm"),
        ({"final_norm": {"kind": "rms", "eps": 0.5}}, "eps"),
        ({"dim": 50}, "multiple of the number of heads"),
    ],
)
def test_what_a_family_cannot_say_is_refused(change, reason):
    family = families.get("llama")
    spec, rest = family.to_spec(hf.MODELS["llama"][0](**SHAPE).to_diff_dict())
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(**change), rest)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mixer": {"bias": ["q"]}}, "bias"),
        ({"mixer": {"position": None}}, "rotary"),
        ({"mixer": {"scores": {"scale": 0.5}}}, "scale = 0.5"),
        ({"mixer": {"pattern": {"kind": "window", "size": 3}}}, "pattern"),
        ({"ffn": {"activation": {"kind": "swish", "beta": 2.0}}}, "activation"),
        ({"ffn": None}, "mlp"),
        ({"norm_at": "post"}, "norm_at"),
        ({"residual": {"kind": "plain", "scale": 0.5}}, "residual"),
    ],
)
def test_blocks_that_a_family_cannot_say_are_refused(change, reason):
    family = families.get("llama")
    spec, rest = family.to_spec(hf.MODELS["llama"][0](**SHAPE).to_diff_dict())
    block = spec.blocks["layer"].to_dict()
    for part, fields in change.items():
        block[part] = {**block[part], **fields} if isinstance(fields, dict) and part in block else fields
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(blocks={"layer": block}), rest)
    two = spec.replace(layers=("layer", "other", "layer"), blocks={"layer": spec.blocks["layer"], "other": block})
    with pytest.raises(ConfigError, match="alike"):
        family.to_hf(two, rest)
