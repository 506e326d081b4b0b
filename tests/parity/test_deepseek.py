"""DeepSeek-V2, V3 and V3.2 against transformers, in fp32, on tiny models whose every parameter is redrawn (see `harness.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import Causal, Experts, off, tokens
from trivium.core.errors import ConfigError
from trivium.io import directory
from trivium.io.hf import families
from trivium.models import count

YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.2,
    "beta_fast": 4.0, "beta_slow": 0.5,
}  # fmt: skip
TOLERANCE = 3e-5  # of the logits' standard deviation
SHAPE = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 6, "kv_lora_rank": 14, "q_lora_rank": 18, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "rms_norm_eps": 0.01, "max_position_embeddings": 64,
}  # fmt: skip
OTHER = {
    "vocab_size": 89, "hidden_size": 40, "intermediate_size": 72, "moe_intermediate_size": 28, "num_hidden_layers": 2,
    "num_attention_heads": 5, "num_key_value_heads": 5, "kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8,
    "v_head_dim": 7, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 2,
    "n_shared_experts": 3, "routed_scaling_factor": 1.7, "rms_norm_eps": 0.05, "max_position_embeddings": 256, "attention_bias": True,
    "tie_word_embeddings": True, "rope_parameters": YARN, "output_router_logits": True, "pad_token_id": 3, "bos_token_id": 5,
    "eos_token_id": [6, 7], "use_cache": False, "initializer_range": 0.03, "attention_dropout": 0.25,
}  # fmt: skip
INDEX = {"index_n_heads": 9, "index_head_dim": 8, "index_topk": 7}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", {**SHAPE, "topk_group": 1, "topk_method": "group_limited_greedy"}),
    "v2-lite": ("deepseek_v2", {
        **OTHER, "q_lora_rank": None, "topk_method": "greedy", "n_group": 3, "topk_group": 2, "first_k_dense_replace": 0,
        "mlp_bias": True, "pretraining_tp": 2,
        "norm_topk_prob": True,
    }),
    "v3": ("deepseek_v3", SHAPE),
    "v3-yarn": ("deepseek_v3", {
        **OTHER, "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "first_k_dense_replace": 0, "num_mtp_layers": 0,
        "pretraining_tp": 2,
    }),
    "v32": ("deepseek_v32", {**SHAPE, **INDEX}),
    "v32-yarn": ("deepseek_v32", {
        **OTHER, "index_n_heads": 15, "index_head_dim": 12, "index_topk": 11, "mlp_layer_types": ["sparse", "dense"], "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "mlp_bias": True,
    }),
}  # fmt: skip


@pytest.mark.concept("T19.02", part="nn/latent.py")
class TestDeepSeek(Causal, Experts):
    table = TABLE
    alike = ("hidden_act",)
    tolerance = TOLERANCE
    moved = 6e-4
    tied_repeat = True
    others = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "hidden_act": "gelu", "index_topk": 3, "topk_group": 1, "n_group": 2,
        "num_experts_per_tok": 1, "first_k_dense_replace": 4,
    }  # fmt: skip
    heeded = ("rms_norm_eps", "rope_parameters", "num_experts_per_tok", "index_topk", "routed_scaling_factor")

    def tiny(self, kind: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
        model, generator = hf.tiny(kind, **keys), torch.Generator().manual_seed(1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        return model

    def nudge(self, name: str) -> float:
        """A correction and an indexer matter where they change a choice; the other experts are as the first."""
        if any(f".experts.{number}." in name for number in range(1, 8)):
            return 0
        return 0.5 if any(part in name for part in (".indexer.", "correction", "router")) else 0.05

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if key in ("mlp_layer_types", "layer_types"):
            return ["dense" if key == "mlp_layer_types" else "full_attention"] * config["num_hidden_layers"]
        if key == "topk_method":
            return "group_limited_greedy" if value == "greedy" else "greedy"
        return super().other(key, value, config)

    def idle(self, config: dict[str, Any]) -> set[str]:
        family = families.get(config["model_type"])
        unread = set(config) - set(family.values(family.to_spec(config)[0]))
        every = config["first_k_dense_replace"] == config["num_hidden_layers"]
        return unread | ({"first_k_dense_replace"} if every or "mlp_layer_types" in config else set())

    def test_a_token_takes_its_latent_and_its_turned_key(self, case):
        config = case.theirs.config
        per_token = config.kv_lora_rank + config.qk_rope_head_dim + (config.index_head_dim if config.model_type == "deepseek_v32" else 0)
        assert count.cache_bytes(case.read().model) == [4 * per_token] * config.num_hidden_layers


@pytest.mark.concept("X.04", part="nn/sparse.py")
@pytest.mark.parametrize("name", ["v32", "v32-yarn"])
def test_sparse_attention_reads_what_transformers_reads(name, tmp_path):
    """One token more would show. The indexer has so many heads that no two scores at the border are both zero: which of equal
    ones transformers takes is left to the sort."""
    model_type, keys = TABLE[name]
    theirs = hf.tiny(model_type, **keys)
    x = tokens(theirs.config.vocab_size)
    expected, ours = hf.logits(theirs, x), directory.read(hf.save(theirs, tmp_path)).model
    assert off(ours, expected, x) < TOLERANCE
    for layer in ours.layers:
        layer.mixer.indexer.spec = layer.mixer.indexer.spec.replace(top_k=keys["index_topk"] + 1)
    assert off(ours, expected, x) > 1e-2


def test_the_keys_of_published_files():
    """V3's own names for what the family always does, kept and given back; its older rotary keys."""
    family = families.get("deepseek_v3")
    old = {
        "model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True,
        "aux_loss_alpha": 0.001, "rope_theta": 10000, "max_position_embeddings": 163840, "num_key_value_heads": 128,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        },
    }  # fmt: skip
    spec, rest = family.to_spec(old)
    mixer = spec.blocks["layer1"].mixer
    assert spec.layers == ("layer0",) * 3 + ("layer1",) * 58
    assert mixer.scale == pytest.approx(192**-0.5 * 1.3688879454**2) and mixer.position.scaling.magnitude == 1.0
    assert spec.blocks["layer1"].ffn.groups.count == 8
    again = family.to_hf(spec, rest)
    assert all(again[key] == old[key] for key in ("scoring_func", "topk_method", "seq_aux"))
    for change in ({"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"moe_layer_freq": 2}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            family.to_spec({**old, **change})
    families.get("deepseek_v2").to_spec({**SHAPE, "scoring_func": "softmax", "moe_layer_freq": 1, "seq_aux": True})


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"num_key_value_heads": 3}, "num_key_value_heads is 3"), ({"head_dim": 9}, "head_dim is 9"), ({"hidden_act": "relu2"}, "hidden_act")],
)
def test_keys_that_contradict_are_refused(change, reason):
    with pytest.raises(ConfigError, match=reason):
        families.get("deepseek_v3").to_spec({**SHAPE, **change})


def test_a_config_that_leaves_a_part_open_is_refused():
    """transformers' own default says of how many experts a token reads: none."""
    config = hf.classes("deepseek_v2")[0]().to_dict() | {"num_experts_per_tok": None}
    known = families.get("deepseek_v2").unknown_keys(config)
    with pytest.raises(ConfigError, match="config.json.top_k"):
        families.get("deepseek_v2").to_spec(config, allow_unknown=known)


def test_what_has_no_words_is_refused():
    family = families.get("deepseek_v32")
    spec, rest = family.to_spec({**SHAPE, **INDEX})
    (name, block), *_ = spec.blocks.items()
    other = block.replace(mixer=block.mixer.replace(heads=3))
    with pytest.raises(ConfigError, match="same attention"):
        family.to_hf(spec.replace(blocks={**spec.blocks, name: other}), rest)
    plain = {key: part.replace(mixer=part.mixer.replace(indexer=None)) for key, part in spec.blocks.items()}
    with pytest.raises(ConfigError, match="indexer"):
        family.to_hf(spec.replace(blocks=plain), rest)
    assert families.get("deepseek_v3").to_hf(spec.replace(blocks=plain), rest)["rope_interleave"]
    with pytest.raises(ConfigError, match="no words"):
        families.get("deepseek_v3").to_hf(spec, rest)
    with pytest.raises(ConfigError, match="multiple of the number of heads"):
        families.get("deepseek_v2").to_spec({**SHAPE, "num_attention_heads": 5, "num_key_value_heads": 5})
