"""Mixtral and Qwen 3 with experts against transformers, in fp32, on tiny models whose every parameter is redrawn (see `harness.py`)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import hf
from tests.parity.harness import OTHER, SHAPE, Causal, Experts
from trivium.core.errors import ConfigError
from trivium.io.hf import families
from trivium.io.hf.qwen3_moe import sparsity

TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mixtral", {
        **SHAPE, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 0.01, "num_local_experts": 5, "num_experts_per_tok": 3,
        "sliding_window": 7, "max_position_embeddings": 64,
    }),
    "full-tied": ("mixtral", {
        **OTHER, "num_key_value_heads": 1, "head_dim": 14, "rms_norm_eps": 0.05, "num_local_experts": 3, "num_experts_per_tok": 1,
        "tie_word_embeddings": True, "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "output_router_logits": True, "router_aux_loss_coef": 0.3, "router_jitter_noise": 0.1, "pad_token_id": 3, "bos_token_id": 5,
        "eos_token_id": [6, 7], "use_cache": False, "initializer_range": 0.03, "attention_dropout": 0.25,
    }),
    "qwen": ("qwen3_moe", {
        **SHAPE, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 0.01, "num_experts": 5, "num_experts_per_tok": 3,
        "moe_intermediate_size": 20, "norm_topk_prob": True, "max_position_embeddings": 64, "use_sliding_window": True, "sliding_window": 7,
        "mlp_only_layers": [1],
    }),
    "qwen-stepped": ("qwen3_moe", {
        **OTHER, "num_key_value_heads": 1, "rms_norm_eps": 0.05, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 28,
        "attention_bias": True, "decoder_sparse_step": 2, "tie_word_embeddings": True, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "output_router_logits": True, "router_aux_loss_coef": 0.3,
        "pad_token_id": 3, "bos_token_id": 5, "eos_token_id": [6, 7], "use_cache": False, "initializer_range": 0.03, "attention_dropout": 0.25,
    }),
}  # fmt: skip


@pytest.mark.concept("T03.04", part="io/hf/mixtral.py")
class TestMixtral(Causal, Experts):
    table = TABLE
    alike = ("hidden_act",)
    others = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "hidden_act": "gelu", "mlp_only_layers": [0, 1], "decoder_sparse_step": 3,
    }  # fmt: skip
    heeded = ("rms_norm_eps", "rope_parameters", "sliding_window", "num_experts_per_tok")

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if key not in config or ("sliding_window" in key and config.get("use_sliding_window") is False):
            return value
        if key == "num_experts_per_tok":
            return 1 if value == 2 else 2
        return super().other(key, value, config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalize": False}, "normalize"),
        ({"capacity": 2.0}, "capacity"),
        ({"shared": {"kind": "mlp", "hidden": 4}}, "shared"),
        ({"score": "sigmoid"}, "score"),
        ({"kind": "mlp", "hidden": 4}, "mixture of experts"),
    ],
)
def test_what_it_cannot_say_is_refused(change, reason):
    family = families.get("mixtral")
    spec, rest = family.to_spec(hf.MODELS["mixtral"][0](**TABLE["window"][1]).to_diff_dict())
    block = spec.blocks["layer"].to_dict()
    ffn = change if "kind" in change else {**block["ffn"], **change}
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(blocks={"layer": {**block, "ffn": ffn}}), rest)


@pytest.mark.parametrize(
    ("sparse", "step", "only"),
    [("11111", 1, []), ("01010", 2, []), ("01000", 2, [3]), ("00100", 3, []), ("10110", 1, [1, 4]), ("00001", 5, []), ("01011", 1, [0, 2])],
)
def test_which_layers_have_experts_is_said_shortly(sparse, step, only):
    found = sparsity([one == "1" for one in sparse])
    assert found == (step, only)


def test_files_of_transformers_4_say_num_experts():
    family = families.get("qwen3_moe")
    config = hf.MODELS["qwen3_moe"][0](**TABLE["qwen"][1]).to_diff_dict()
    new, old = dict(config), dict(config)
    old["num_experts"] = old.pop("num_local_experts")
    assert family.to_spec(old)[0] == family.to_spec(new)[0]
    with pytest.raises(ConfigError, match="mixture of experts or an mlp"):
        family.to_hf(family.to_spec({**config, "mlp_only_layers": [0, 1, 2]})[0], {})
