"""Adapters both ways: what PEFT saved loads here, what is saved here loads in PEFT, and the logits agree."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.parity import hf
from trivium.adapt.lora import LoRA, adapters, initialize_adapter, merge, updates
from trivium.core.errors import ConfigError, FileError, TriviumError
from trivium.io import directory
from trivium.io import peft as ours
from trivium.io.tensors import read_file
from trivium.models.transformer import TransformerModel
from trivium.nn.inputs import Inputs

KEYS = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
X = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return hf.save(hf.tiny("llama", **KEYS, attention_bias=True), tmp_path_factory.mktemp("base"))


def theirs(base: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()


def adapted(base: Path, *, seed: int = 0, name: str = "default", **config: Any) -> peft.PeftModel:
    """PEFT's adapter on the base with A and B drawn so that it shows."""
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(task_type="CAUSAL_LM", **config), adapter_name=name).eval()
    redraw(model, seed=seed)
    return model


@torch.no_grad()
def redraw(model: torch.nn.Module, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora" in key:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.std()).item()


def here(base: Path) -> TransformerModel:
    return directory.read(base).model


CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "all-linear": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"},
    "regex": {"r": 4, "lora_alpha": 4, "target_modules": r".*\.[02]\.(self_attn|mlp)\.(v|up)_proj"},
    "head": {"r": 2, "target_modules": ["lm_head", "k_proj"]},
    "patterns": {
        "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj"],
        "rank_pattern": {"k_proj": 5, r"layers\.1\..*q_proj": 2}, "alpha_pattern": {"model.layers.0.self_attn.o_proj": 11, "gate_proj": 2.5},
    },
    "rslora": {"r": 5, "lora_alpha": 6, "use_rslora": True, "target_modules": ["v_proj"], "rank_pattern": {"layers.2.self_attn.v_proj": 2}},
    "layers": {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one layer": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": 1},
    "exclude": {"r": 2, "target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "dropout": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.concept("T06.03", part="io/peft.py")
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(base, tmp_path, name):
    """PEFT saves, we load; we save, PEFT loads; and the tensors are the same again."""
    other = adapted(base, **CONFIGS[name])
    with torch.no_grad():
        expected, plain = other(X).logits, other.get_base_model()
        with other.disable_adapter():
            plain = other(X).logits
    assert off(plain, expected) > 0.01  # the adapter shows
    other.save_pretrained(tmp_path / "theirs")
    model = here(base)
    step = ours.read(tmp_path / "theirs", model, family="llama")
    assert model.passes == (step,)
    assert off(model(X).logits, expected) < 1e-5
    assert step.dropout == CONFIGS[name].get("lora_dropout", 0.0)
    ours.write(tmp_path / "ours", model, family="llama", base=base)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert off(back(X).logits, expected) < 1e-5
    a, b = (read_file(tmp_path / folder / ours.WEIGHTS) for folder in ("theirs", "ours"))
    assert set(a) - {"base_model.model.lm_head.base_layer.weight"} == set(b)  # PEFT adds a copy of an adapted head
    assert all(torch.equal(a[key].load(), b[key].load()) for key in b)
    again = here(base)
    assert ours.read(tmp_path / "ours", again, family="llama", base=base) == step
    assert off(again(X).logits, expected) < 1e-5


@pytest.mark.concept("T06.03", part="io/peft.py")
def test_adapter_made_here_loads_in_peft_and_merges_alike(base, tmp_path):
    model = here(base)
    LoRA(rank=3, alpha=7.5, targets=("mixer.inp.k", "ffn.out"), ranks={"layers.1.mixer.inp.k": 2}, alphas={"ffn.out": 3.0}).apply(model)
    with torch.no_grad():
        before = here(base)(X).logits
        initialize_adapter(model, seed=0)
        assert torch.equal(model(X).logits, before)  # step 0 is the base exactly
    redraw(model, seed=1)
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == {
        key for key, _ in model.named_parameters() if ".lora." in key
    }
    expected = model(X).logits.detach()
    ours.write(tmp_path / "adapter", model, family="llama", base_name="somewhere/base", revision="main")
    config = json.loads((tmp_path / "adapter" / ours.CONFIG).read_text())
    assert config["target_modules"] == ["mlp.down_proj", "self_attn.k_proj"]
    assert config["rank_pattern"] == {"model.layers.1.self_attn.k_proj": 2} and config["alpha_pattern"] == {"mlp.down_proj": 3.0}
    assert (config["base_model_name_or_path"], config["revision"]) == ("somewhere/base", "main")
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert off(back(X).logits, expected) < 1e-5
        merged = back.merge_and_unload()
    merge(model, probe=X)
    with torch.no_grad():
        assert off(model(X).logits, expected) < 1e-5
    directory.write(tmp_path / "merged", model, family="llama")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for (key, a), b in zip(exported.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.concept("T06.03", part="io/peft.py")
def test_several_adapters(base, tmp_path):
    """Two adapters on one base; each row of a batch uses the one it names, as PEFT does with `adapter_names`."""
    other = adapted(base, name="a", r=3, target_modules=["q_proj", "up_proj"])
    other.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up_proj", "o_proj"]))
    redraw(other, seed=5)
    other.save_pretrained(tmp_path)
    x = X[:1].repeat(3, 1)
    with torch.no_grad():
        expected = other(x, adapter_names=["b", "__base__", "a"]).logits
    model = here(base)
    for name in ("a", "b"):
        ours.read(tmp_path / name, model, family="llama", name=name)
    with torch.no_grad():
        assert off(model(Inputs(x, adapters=torch.tensor([1, -1, 0]))).logits, expected) < 1e-5
    for name in ("a", "b"):
        ours.write(tmp_path / f"{name}-again", model, family="llama", name=name)
        assert (tmp_path / f"{name}-again" / ours.WEIGHTS).read_bytes() == (tmp_path / name / ours.WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="another name"):
        ours.read(tmp_path / "a", model, family="llama", name="a")
    with pytest.raises(TriviumError, match="unknown adapter 'c'"):
        ours.write(tmp_path / "c", model, family="llama", name="c")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    adapted(base, r=2, target_modules=["q_proj"]).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"a_new_trick": 3}, "a_new_trick"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"peft_type": "BOFT"}, "peft_type"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["k_proj"]}, "disagree"),
        ({"target_modules": ["q_proj", "k_proj"]}, "disagree"),
        ({"target_modules": "(a+)+b"}, "too involved"),
        ({"target_modules": ".*.*.*.*.*.*"}, "too involved"),
        ({"target_modules": "("}, "no regular expression"),
        ({"rank_pattern": {"q_proj": 3}}, "another rank"),
        ({"r": 0}, "r:"),
        ({"r": 3}, "another rank"),
    ],
)
def test_configs_that_cannot_be_used_say_why(base, saved, tmp_path, change, message):
    shutil.copytree(saved, tmp_path / "x")
    config = json.loads((saved / ours.CONFIG).read_text())
    (tmp_path / "x" / ours.CONFIG).write_text(json.dumps(config | change))
    model, start = here(base), time.monotonic()
    with pytest.raises(TriviumError, match=message):
        ours.read(tmp_path / "x", model, family="llama")
    assert model.passes == () and time.monotonic() - start < 2  # nothing was changed


def test_weights_that_do_not_fit_say_why(base, saved, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, tmp_path / "x")
    good = load_file(saved / ours.WEIGHTS)
    first = next(iter(good))
    cases = {
        "left over": {**good, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 24)},
        "is missing": {key: value for key, value in good.items() if key != first},
        "no tensors": {},
        "expected": {**good, first: torch.ones(2, 25)},
        "replaces weights": {**good, "base_model.model.lm_head.base_layer.weight": torch.ones(61, 24)},
    }
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "x" / ours.WEIGHTS)
        model = here(base)
        with pytest.raises(FileError, match=message):
            ours.read(tmp_path / "x", model, family="llama")
        assert model.passes == ()


def test_other_base_weights_are_noticed(base, tmp_path):
    model = here(base)
    LoRA(rank=2, targets=("q",)).apply(model)
    initialize_adapter(model, seed=0)
    ours.write(tmp_path / "adapter", model, family="llama", base=base)
    elsewhere = hf.save(hf.tiny("llama", **KEYS, attention_bias=True, seed=9), tmp_path / "other")
    with pytest.raises(FileError, match="other base weights"):
        ours.read(tmp_path / "adapter", here(elsewhere), family="llama", base=elsewhere)
    assert ours.read(tmp_path / "adapter", here(elsewhere), family="llama", base=elsewhere, accept=True).rank == 2
    assert ours.read(tmp_path / "adapter", here(base), family="llama", base=base).rank == 2
    assert list(adapters(model)) == ["default"] and len(updates(model, "default")) == 3


def test_rounding_is_said(base, saved, capsys):
    model = directory.read(base, dtype="bf16").model
    ours.read(saved, model, family="llama")
    assert "rounded to the model's bfloat16" in capsys.readouterr().err
