"""gpt-oss against transformers, in fp32, on tiny models whose every parameter is redrawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.test_llama import OTHER, SHAPE, cached_greedy, off, tokens
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import families
from trivium.io.tensors import read_weights

PLAIN = {"rope_type": "default", "rope_theta": 50.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TABLE: dict[str, dict[str, Any]] = {
    "alternating": {
        **SHAPE, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 0.01, "num_local_experts": 5, "num_experts_per_tok": 3,
        "sliding_window": 7, "max_position_embeddings": 64, "rope_parameters": YARN,
    },
    "odd": {
        **OTHER, "num_key_value_heads": 1, "head_dim": 14, "rms_norm_eps": 0.05, "num_local_experts": 3, "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5, "swiglu_alpha": 1.2, "swiglu_limit": 0.8,
        "attention_bias": False, "tie_word_embeddings": True, "max_position_embeddings": 256, "rope_parameters": PLAIN,
        "output_router_logits": True, "router_aux_loss_coef": 0.3, "pad_token_id": 3, "bos_token_id": 5, "eos_token_id": [6, 7],
        "use_cache": False, "initializer_range": 0.03, "attention_dropout": 0.25,
    },
}  # fmt: skip
TOLERANCE = 3e-5  # of the logits' standard deviation


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model = hf.tiny("gpt_oss", **TABLE[request.param])
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def test_every_key_takes_two_values():
    family = families.get("gpt_oss")
    written = [hf.MODELS["gpt_oss"][0](**keys).to_dict() for keys in TABLE.values()]
    for key in {*family.keys.model_fields, *family.carried} - {"hidden_act"}:
        assert len({json.dumps(config[key], sort_keys=True) for config in written}) > 1, key


@pytest.mark.concept("T03.04", part="io/hf/gpt_oss.py")
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
        assert off(model, expected, x) > 20 * TOLERANCE, name
        parameter.copy_(before)


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity or is refused."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    changes: dict[str, Any] = {
        "rope_parameters": {**PLAIN, "rope_theta": 7.0}, "hidden_act": "gelu", "num_experts_per_tok": 1, "swiglu_limit": 0.3,
        "layer_types": config["layer_types"][::-1] if theirs.config.num_hidden_layers == 2 else ["full_attention"] * 3,
    }  # fmt: skip
    for key in families.get("gpt_oss").keys.model_fields:
        value = changes.get(key, not config[key] if config[key] in (True, False) else 5)
        if key not in changes and type(config[key]) in (int, float):
            value = 2 * config[key]
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            assert key not in ("rms_norm_eps", "rope_parameters", "sliding_window", "layer_types", "num_experts_per_tok", "swiglu_alpha"), (
                key
            )
            continue
        assert key == "max_position_embeddings" or off(loaded.model, expected, x) > 20 * TOLERANCE, key


@pytest.mark.concept("T03.04", part="io/hf/gpt_oss.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    """Files equal byte for byte; transformers loads ours and gives the same."""
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
    assert list(read_weights(tmp_path / "ours")) == list(read_weights(path))


def test_round_trip_in_half_precision_is_bit_exact(case, tmp_path):
    _, path = case
    first = directory.read(path, dtype=torch.bfloat16)
    directory.write(tmp_path / "a", first.model, family=first.family, rest=first.rest)
    second = directory.read(tmp_path / "a")
    assert second.spec == first.spec
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b), name


def test_the_keys_of_published_files():
    """Older names beside today's; yarn where nothing is said; what the experts' 4 bits are called is refused."""
    family = families.get("gpt_oss")
    config = hf.MODELS["gpt_oss"][0](**TABLE["alternating"]).to_diff_dict()
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
    spec, rest = family.to_spec(hf.MODELS["gpt_oss"][0](**TABLE["alternating"]).to_diff_dict())
    blocks = {name: block.to_dict() for name, block in spec.blocks.items()}
    for block in blocks.values():
        block["ffn"] = change if "kind" in change else {**block["ffn"], **change}
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(blocks=blocks), rest)


def test_windows_of_two_sizes_are_refused():
    family = families.get("gpt_oss")
    spec, rest = family.to_spec(hf.MODELS["gpt_oss"][0](**TABLE["alternating"]).to_diff_dict())
    blocks = {name: block.to_dict() for name, block in spec.blocks.items()}
    blocks["layer1"]["mixer"]["pattern"] = {"kind": "window", "size": 3}
    with pytest.raises(ConfigError, match="one size, not 3, 7"):
        family.to_hf(spec.replace(blocks=blocks), rest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"layer_types": ["full_attention"]}, "names 1 layers of 3"), ({"sliding_window": None}, "gives no size")],
)
def test_configs_that_cannot_be_read_say_why(change, reason):
    config = hf.MODELS["gpt_oss"][0](**TABLE["alternating"]).to_dict()
    with pytest.raises(ConfigError, match=reason):
        families.get("gpt_oss").to_spec({**config, **change}, allow_unknown=config)
