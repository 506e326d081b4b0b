"""Qwen3-Next against transformers' torch path, in fp32, on tiny models whose every parameter is redrawn.

The table gives each key of config.json that the family reads two values (but `hidden_act`, where silu is all there is), dense
and sparse layers, and sizes that all differ. A mutation of any one tensor or key on our side alone must show.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.parity.test_llama import cached_greedy, off, tokens
from tests.tiny import tiny as tiny_ours
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory, peft
from trivium.io.hf import families
from trivium.io.tensors import read_weights
from trivium.nn.inputs import Inputs

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
TABLE: dict[str, dict[str, Any]] = {
    "dense": {**SHAPE, "num_experts": 0},
    "dense-attention-first": {**OTHER, "mlp_only_layers": [0, 1, 2]},
    "sparse": {**SHAPE, **EXPERTS, "mlp_only_layers": [1]},
    "sparse-every-second": {
        **OTHER, "decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 8, "norm_topk_prob": False, "output_router_logits": True,
    },
}  # fmt: skip
TOLERANCE = 3e-5  # of the logits' standard deviation; against float64, both sides are up to 2e-5 off


def tiny(**keys: Any) -> transformers.PreTrainedModel:
    """A redrawn model that remembers, with norms about one."""
    model = hf.tiny("qwen3_next", **keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(3.0)
            elif name.endswith("norm.weight") and "linear_attn" not in name:
                parameter.sub_(1.0)
    return model


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model = tiny(**TABLE[request.param])
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def test_every_key_takes_two_values():
    family = families.get("qwen3_next")
    written = [hf.MODELS["qwen3_next"][0](**keys).to_dict() for keys in TABLE.values()]
    for key in [*family.keys.model_fields, *family.carried]:
        assert len({json.dumps(config[key]) for config in written}) > 1 or key == "hidden_act", key


@pytest.mark.concept("X.05", "X.137", part="io/hf/qwen3_next.py")
def test_logits(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    assert 1 <= expected.std() <= 3
    assert off(directory.read(path).model, expected, x) < TOLERANCE


@pytest.mark.concept("X.137", part="io/hf/qwen3_next.py")
def test_greedy_tokens_with_a_cache(case):
    theirs, path = case
    prompt = tokens(theirs.config.vocab_size, seed=1)[:, :12]
    expected = hf.greedy(theirs, prompt, 24)
    assert torch.equal(cached_greedy(directory.read(path).model, prompt, 24), expected)
    assert len(expected.unique()) > 5  # text, not one token over and over


@torch.no_grad()
def test_cached_pieces_equal_the_whole(case):
    theirs, path = case
    model, x = directory.read(path).model, tokens(theirs.config.vocab_size)
    cache = model.cache(len(x), x.shape[1])
    pieces = torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split((17, 1, 2, 20), 1)], 1)
    expected = hf.logits(theirs, x)
    assert ((pieces - expected).abs().max() / expected.std()).item() < TOLERANCE


def test_gradients(case):
    """The loss's gradient of every parameter, carried over by the family's own rules."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size, seed=2)
    logits = theirs(input_ids=x, attention_mask=torch.ones_like(x)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    model = directory.read(path).model
    torch.nn.functional.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    # theirs as a model of ours: its gradients written as weights, and read
    with torch.no_grad():
        kept = [parameter.clone() for parameter in theirs.parameters()]
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
        twin = directory.read(hf.save(theirs, path.with_name(path.name + "-gradients")))
        for parameter, value in zip(theirs.parameters(), kept, strict=True):
            parameter.copy_(value)
    theirs.zero_grad()
    for name, grad in twin.model.named_parameters():
        assert ((found[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-3)) < 3e-4, name


def test_every_tensor_matters(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    model = directory.read(path).model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.add_(0.1 * torch.randn(before.shape, generator=generator))
        assert off(model, expected, x) > 100 * TOLERANCE, name
        parameter.copy_(before)


def mutations(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One changed config for each key that the family reads."""
    rope = config["rope_parameters"]
    out: dict[str, Any] = {
        f"rope {key}": {"rope_parameters": {**rope, key: 2 * value}} for key, value in rope.items() if key != "rope_type"
    }
    for key in set(families.get("qwen3_next").keys.model_fields) - {"rope_parameters"}:
        value = config[key]
        if key == "layer_types":
            changed: Any = value[::-1]
        elif key == "mlp_only_layers":
            changed = [2] if value == [1] else [1]
        else:
            changed = (not value) if isinstance(value, bool) else "gelu" if key == "hidden_act" else 2 * value or 4
        out[key] = {key: changed}
    return {key: {**config, **change} for key, change in out.items()}


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity or is refused, but for those of parts that are not there."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    idle, refused = set(), set()
    for key, changed in mutations(config).items():
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            refused.add(key)
            continue
        if off(loaded.model, expected, x) < 100 * TOLERANCE:
            idle.add(key)
    dense = not config["num_experts"] or len(config["mlp_only_layers"]) == config["num_hidden_layers"]
    sparse = {"num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob", "decoder_sparse_step"}
    everywhere = not config["mlp_only_layers"] and config["decoder_sparse_step"] == 1
    allowed = {"max_position_embeddings"} | (sparse | {"num_experts", "mlp_only_layers"} if dense else set())
    assert idle <= allowed | ({"intermediate_size"} if everywhere else set()), idle
    assert not refused & {"rms_norm_eps", "rope rope_theta", "rope partial_rotary_factor"}


@pytest.mark.concept("X.137", part="io/hf/qwen3_next.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    theirs, path = case
    loaded = directory.read(path)
    directory.write(
        tmp_path / "ours", loaded.model, family=loaded.family, rest=loaded.rest, generation_config=theirs.generation_config.to_diff_dict()
    )
    mine, written = read_weights(tmp_path / "ours"), read_weights(path)
    assert set(mine) == set(written)
    assert all(torch.equal(mine[name].load(), written[name].load()) for name in mine)
    back, report = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    x = tokens(theirs.config.vocab_size)
    assert torch.equal(hf.logits(back, x), hf.logits(theirs, x))
    hf.save(back, tmp_path / "again")
    ours, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again"))
    assert ours == again == json.loads((path / "config.json").read_text())


@pytest.mark.concept("X.137", part="io/hf/qwen3_next.py")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(case, tmp_path, dtype):
    _, path = case
    first = directory.read(path, dtype=dtype)
    directory.write(tmp_path / "a", first.model, family=first.family, rest=first.rest)
    second = directory.read(tmp_path / "a")
    assert second.spec == first.spec
    directory.write(tmp_path / "b", second.model, family=second.family, rest=second.rest)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b), name


def test_a_config_of_the_first_release(tmp_path):
    """Every fourth layer by `full_attention_interval`, rotary keys at the top, the layers of further prediction in the file."""
    theirs = tiny(**TABLE["sparse"])
    hf.save(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
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
    weights = {name: lazy.load().clone() for name, lazy in read_weights(tmp_path).items()}
    further = ("mtp.fc", "mtp.norm", "mtp.layers.0.mlp.experts.3.up_proj", "mtp.layers.0.self_attn.q_proj", "mtp.layers.0.mlp.gate")
    safetensors.torch.save_file(weights | {f"{name}.weight": torch.ones(2) for name in further}, tmp_path / "model.safetensors")
    x = tokens(101)
    assert off(directory.read(tmp_path).model, hf.logits(theirs, x), x) < TOLERANCE


def test_an_adapter_on_maps_that_lie_together_is_refused(tmp_path):
    """Its rows would have to be interleaved: that is said, rather than wrong ones written."""
    spec, _ = families.get("qwen3_next").to_spec(hf.MODELS["qwen3_next"][0](**TABLE["dense"]).to_diff_dict())
    model = LoRA(rank=2, targets=("q",)).apply(tiny_ours(spec))
    with pytest.raises(ConfigError, match="no module of its own for layers.0.mixer.inp.q"):
        peft.write(tmp_path / "a", model, family="qwen3_next")
    peft.write(tmp_path / "b", LoRA(rank=2, targets=("out",)).apply(tiny_ours(spec)), family="qwen3_next")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["window"] * 4}, "layer_types"),
        ({"linear_num_value_heads": 3}, "value_heads"),
        ({"num_expert": 3}, "did you mean num_experts"),
    ],
)
def test_configs_that_cannot_be_read_say_why(tmp_path, change, message):
    config = hf.MODELS["qwen3_next"][0](**TABLE["dense"]).to_diff_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(TriviumError, match=message):
        directory.read(tmp_path)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"layers": "2*layer0", "blocks": {"layer0": None}}, "some layer must be attention"),
        ({"final_norm": {"kind": "rms", "eps": 0.01}}, "offset"),
        ({"blocks": {"layer0": {"ffn": None}}}, "mlp"),
        ({"blocks": {"layer1": {"mixer": {"gate": None}}}}, "gate"),
        ({"blocks": {"layer0": {"mixer": {"norm": {"kind": "rms", "eps": 0.5}}}}}, "eps"),
    ],
)
def test_what_the_family_cannot_say_is_refused(change, reason):
    family = families.get("qwen3_next")
    spec, rest = family.to_spec(hf.MODELS["qwen3_next"][0](**TABLE["dense"]).to_diff_dict())
    blocks = {name: block.to_dict() for name, block in spec.blocks.items()}
    for name, fields in change.get("blocks", {}).items():
        for part, value in (fields or {}).items():
            blocks[name][part] = {**blocks[name][part], **value} if isinstance(value, dict) else value
    used = {name: blocks[name] for name in change.get("blocks", {})} if "layers" in change else blocks
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(**{**change, "blocks": used}), rest)
