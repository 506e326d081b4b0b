"""Mixtral and Qwen 3 with experts against transformers, in fp32, on tiny models whose every parameter is redrawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.test_llama import OTHER, SHAPE, TOLERANCE, cached_greedy, off, tokens
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import families
from trivium.io.hf.qwen3_moe import sparsity
from trivium.io.tensors import read_weights

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


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model_type, keys = TABLE[request.param]
    model = hf.tiny(model_type, **keys)
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def test_every_key_takes_two_values():
    for name in ("mixtral", "qwen3_moe"):
        family = families.get(name)
        written = [hf.MODELS[kind][0](**keys).to_dict() for kind, keys in TABLE.values() if kind == name]
        for key in {*family.keys.model_fields, *family.carried} - {"hidden_act"}:
            assert len({json.dumps(config.get(key), sort_keys=True) for config in written}) > 1, key


@pytest.mark.concept("T03.04", part="io/hf/mixtral.py")
def test_logits(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    assert 1 <= expected.std() <= 3
    model = directory.read(path).model
    assert off(model, expected, x) < TOLERANCE
    for loads in model(x).aux.loads.values():
        assert (loads > 0).all(), "an expert that none chose is not tested"


def test_greedy_tokens_with_a_cache(case):
    theirs, path = case
    prompt = tokens(theirs.config.vocab_size, seed=1)[:, :12]
    expected = hf.greedy(theirs, prompt, 16)
    assert torch.equal(cached_greedy(directory.read(path).model, prompt, 16), expected)
    assert len(expected.unique()) > 5


def test_every_tensor_matters(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    model = directory.read(path).model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.add_(0.05 * torch.randn(before.shape, generator=generator))
        assert off(model, expected, x) > 100 * TOLERANCE, name
        parameter.copy_(before)


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity or is refused. `max_position_embeddings` shapes no logit."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    changes: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "hidden_act": "gelu"}
    changes |= {"num_experts_per_tok": 1 if config["num_experts_per_tok"] == 2 else 2, "mlp_only_layers": [0, 1], "decoder_sparse_step": 3}
    for key in families.get(config["model_type"]).keys.model_fields:
        if key not in config or ("sliding_window" in key and config.get("use_sliding_window") is False):
            continue
        value = changes.get(key, not config[key] if config[key] in (True, False) else 5)
        if key not in changes and type(config[key]) in (int, float):
            value = 2 * config[key]
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            assert key not in ("rms_norm_eps", "rope_parameters", "sliding_window", "num_experts_per_tok"), key
            continue
        assert key == "max_position_embeddings" or off(loaded.model, expected, x) > 100 * TOLERANCE, key


@pytest.mark.concept("T03.04", part="io/hf/mixtral.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    """Files equal byte for byte; transformers loads ours and gives the same; a spec of ours survives the way there and back."""
    theirs, path = case
    loaded = directory.read(path)
    directory.write(
        tmp_path / "ours", loaded.model, family=loaded.family, rest=loaded.rest, generation_config=theirs.generation_config.to_diff_dict()
    )
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    back, report = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    x = tokens(theirs.config.vocab_size)
    assert torch.equal(hf.logits(back, x), hf.logits(theirs, x))
    mine, written = read_weights(tmp_path / "ours"), read_weights(path)
    assert list(mine) == list(written)


def test_round_trip_in_half_precision_is_bit_exact(case, tmp_path):
    _, path = case
    first = directory.read(path, dtype=torch.bfloat16)
    directory.write(tmp_path / "a", first.model, family=first.family, rest=first.rest)
    second = directory.read(tmp_path / "a")
    assert second.spec == first.spec
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b), name


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
