"""gpt-oss against transformers, in fp32, on tiny models whose every parameter is redrawn (see `harness.py`)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import hf
from tests.parity.harness import OTHER, SHAPE, Causal, Experts
from trivium.core.errors import ConfigError
from trivium.io.hf import families

PLAIN = {"rope_type": "default", "rope_theta": 50.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 16,
}  # fmt: skip


TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "alternating": ("gpt_oss", {
        **SHAPE, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 0.01, "num_local_experts": 5, "num_experts_per_tok": 3,
        "sliding_window": 7, "max_position_embeddings": 64, "rope_parameters": YARN,
    }),
    "odd": ("gpt_oss", {
        **OTHER, "num_key_value_heads": 1, "head_dim": 14, "rms_norm_eps": 0.05, "num_local_experts": 3, "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5, "swiglu_alpha": 1.2, "swiglu_limit": 0.8,
        "attention_bias": False, "tie_word_embeddings": True, "max_position_embeddings": 256, "rope_parameters": PLAIN,
        "output_router_logits": True, "router_aux_loss_coef": 0.3, "pad_token_id": 3, "bos_token_id": 5, "eos_token_id": [6, 7],
        "use_cache": False, "initializer_range": 0.03, "attention_dropout": 0.25,
    }),
}  # fmt: skip


@pytest.mark.concept("T03.04", part="io/hf/gpt_oss.py")
class TestGptOss(Causal, Experts):
    table = TABLE
    alike = ("hidden_act",)
    tolerance = 3e-5
    moved = 6e-4
    heeded = ("rms_norm_eps", "rope_parameters", "sliding_window", "layer_types", "num_experts_per_tok", "swiglu_alpha")

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if key == "layer_types":
            return value[::-1] if len(value) == 2 else ["full_attention"] * 3
        others = {"rope_parameters": {**PLAIN, "rope_theta": 7.0}, "hidden_act": "gelu", "num_experts_per_tok": 1, "swiglu_limit": 0.3}
        return others[key] if key in others else super().other(key, value, config)


def test_the_keys_of_published_files():
    """Older names beside today's; yarn where nothing is said; what the experts' 4 bits are called is refused."""
    family = families.get("gpt_oss")
    config = hf.MODELS["gpt_oss"][0](**TABLE["alternating"][1]).to_diff_dict()
    spec, _ = family.to_spec({**config, "experts_per_token": 3, "initial_context_length": 16})
    assert spec == family.to_spec(config)[0]
    del config["rope_parameters"]
    assert family.to_spec(config)[0].blocks["layer0"].mixer.position.scaling.factor == 32
    with pytest.raises(ConfigError, match="quantization_config"):
        family.to_spec({**config, "quantization_config": {"quant_method": "mxfp4"}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalize": False}, "normalize"),
        ({"router_bias": False}, "router_bias"),
        ({"expert": {"kind": "mlp", "hidden": 4}}, "swish of fixed beta"),
        ({"expert": {"kind": "mlp", "hidden": 4, "activation": {"kind": "swish", "trained": False}, "limit": 1.0}}, "shift"),
        ({"kind": "mlp", "hidden": 4}, "mixture of experts"),
    ],
)
def test_what_it_cannot_say_is_refused(change, reason):
    family = families.get("gpt_oss")
    spec, rest = family.to_spec(hf.MODELS["gpt_oss"][0](**TABLE["alternating"][1]).to_diff_dict())
    blocks = {name: block.to_dict() for name, block in spec.blocks.items()}
    for block in blocks.values():
        block["ffn"] = change if "kind" in change else {**block["ffn"], **change}
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(blocks=blocks), rest)


def test_windows_of_two_sizes_are_refused():
    family = families.get("gpt_oss")
    spec, rest = family.to_spec(hf.MODELS["gpt_oss"][0](**TABLE["alternating"][1]).to_diff_dict())
    blocks = {name: block.to_dict() for name, block in spec.blocks.items()}
    blocks["layer1"]["mixer"]["pattern"] = {"kind": "window", "size": 3}
    with pytest.raises(ConfigError, match="one size, not 3, 7"):
        family.to_hf(spec.replace(blocks=blocks), rest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"layer_types": ["full_attention"]}, "names 1 layers of 3"), ({"sliding_window": None}, "gives no size")],
)
def test_configs_that_cannot_be_read_say_why(change, reason):
    config = hf.MODELS["gpt_oss"][0](**TABLE["alternating"][1]).to_dict()
    with pytest.raises(ConfigError, match=reason):
        families.get("gpt_oss").to_spec({**config, **change}, allow_unknown=config)
