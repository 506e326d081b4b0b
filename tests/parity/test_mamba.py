"""Mamba and Mamba-2 against transformers' torch path, in fp32, on tiny models whose every parameter is redrawn.

The table gives each key of config.json that a family reads two values (but `hidden_act`, where silu is all there is), and
sizes that all differ. A mutation of any one tensor or key on our side alone must show.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.test_llama import cached_greedy, off, tokens
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory, peft
from trivium.io.hf import families
from trivium.io.tensors import read_weights
from trivium.nn.inputs import Inputs

STARTS = {
    "initializer_range": 0.03, "residual_in_fp32": False, "time_step_floor": 1e-3, "time_step_max": 0.2,
    "time_step_min": 0.002, "use_cache": False, "bos_token_id": 3, "pad_token_id": 4, "eos_token_id": 5,
}  # fmt: skip
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {
        "vocab_size": 101, "hidden_size": 20, "num_hidden_layers": 3, "state_size": 6, "layer_norm_epsilon": 0.01, "time_step_rank": 7,
    }),
    "mamba-untied-biases": ("mamba", {
        "vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "layer_norm_epsilon": 0.05, "expand": 3, "conv_kernel": 3,
        "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_init_scheme": "constant", "time_step_scale": 2.0,
        "use_associative_scan": False, "use_mambapy": True, **STARTS,
    }),
    "mamba2-groups": ("mamba2", {
        "vocab_size": 101, "hidden_size": 20, "num_hidden_layers": 3, "state_size": 6, "layer_norm_epsilon": 0.01, "num_heads": 8,
        "head_dim": 5, "n_groups": 2, "chunk_size": 16,
    }),
    "mamba2-tied-biases": ("mamba2", {
        "vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "layer_norm_epsilon": 0.05, "expand": 3, "conv_kernel": 3,
        "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "num_heads": 12, "head_dim": 6, "n_groups": 1,
        "chunk_size": 8, "time_step_rank": 5, **STARTS,
    }),
    "mamba2-limited-steps": ("mamba2", {
        "vocab_size": 89, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "num_heads": 6, "head_dim": 8, "n_groups": 3,
        "time_step_limit": (0.05, 0.4), "layer_norm_epsilon": 0.02,
    }),
}  # fmt: skip
TOLERANCE = 5e-5  # of the logits' standard deviation; against float64, both sides are up to 2e-5 off on the first of the table


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model_type, keys = TABLE[request.param]
    model = tiny(model_type, **keys)
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def tiny(model_type: str, **keys: Any) -> transformers.PreTrainedModel:
    """A redrawn model that remembers: steps near a tenth, so that a state lasts for ten tokens and more. What is selected is
    smaller than redrawn, for a product of three of it would magnify rounding on both sides."""
    model = hf.tiny(model_type, **keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.sub_(2.5)
            elif name.endswith("A_log") and model_type == "mamba2":
                parameter.sub_(1.0)
            elif name.endswith(("conv1d.weight", "x_proj.weight")):
                parameter.mul_(0.5)
    return model


def test_every_key_takes_two_values():
    for name in ("mamba", "mamba2"):
        family = families.get(name)
        written = [hf.MODELS[kind][0](**keys).to_dict() for kind, keys in TABLE.values() if kind == name]
        for key in [*family.keys.model_fields, *family.carried]:
            # transformers divides weights anew each time that it loads a model with rescale_prenorm_residual
            same = ("hidden_act", "rescale_prenorm_residual")
            assert len({json.dumps(config[key]) for config in written}) > 1 or key in same, f"{name}: {key}"


@pytest.mark.concept("X.06", "X.165", part="io/hf/mamba.py")
def test_logits(case):
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    assert expected.std() > 1
    assert off(directory.read(path).model, expected, x) < TOLERANCE


def test_the_state_reaches_far(case):
    """The first token shows in the last one's logits, 40 places on: a memory that forgot at once would prove little."""
    theirs, _ = case
    x = tokens(theirs.config.vocab_size)
    other = x.clone()
    other[:, 0] = (x[:, 0] + 1) % theirs.config.vocab_size
    a, b = hf.logits(theirs, x)[:, -1], hf.logits(theirs, other)[:, -1]
    assert ((a - b).abs().max() / a.std()) > 100 * TOLERANCE


@pytest.mark.concept("X.06", "X.165", part="io/hf/mamba.py")
def test_greedy_tokens_with_a_cache(case):
    theirs, path = case
    if theirs.config.model_type == "mamba2" and theirs.config.time_step_limit[1] < 1:
        pytest.skip("transformers does not limit steps in its own decoding")
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
    theirs(input_ids=x, attention_mask=torch.ones_like(x), labels=x, use_cache=False).loss.backward()
    model = directory.read(path).model
    torch.nn.functional.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in theirs.named_parameters()}
    theirs.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    found = directory.exported(model, family=theirs.config.model_type)
    assert set(expected) == set(found)
    for name, grad in expected.items():
        scale = grad.abs().max().clamp_min(1e-3)
        assert ((found[name] - grad).abs().max() / scale) < 1e-4, name


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


def mutations(model_type: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One changed config for each key that the family reads."""
    out = {}
    for key in families.get(model_type).keys.model_fields:
        value = config[key]
        if key == "time_step_limit":
            out[key] = [0.3, 0.5]
        else:
            out[key] = (not value) if isinstance(value, bool) else "gelu" if key == "hidden_act" else 2 * value
    return {key: {**config, key: value} for key, value in out.items()}


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity or is refused."""
    theirs, path = case
    x = tokens(theirs.config.vocab_size)
    expected = hf.logits(theirs, x)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    refused = set()
    for key, changed in mutations(config["model_type"], config).items():
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            refused.add(key)
            continue
        assert off(loaded.model, expected, x) > 100 * TOLERANCE, key
    assert not refused & {"layer_norm_epsilon", "time_step_limit"}


@pytest.mark.concept("X.165", part="io/hf/mamba.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    theirs, path = case
    loaded = directory.read(path)
    directory.write(
        tmp_path / "ours", loaded.model, family=loaded.family, rest=loaded.rest, generation_config=theirs.generation_config.to_diff_dict()
    )
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    x = tokens(theirs.config.vocab_size)
    assert torch.equal(hf.logits(back, x), hf.logits(theirs, x))
    hf.save(back, tmp_path / "again")
    ours, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again"))
    assert ours == again == json.loads((path / "config.json").read_text())
    mine, written = read_weights(tmp_path / "ours"), read_weights(tmp_path / "again")
    assert list(mine) == list(written)
    assert all(torch.equal(mine[name].load(), written[name].load()) for name in mine)


@pytest.mark.concept("X.165", part="io/hf/mamba.py")
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


def test_a_config_of_the_first_converters(tmp_path):
    """Keys that were written then and are read by none; `time_step_rank` by its rule."""
    theirs = tiny("mamba", vocab_size=31, hidden_size=20, num_hidden_layers=1)
    hf.save(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("tie_word_embeddings", "use_mambapy", "use_associative_scan"):
        del config[key]
    config |= {"d_model": 20, "d_inner": 40, "n_layer": 1, "fused_add_norm": True, "rms_norm": True, "ssm_cfg": {}}
    config["time_step_rank"] = "auto"
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = tokens(31)
    assert off(directory.read(tmp_path).model, hf.logits(theirs, x), x) < TOLERANCE


def test_an_adapter_goes_out_and_comes_back(case, tmp_path):
    """On maps that lie together on disk, and on the one whose bias is elsewhere in the model."""
    _, path = case
    loaded, again = directory.read(path), directory.read(path)
    targets = ("x", "B", "steps") if loaded.family == "mamba" else ("x", "B", "dt")
    LoRA(rank=2, targets=targets).apply(loaded.model)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora." in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    peft.write(tmp_path / "adapter", loaded.model, family=loaded.family)
    peft.read(tmp_path / "adapter", again.model, family=loaded.family)
    x = tokens(loaded.spec.vocab)
    expected = loaded.model(x).logits.detach()
    assert off(again.model, expected, x) < TOLERANCE < off(directory.read(path).model, expected, x)


@pytest.mark.parametrize(
    "model_type, change, message",
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act"),
        ("mamba", {"intermediate_size": 41}, "intermediate_size"),
        ("mamba", {"state_siz": 3}, "did you mean state_size"),
        ("mamba2", {"num_heads": 3}, "num_heads"),
        ("mamba2", {"n_groups": 3}, "groups"),
        ("mamba2", {"time_step_limit": [0.1]}, "time_step_limit"),
    ],
)
def test_configs_that_cannot_be_read_say_why(tmp_path, model_type, change, message):
    heads = {"num_heads": 8, "head_dim": 5, "n_groups": 2} if model_type == "mamba2" else {}
    keys = {"vocab_size": 31, "hidden_size": 20, "num_hidden_layers": 1, **heads}
    config = hf.MODELS[model_type][0](**keys).to_diff_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(TriviumError, match=message):
        directory.read(tmp_path)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"context": 64}, "context = 64"),
        ({"dim": 12}, "multiple of the width"),
        ({"final_norm": {"kind": "rms", "eps": 0.5}}, "eps"),
        ({"blocks": {"layer": {"mixer": {"kind": "mamba2", "heads": 8, "head_dim": 5}}}}, "kind mamba"),
        ({"blocks": {"layer": {"mixer": {"kind": "mamba", "inner": 40, "dt_rank": 2}, "ffn": {"kind": "mlp", "hidden": 8}}}}, "ffn"),
    ],
)
def test_what_a_family_cannot_say_is_refused(change, reason):
    family = families.get("mamba")
    spec, rest = family.to_spec(hf.MODELS["mamba"][0](vocab_size=31, hidden_size=20, num_hidden_layers=1).to_diff_dict())
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(**change), rest)
