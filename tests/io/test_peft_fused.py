"""Adapters of a family that stores q, k and v as one map, transposed: GPT-2's c_attn, against PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.io.test_peft import adapted, here, off, redraw, theirs
from tests.parity import hf
from trivium.adapt.lora import LoRA, adapter_tensors, initialize_adapter, merge, unmerge, updates
from trivium.core.errors import ConfigError, FileError
from trivium.io import directory
from trivium.io import peft as ours
from trivium.io.tensors import read_file
from trivium.nn.inputs import Inputs

KEYS = {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32, "n_inner": 40}
X = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return hf.save(hf.tiny("gpt2", **KEYS), tmp_path_factory.mktemp("base"))


CONFIGS: dict[str, dict[str, Any]] = {
    "c_attn": {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn"]},
    "default targets": {"r": 2, "lora_alpha": 5},
    "all-linear": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"},
    "patterns": {
        "r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "mlp.c_proj", "c_fc"],
        "rank_pattern": {"h.1.attn.c_attn": 5, "c_fc": 2}, "alpha_pattern": {"attn.c_attn": 11, "transformer.h.0.mlp.c_proj": 2.5},
    },
    "rslora, some layers": {"r": 5, "lora_alpha": 6, "use_rslora": True, "target_modules": ["c_attn"], "layers_to_transform": [0, 2]},
}  # fmt: skip


@pytest.mark.concept("T06.03", part="io/peft.py")
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(base, tmp_path, name):
    """PEFT saves, we load with one A for q, k and v; we save, PEFT loads; and the tensors are the same again."""
    other = adapted(base, **CONFIGS[name])
    with torch.no_grad():
        expected = other(X).logits
        with other.disable_adapter():
            plain = other(X).logits
    assert off(plain, expected) > 0.01  # the adapter shows
    other.save_pretrained(tmp_path / "theirs")
    model = here(base)
    step = ours.read(tmp_path / "theirs", model, family="gpt2")
    assert off(model(X).logits, expected) < 1e-5
    assert step.shared == ("mixer.inp",)
    q, k, v = (updates(model, "default")[f"layers.0.mixer.inp.{part}"][1] for part in "qkv")
    assert q.A is k.A is v.A
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert "layers.0.mixer.inp.q.lora.default.A" in trained and "layers.0.mixer.inp.k.lora.default.A" not in trained
    ours.write(tmp_path / "ours", model, family="gpt2", base=base)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert off(back(X).logits, expected) < 1e-5
    a, b = (read_file(tmp_path / folder / ours.WEIGHTS) for folder in ("theirs", "ours"))
    assert set(a) == set(b) and all(torch.equal(a[key].load(), b[key].load()) for key in b)
    config = json.loads((tmp_path / "ours" / ours.CONFIG).read_text())
    assert config["fan_in_fan_out"] is True
    again = here(base)
    assert ours.read(tmp_path / "ours", again, family="gpt2", base=base) == step
    assert off(again(X).logits, expected) < 1e-5


APART: dict[str, LoRA] = {
    "q and v": LoRA(rank=3, alpha=6.0, targets=("q", "v", "ffn.out")),
    "all, other ranks and scales": LoRA(rank=2, alpha=3.0, targets="all-linear", ranks={"k": 4}, alphas={"v": 7.0, "layers.1.mixer.inp.q": -2.0}),
    "rslora": LoRA(rank=2, alpha=3.0, rsqrt=True, targets=("q", "k", "v"), ranks={"k": 1}),
    "one layer's k": LoRA(rank=4, alpha=5.0, targets=("layers.1.mixer.inp.k",)),
    "shared by two": LoRA(rank=3, alpha=5.0, targets=("q", "k"), shared=("mixer.inp",), alphas={"k": 2.0}),
    "no scale": LoRA(rank=2, alpha=0.0, targets=("q", "v")),
    "ranks that add up to more than the width": LoRA(rank=12, alpha=3.0, targets=("q", "k", "v")),
}  # fmt: skip


@pytest.mark.concept("T06.03", part="io/peft.py")
@pytest.mark.parametrize("name", APART)
def test_parts_trained_apart_become_one_of_the_summed_rank(base, tmp_path, name):
    model = here(base)
    step = APART[name]
    step.apply(model)
    redraw(model, seed=3)
    with torch.no_grad():
        expected = model(X).logits
        assert off(here(base)(X).logits, expected) > 0.001 or step.alpha == 0
    ours.write(tmp_path / "adapter", model, family="gpt2", base=base)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert off(back(X).logits, expected) < 1e-5
    held = [updates(model, step.name).get(f"layers.1.mixer.inp.{part}") for part in "qkv"]
    rank = sum({id(pair[1].A): len(pair[1].A) for pair in held if pair is not None}.values())
    fused = back.base_model.model.transformer.h[1].attn.c_attn
    assert fused.lora_A["default"].weight.shape == (rank, 24) and fused.lora_B["default"].weight.shape == (72, rank)
    again = here(base)
    ours.read(tmp_path / "adapter", again, family="gpt2", base=base)
    with torch.no_grad():
        assert off(again(X).logits, expected) < 1e-5
    merge(again, probe=X)
    directory.write(tmp_path / "merged", again, family="gpt2")
    with torch.no_grad():
        assert off(theirs(tmp_path / "merged")(X).logits, expected) < 1e-5


@pytest.mark.concept("T06.03", part="io/peft.py")
def test_a_shared_a_is_trained_copied_saved_merged_and_taken_apart_as_one(base, tmp_path):
    model = here(base)
    LoRA(rank=3, alpha=6.0, targets=("q", "k", "v"), shared=("mixer.inp",)).apply(model)
    initialize_adapter(model, seed=0)
    with torch.no_grad():
        assert torch.equal(model(X).logits, here(base)(X).logits)
    redraw(model, seed=1)
    model(X).logits.square().mean().backward()
    other = peft.get_peft_model(theirs(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"])).eval()
    fused = other.base_model.model.transformer.h[1].attn.c_attn
    chosen = {part: updates(model, "default")[f"layers.1.mixer.inp.{part}"][1] for part in "qkv"}
    with torch.no_grad():
        for i, block in enumerate(other.base_model.model.transformer.h):
            parts = [updates(model, "default")[f"layers.{i}.mixer.inp.{part}"][1] for part in "qkv"]
            block.attn.c_attn.lora_A["default"].weight.copy_(parts[0].A)
            block.attn.c_attn.lora_B["default"].weight.copy_(torch.cat([part.B for part in parts]))
    other(X).logits.square().mean().backward()
    torch.testing.assert_close(chosen["q"].A.grad, fused.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([part.B.grad for part in chosen.values()]), fused.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5
    )
    expected = model(X).logits.detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        updates(twin, "default")["layers.0.mixer.inp.q"][1].A.zero_()
        assert updates(twin, "default")["layers.0.mixer.inp.v"][1].A.count_nonzero() == 0
        assert torch.equal(model(X).logits, expected)  # the copy shares with itself alone
    directory.write(tmp_path / "native", model)
    again = directory.read(tmp_path / "native").model
    assert again.passes == model.passes
    q, k = (updates(again, "default")[f"layers.2.mixer.inp.{part}"][1] for part in "qk")
    assert q.A is k.A
    assert torch.equal(again(X).logits, expected)
    kept, step = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}, model.passes[0]
    assert len(kept) == 3 * 4
    merge(model, probe=X)
    assert off(model(X).logits.detach(), expected) < 1e-5
    unmerge(model, step, kept)
    assert off(model(X).logits.detach(), expected) < 1e-5


def test_rows_of_a_batch_use_fused_adapters_apart(base, tmp_path):
    other = adapted(base, name="a", r=3, target_modules=["c_attn"])
    other.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn", "c_fc"]))
    redraw(other, seed=5)
    other.save_pretrained(tmp_path)
    x = X[:1].repeat(3, 1)
    with torch.no_grad():
        expected = other(x, adapter_names=["b", "__base__", "a"]).logits
    model = here(base)
    for name in ("a", "b"):
        ours.read(tmp_path / name, model, family="gpt2", name=name)
    with torch.no_grad():
        assert off(model(Inputs(x, adapters=torch.tensor([1, -1, 0]))).logits, expected) < 1e-5


def test_what_does_not_fit_says_why(base, tmp_path):
    adapted(base, r=2, target_modules=["c_attn"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / ours.CONFIG).read_text())
    for change, kind, message in (
        ({"target_modules": ["c_attn", "c_fc"]}, FileError, "c_fc"),
        ({"r": 3}, FileError, r"expected \[3, 24\] and \[72, 3\]"),
    ):
        (tmp_path / ours.CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(kind, match=message):
            ours.read(tmp_path, here(base), family="gpt2")
    for step, message in (
        (LoRA(rank=2, targets=("q", "k"), shared=("mixer.inp",), ranks={"k": 3}), "share one A, so their ranks must be equal"),
        (LoRA(rank=2, targets=("q", "k"), shared=("ffn.inp",)), "'ffn.inp' contains none of the adapted maps"),
        (LoRA(rank=25, targets=("q", "k")), "rank 25 is above the size"),
    ):
        with pytest.raises(ConfigError, match=message):
            step.apply(here(base))
