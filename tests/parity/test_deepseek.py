"""DeepSeek-V2, V3 and V3.2 against transformers, as Llama is in `test_llama.py`, whose tests run here too."""

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
    cached_greedy,
    off,
    test_export_is_what_transformers_writes,
    test_round_trip_is_bit_exact,
    tokens,
)
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import families
from trivium.models import count

TOLERANCE = 3e-5  # of the logits' standard deviation
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.2,
    "beta_fast": 4.0, "beta_slow": 0.5,
}  # fmt: skip
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


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model_type, keys = TABLE[request.param]
    model = hf.tiny(model_type, **keys)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def test_every_key_takes_two_values():
    for name in ("deepseek_v2", "deepseek_v3", "deepseek_v32"):
        family = families.get(name)
        written = [hf.MODELS[kind][0](**keys).to_dict() for kind, keys in TABLE.values() if kind == name]
        for key in {*family.keys.model_fields, *family.carried} - {"hidden_act"}:
            assert len({json.dumps(config.get(key), sort_keys=True) for config in written}) > 1, f"{name}: {key}"


@pytest.mark.concept("T19.02", part="nn/latent.py")
def test_logits(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    assert 1 <= expected.std() <= 3
    model = directory.read(path).model
    assert off(model, expected, x) < TOLERANCE
    for loads in model(x).aux.loads.values():
        assert (loads > 0).all(), "an expert that none chose is not tested"


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


@pytest.mark.concept("T19.02", part="nn/latent.py")
def test_greedy_tokens_with_a_cache(case):
    theirs, path = case
    prompt = tokens(theirs.config.vocab_size, seed=1)[:, :12]
    expected = hf.greedy(theirs, prompt, 24)
    model, config = directory.read(path).model, theirs.config
    assert torch.equal(cached_greedy(model, prompt, 24), expected)
    assert len(expected.unique()) > 5 or config.tie_word_embeddings
    per_token = config.kv_lora_rank + config.qk_rope_head_dim + (config.index_head_dim if config.model_type == "deepseek_v32" else 0)
    assert count.cache_bytes(model) == [4 * per_token] * config.num_hidden_layers


def test_every_tensor_matters(case):
    """Changing any one tensor on our side alone breaks parity; the correction, where it changes a choice."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    model = directory.read(path).model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(f".experts.{number}." in name for number in range(1, 8)):
            continue  # as the first
        before = parameter.clone()
        small = ".indexer." not in name and "correction" not in name and "router" not in name
        parameter.add_((0.05 if small else 0.5) * torch.randn(before.shape, generator=generator))
        assert off(model, expected, x) > 20 * TOLERANCE, name
        parameter.copy_(before)


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity or is refused."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    family = families.get(config["model_type"])
    unread = {"max_position_embeddings", *(set(config) - set(family.values(directory.read(path).spec)))}
    unread |= {"first_k_dense_replace"} if config["first_k_dense_replace"] == config["num_hidden_layers"] else set()
    unread |= {"first_k_dense_replace"} if "mlp_layer_types" in config else set()
    changes: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "hidden_act": "gelu", "index_topk": 3}
    changes |= {"topk_method": "group_limited_greedy" if config.get("topk_method") == "greedy" else "greedy", "topk_group": 1, "n_group": 2}
    changes |= {"num_experts_per_tok": 1, "first_k_dense_replace": 4, "mlp_layer_types": ["dense"] * config["num_hidden_layers"]}
    changes |= {"layer_types": ["full_attention"] * config["num_hidden_layers"]}
    for key in family.keys.model_fields:
        value = changes.get(key, not config[key] if config[key] in (True, False) else 5)
        if key not in changes and type(config[key]) in (int, float):
            value = 2 * config[key]
        if value == config[key] or key in unread:
            continue
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            assert key not in ("rms_norm_eps", "rope_parameters", "num_experts_per_tok", "index_topk", "routed_scaling_factor"), key
            continue
        assert off(loaded.model, expected, x) > 20 * TOLERANCE, key


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
