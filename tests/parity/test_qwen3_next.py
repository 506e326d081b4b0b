"""Qwen3-Next against transformers' torch path, in fp32, on tiny models whose every parameter is redrawn
(see `harness.py`); dense and sparse layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import Causal, Recurrent, Refusals, changed, config_of, off, tensors_of, tokens
from tests.tiny import tiny as tiny_ours
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError
from trivium.io import directory, peft
from trivium.io.hf import families

SHAPE = {
    "vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 20, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 16, "linear_key_head_dim": 10, "linear_value_head_dim": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rms_norm_eps": 0.01, "max_position_embeddings": 64,
}  # fmt: skip
OTHER = {
    "vocab_size": 89, "hidden_size": 20, "num_hidden_layers": 3, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "linear_key_head_dim": 6, "linear_value_head_dim": 5, "linear_num_key_heads": 3, "linear_num_value_heads": 3,
    "linear_conv_kernel_dim": 3, "rms_norm_eps": 0.05, "max_position_embeddings": 128, "attention_bias": True, "tie_word_embeddings": True,
    "layer_types": ["full_attention", "linear_attention", "linear_attention"], "initializer_range": 0.03, "use_cache": False,
    "bos_token_id": 3, "pad_token_id": 4, "eos_token_id": 5, "attention_dropout": 0.25,
    "router_aux_loss_coef": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}


LINEAR = {"kind": "gated_delta", "key_heads": 2, "value_heads": 4, "key_dim": 10, "value_dim": 6}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3_next", {**SHAPE, "num_experts": 0}),
    "dense-attention-first": ("qwen3_next", {**OTHER, "mlp_only_layers": [0, 1, 2]}),
    "sparse": ("qwen3_next", {**SHAPE, **EXPERTS, "mlp_only_layers": [1]}),
    "sparse-every-second": ("qwen3_next", {
        **OTHER, "decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 8, "norm_topk_prob": False, "output_router_logits": True,
    }),
}  # fmt: skip
TOLERANCE = 3e-5  # of the logits' standard deviation; against float64, both sides are up to 2e-5 off


def tiny(kind: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
    """A redrawn model that remembers, with norms about one."""
    model = hf.tiny(kind, **keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(3.0)
            elif name.endswith("norm.weight") and "linear_attn" not in name:
                parameter.sub_(1.0)
    return model


@pytest.mark.concept("X.05", "X.137", part="io/hf/qwen3_next.py")
class TestQwen3Next(Causal, Recurrent, Refusals):
    table = TABLE
    noise = 0.1
    alike = ("hidden_act",)
    tiny = staticmethod(tiny)
    in_order = False
    tolerance = TOLERANCE
    moved = 3e-3
    gradient = 3e-4
    others = {"hidden_act": "gelu"}
    heeded = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
    unreadable = [
        ("dense", {"hidden_act": "gelu"}, "hidden_act"),
        ("dense", {"layer_types": ["full_attention"]}, "layer_types"),
        ("dense", {"layer_types": ["window"] * 4}, "layer_types"),
        ("dense", {"linear_num_value_heads": 3}, "value_heads"),
        ("dense", {"num_expert": 3}, "did you mean num_experts"),
    ]
    unsayable = [
        ("dense", {"blocks": {"layer1": {"mixer": LINEAR}}}, "some layer must be attention"),
        ("dense", {"final_norm": {"kind": "rms", "eps": 0.01}}, "offset"),
        ("dense", {"blocks": {"layer0": {"ffn": None}}}, "mlp"),
        ("dense", {"blocks": {"layer1": {"mixer": {"gate": None}}}}, "gate"),
        ("dense", {"blocks": {"layer0": {"mixer": {"norm": {"kind": "rms", "eps": 0.5}}}}}, "eps"),
    ]

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if key == "rope_parameters":
            return {**value, "partial_rotary_factor": 2 * value["partial_rotary_factor"]}
        if key == "layer_types":
            return value[::-1]
        if key == "mlp_only_layers":
            return [2] if value == [1] else [1]
        return 4 if value == 0 and not isinstance(value, bool) else super().other(key, value, config)

    def mutations(self, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Both values inside `rope_parameters`."""
        for key, now in super().mutations(config):
            yield "partial_rotary_factor" if key == "rope_parameters" else key, now
        yield "rope_theta", changed(config, ("rope_parameters", "rope_theta"), 2 * config["rope_parameters"]["rope_theta"])

    def idle(self, config: dict[str, Any]) -> set[str]:
        """Keys of parts that are not there: experts, or an MLP beside them."""
        sparse = {
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "norm_topk_prob",
            "decoder_sparse_step",
        }
        if not config["num_experts"] or len(config["mlp_only_layers"]) == config["num_hidden_layers"]:
            return sparse | {"num_experts", "mlp_only_layers"}
        return set() if config["mlp_only_layers"] or config["decoder_sparse_step"] > 1 else {"intermediate_size"}


def test_a_config_of_the_first_release(tmp_path):
    """Every fourth layer by `full_attention_interval`, rotary keys at the top, the layers of further prediction in the file."""
    theirs = tiny(*TABLE["sparse"])
    config = config_of(hf.save(theirs, tmp_path))
    for key in ("layer_types", "rope_parameters", "attention_bias"):
        del config[key]
    config |= {
        "full_attention_interval": 4,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tensors_of(tmp_path)
    further = ("mtp.fc", "mtp.norm", "mtp.layers.0.mlp.experts.3.up_proj", "mtp.layers.0.self_attn.q_proj", "mtp.layers.0.mlp.gate")
    safetensors.torch.save_file(weights | {f"{name}.weight": torch.ones(2) for name in further}, tmp_path / "model.safetensors")
    x = tokens(101)
    assert off(directory.read(tmp_path).model, hf.logits(theirs, x), x) < TOLERANCE


def test_an_adapter_on_maps_that_lie_together_is_refused(tmp_path):
    """Its rows would have to be interleaved: that is said, rather than wrong ones written."""
    spec, _ = families.get("qwen3_next").to_spec(hf.MODELS["qwen3_next"][0](**TABLE["dense"][1]).to_diff_dict())
    model = LoRA(rank=2, targets=("q",)).apply(tiny_ours(spec))
    with pytest.raises(ConfigError, match="no module of its own for layers.0.mixer.inp.q"):
        peft.write(tmp_path / "a", model, family="qwen3_next")
    peft.write(tmp_path / "b", LoRA(rank=2, targets=("out",)).apply(tiny_ours(spec)), family="qwen3_next")
