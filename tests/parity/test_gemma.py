"""Gemma 2 and 3 against transformers, in fp32, on tiny models whose every parameter is redrawn (see `harness.py`); and their rolling caches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import OTHER, SHAPE, TOLERANCE, Causal, apart, changed, config_of, off, tokens
from trivium.core.errors import ConfigError
from trivium.io import directory
from trivium.io.hf import Family, families
from trivium.models import count
from trivium.nn.inputs import Inputs

FULL, SLIDING = "full_attention", "sliding_attention"
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
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
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
}  # fmt: skip
ENCODER = {"gemma3-both-ways": ("gemma3_text", {
    **SHAPE, **PLAIN, "layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 8, "use_bidirectional_attention": True,
})}  # fmt: skip
TABLE = {**DECODERS, **ENCODER}


@pytest.mark.concept("X.10", part="io/hf/gemma.py")
@pytest.mark.concept("T13.05", part="nn/patterns.py")
class TestGemma(Causal):
    table = DECODERS
    further = ENCODER
    spread = (1.0, math.inf)
    swaps = (("mixer_norm", "ffn_norm"),)
    tied_repeat = True  # and scaled
    others = {"hidden_activation": "silu"}
    heeded = ("rope_parameters", "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping", "hidden_activation")

    def tiny(self, kind: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
        model = hf.tiny(kind, **keys)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and not name.endswith("bias"):
                    parameter -= 1.0  # norms add one to their weight
        return model

    def said_alike(self, family: Family) -> set[str]:
        return {"attn_logit_softcapping"} if family.model_type == "gemma3_text" else set()

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if key == "rope_parameters" and SLIDING in value:
            return {kind: super(TestGemma, self).other(key, part, config) for kind, part in value.items()}
        if key == "layer_types":
            return [FULL if kind == SLIDING else SLIDING for kind in value]
        if value is None:
            return 2.0 if "softcapping" in key else True
        return super().other(key, value, config)

    def mutations(self, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The base of each kind of layer by itself too."""
        yield from super().mutations(config)
        for kind, part in config["rope_parameters"].items():
            if isinstance(part, dict):
                yield f"rope {kind}", changed(config, ("rope_parameters", kind, "rope_theta"), 3 * part["rope_theta"])

    @pytest.mark.concept("T13.05", part="nn/ring.py")
    def test_logits_token_by_token_and_the_bytes_that_they_take(self, case):
        """A global layer keeps every token, a local one its window: 5 to 1 in Gemma 3, by turns in Gemma 2."""
        config, model, x = case.theirs.config, case.read().model, tokens(case.theirs.config.vocab_size)
        cache = model.cache(rows=len(x), capacity=x.shape[1])
        with torch.inference_mode():
            out = torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split((12, *[1] * (x.shape[1] - 12)), 1)], 1)
        assert apart(out, case.expected) < 1e-5
        slots = [config.sliding_window if kind == SLIDING else x.shape[1] for kind in config.layer_types]
        assert SLIDING in config.layer_types and FULL in config.layer_types
        assert cache.bytes == sum(slots) * len(x) * 2 * config.num_key_value_heads * config.head_dim * 4
        assert count.cache_bytes(model)[config.layer_types.index(SLIDING)] == 0


def test_attention_both_ways(tmp_path):
    """EmbeddingGemma's body: no causality, and a window of half the size to either side."""
    model_type, keys = TABLE["gemma3-both-ways"]
    theirs = hf.tiny(model_type, **keys)
    loaded = directory.read(hf.save(theirs, tmp_path / "a"))
    x = tokens(theirs.config.vocab_size)
    assert not loaded.spec.causal
    assert off(loaded.model, hf.logits(theirs, x), x) < 3 * TOLERANCE
    directory.write(tmp_path / "b", loaded.model, family=loaded.family, rest=loaded.rest)
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


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
