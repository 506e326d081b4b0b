"""Adapters in other forms: the same function wherever nothing is cut, and a measured loss where something is; against PEFT, the GGUF
package and singular values taken by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.recipes.toys import bundle
from tests.tiny import tiny
from trivium.adapt.adapter import Adapter, adapter_tensors, adapters, initialize_adapter, merge, updates
from trivium.adapt.dora import DoRA
from trivium.adapt.ia3 import IA3
from trivium.adapt.lora import LoRA
from trivium.adapt.nf4 import Nf4
from trivium.adapt.prompt import Prompt
from trivium.adapt.square import MoRA
from trivium.core.errors import ConfigError, FileError, TriviumError
from trivium.core.seed import generator
from trivium.io import peft as formats
from trivium.models.presets import llama
from trivium.recipes.adapter import inspect_adapter, merge_adapter, probe_of, unmerge_adapter
from trivium.recipes.adapter_convert import convert_adapter
from trivium.recipes.gguf import export_gguf
from trivium.recipes.load import load

X = torch.arange(3, 35)[None]
LORA = LoRA(rank=6, alpha=9.0, targets=("q", "v", "ffn.out"), ranks={"ffn.out": 4}, alphas={"v": 5.0})


def saved(toy: Path, path: Path, step: Adapter, *, std: float = 0.1) -> Path:
    """The adapter `step` of the toy, every trained parameter moved from its start."""
    model = step.apply(load(toy).model)
    initialize_adapter(model, step.name, seed=0)
    with torch.no_grad():
        for key, parameter in adapter_tensors(model, step.name).items():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator(1, key)))
    formats.write(path, model, family="llama", base=toy)
    return path


def logits(*where: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(where[0], adapter=where[1] if len(where) > 1 else None).model(X).logits


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("step", [LORA, DoRA(rank=3, targets=("q", "ffn.out")), MoRA(rank=4), IA3()], ids=lambda step: step.kind)
def test_what_is_merged_can_be_taken_out_again(toy: Path, tmp_path: Path, step: Adapter):
    adapter = saved(toy, tmp_path / "adapter", step)
    assert merge_adapter(adapter, tmp_path / "merged").mean_kl < 1e-6
    found = unmerge_adapter(tmp_path / "merged", adapter, tmp_path / "base")
    assert found.mean_kl < 1e-6 and found.maps == len(updates(load(adapter).model, "default"))
    plain, again = load(toy).model, load(tmp_path / "base").model
    assert again.passes == () and not torch.equal(load(tmp_path / "merged").model(X).logits, plain(X).logits)
    for name, parameter in plain.named_parameters():
        close(again.get_parameter(name), parameter, 1e-5)


def test_what_cannot_be_taken_out_says_why(toy: Path, tmp_path: Path):
    dora, whole, scale = (tmp_path / name for name in ("dora", "whole", "scale"))
    for path, step in ((dora, DoRA(rank=3)), (whole, LoRA(rank=3, targets=("q",), full=("inp.up",))), (scale, IA3())):
        saved(toy, path, step)
    merge_adapter(dora, tmp_path / "merged")
    (dora / formats.KEPT).unlink()  # as PEFT saves it
    with pytest.raises(TriviumError, match="norms that merging divided by, which were not kept"):
        unmerge_adapter(tmp_path / "merged", dora, tmp_path / "base")
    with pytest.raises(TriviumError, match="trained whole cannot be taken out"):
        unmerge_adapter(tmp_path / "merged", whole, tmp_path / "base")
    model = load(scale).model
    with torch.no_grad():
        next(iter(adapter_tensors(model).values()))[0] = 0
    formats.write(tmp_path / "zero", model, family="llama", base=toy)
    with pytest.raises(TriviumError, match="a scale of 0 cannot be taken out"):
        unmerge_adapter(tmp_path / "merged", tmp_path / "zero", tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_started_from_the_base_becomes_what_peft_makes_of_it(toy: Path, tmp_path: Path, start: str):
    """PEFT's own conversion, `path_initial_model_for_weight_conversion`, of the same trained adapter."""
    base = transformers.AutoModelForCausalLM.from_pretrained(toy, attn_implementation="eager")
    other = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=start))
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "initial")
    other.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(1, name)))
        expected = other.eval()(X).logits
    other.save_pretrained(tmp_path / "trained")
    other.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    done = convert_adapter(tmp_path / "trained", tmp_path / "ours", base=toy)
    assert done.report.mean_kl < 1e-6 and done.lost == 0
    close(logits(toy, tmp_path / "ours"), expected, 1e-4)
    close(logits(toy, tmp_path / "theirs"), expected, 1e-4)
    config = formats.read_config(tmp_path / "ours")
    assert config.init_lora_weights is True and config.r == 6
    plain = transformers.AutoModelForCausalLM.from_pretrained(toy, attn_implementation="eager")
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()(X).logits, expected, 1e-4)


def test_a_cut_rank_keeps_the_largest_singular_values(toy: Path, tmp_path: Path):
    adapter = saved(toy, tmp_path / "adapter", LORA)
    with pytest.raises(TriviumError, match="more than 1e-09: take a higher --rank"):
        convert_adapter(adapter, tmp_path / "small", rank=2, tolerance=1e-9)
    assert not (tmp_path / "small").exists()
    done = convert_adapter(adapter, tmp_path / "small", rank=2, tolerance=10.0)
    before, after = (updates(load(path).model, "default") for path in (adapter, tmp_path / "small"))
    shares = []
    for path, (_, update) in before.items():
        left, values, right = torch.linalg.svd(update.delta().detach())
        close(after[path][1].delta(), left[:, :2] * values[:2] @ right[:2], 1e-5)
        assert len(after[path][1].A) == 2
        shares.append(float(values[2:].norm() / values.norm()))
    assert done.lost == pytest.approx(max(shares), rel=1e-3) and done.report.mean_kl > 1e-4
    assert done.parameters < done.parameters_before and done.kind == "lora"
    same = convert_adapter(adapter, tmp_path / "same", rank=6)
    assert same.lost == 0 and same.parameters == same.parameters_before
    close(logits(tmp_path / "same"), logits(adapter))


def test_other_methods_as_lora_and_lora_as_dora(toy: Path, tmp_path: Path):
    """Exact at full rank; and DoRA whose magnitudes are the norms is LoRA."""
    for step in (DoRA(rank=3, targets=("q",)), MoRA(rank=4, targets=("q",)), IA3(targets=("k", "v"), inputs=())):
        adapter = saved(toy, tmp_path / step.kind, step)
        done = convert_adapter(adapter, tmp_path / f"{step.kind}-lora", kind="lora", rank=48)
        assert done.kind == "lora" and done.lost < 1e-5
        close(logits(tmp_path / f"{step.kind}-lora"), logits(adapter), 5e-5)
    lora = saved(toy, tmp_path / "lora", LORA)
    done = convert_adapter(lora, tmp_path / "as-dora", kind="dora")
    assert done.kind == "dora" and adapters(load(tmp_path / "as-dora").model)["default"].kind == "dora"
    close(logits(tmp_path / "as-dora"), logits(lora))
    smaller = convert_adapter(tmp_path / "as-dora", tmp_path / "small-dora", rank=2, tolerance=10.0)
    assert smaller.kind == "dora" and smaller.lost > 0.1
    with pytest.raises(ConfigError, match="has no rank of its own"):
        convert_adapter(tmp_path / "mora", tmp_path / "x", kind="lora")
    with pytest.raises(ConfigError, match="cannot be merged"):
        convert_adapter(saved(toy, tmp_path / "prompt", Prompt(length=3)), tmp_path / "x", kind="lora", rank=3)


def test_another_dtype_is_rounded_once_and_measured(toy: Path, tmp_path: Path):
    adapter = saved(toy, tmp_path / "adapter", LORA)
    done = convert_adapter(adapter, tmp_path / "half", dtype="bf16")
    assert 0 < done.report.mean_kl < 0.02
    whole, half = (load_file(path / formats.WEIGHTS) for path in (adapter, tmp_path / "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[key], tensor.bfloat16()) for key, tensor in whole.items())


def test_onto_a_family_that_fuses_maps(toy: Path, tmp_path: Path):
    """Phi-3 holds q, k and v in one map: updates apart become one of the summed rank, there and back."""
    adapter = saved(toy, tmp_path / "adapter", LORA)
    load(toy).save(tmp_path / "phi3", family="phi3")
    convert_adapter(adapter, tmp_path / "fused", onto=tmp_path / "phi3")
    stored = load_file(tmp_path / "fused" / formats.WEIGHTS)
    assert {key.split(".")[-3] for key in stored} == {"qkv_proj", "down_proj"}
    close(logits(tmp_path / "fused"), logits(adapter))  # the base that it names, by its hash
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "phi3", attn_implementation="eager")
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(plain, tmp_path / "fused").eval()(X).logits, logits(adapter), 1e-4)
    bundle(seed=5).save(tmp_path / "other")
    with pytest.raises(FileError, match="does not hold the weights"):
        convert_adapter(adapter, tmp_path / "x", onto=tmp_path / "other")


def test_what_other_adapters_hold(toy: Path, tmp_path: Path):
    found = inspect_adapter(saved(toy, tmp_path / "ia3", IA3()))
    model = load(tmp_path / "ia3").model
    norms = sorted(float(update.factor.detach().norm()) for _, update in updates(model, "default").values())
    assert found["maps"] == [] and sorted(row["norm"] for row in found["tensors"]) == pytest.approx(norms, rel=1e-5)
    assert {tuple(row["shape"]) for row in found["tensors"]} == {(24, 1), (1, 64)}


def read(path: Path) -> dict[str, np.ndarray]:
    """A GGUF file's tensors as float32, by the format's own package."""
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    "step", [LORA, LORA.replace(rsqrt=True), LoRA(rank=3, start="pissa", targets=("k", "gate"))], ids=["lora", "rs", "pissa"]
)
def test_a_gguf_adapter_is_what_merging_adds(toy: Path, tmp_path: Path, step: LoRA):
    """As llama.cpp adds it: W + alpha / rank B A, in its own names and order of rows, is the merged model's own GGUF file."""
    adapter = saved(toy, tmp_path / "adapter", step)
    done = convert_adapter(adapter, tmp_path / "adapter.gguf")
    merge_adapter(adapter, tmp_path / "merged")
    base, merged = (
        read(export_gguf(path, tmp_path / f"{name}.gguf", dtype="f32")) for name, path in (("base", toy), ("m", tmp_path / "merged"))
    )
    file, lora = gguf.GGUFReader(tmp_path / "adapter.gguf"), read(tmp_path / "adapter.gguf")
    said = {key: file.get_field(key).contents() for key in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.TYPE, gguf.Keys.Adapter.TYPE)}
    assert list(said.values()) == ["llama", gguf.GGUFType.ADAPTER, "lora"] and done.path.endswith(".gguf")
    alpha, moved = file.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents(), 0
    for name, weight in base.items():
        if f"{name}.lora_a" in lora:
            a, b = lora.pop(f"{name}.lora_a"), lora.pop(f"{name}.lora_b")
            weight = weight + alpha / len(a) * (b @ a)
            moved += 1
        np.testing.assert_allclose(merged[name], weight, atol=2e-6)
    assert moved == len(updates(load(adapter).model, "default")) and not lora


def test_what_a_gguf_adapter_cannot_hold(toy: Path, tmp_path: Path):
    dora = saved(toy, tmp_path / "dora", DoRA(rank=3))
    with pytest.raises(ConfigError, match="GGUF holds plain LoRA.*say --kind lora"):
        convert_adapter(dora, tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="GGUF holds plain LoRA"):
        convert_adapter(saved(toy, tmp_path / "whole", LoRA(rank=3, targets=("q",), full=("inp.up",))), tmp_path / "x.gguf")
    convert_adapter(dora, tmp_path / "plain.gguf", kind="lora", rank=48, dtype="fp16")
    assert {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors} == {gguf.GGMLQuantizationType.F16}
    with pytest.raises(FileError, match="is there already"):
        convert_adapter(dora, tmp_path / "plain.gguf", kind="lora", rank=48)
    assert not (tmp_path / "x.gguf").exists()


def test_merging_into_a_packed_base_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wide = bundle()
    spec = llama(dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=96, vocab=wide.spec.vocab, tied=True, context=256)
    export_gguf(replace(wide, model=tiny(spec)), tmp_path / "base.gguf", dtype="q8_0")
    base = load(tmp_path / "base.gguf")
    LoRA(rank=4, targets=("q", "inp.up")).apply(base.model)
    with torch.no_grad():
        for key, tensor in adapter_tensors(base.model).items():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator(0, key)))
    formats.write(tmp_path / "adapter", base.model, family="llama", base_name=str(tmp_path / "base.gguf"))
    found = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="fp32")
    cost = found.repacked
    assert cost is not None and cost.form == "Q8_0" and cost.mean_kl is not None
    packed = merged_and_packed(tmp_path)
    assert abs(found.mean_kl) < 1e-6 < cost.mean_kl < 0.01
    assert cost.bytes_before < 0.3 * cost.bytes_after == 0.3 * sum(p.nbytes for p in load(tmp_path / "merged").model.parameters())
    assert cost.mean_kl == pytest.approx(packed, rel=0.05)
    assert "the base was held as Q8_0" in capsys.readouterr().err
    plain = merge_adapter(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "merged", accept=True)
    assert plain.repacked is None


def test_merging_into_four_bits_says_what_it_costs(toy: Path, tmp_path: Path):
    """Unpacked, it is the adapter beside its 4-bit base; packed again, it is as far away as merging into the codes themselves."""
    base = load(toy)
    Nf4().apply(base.model)
    LoRA(rank=4, targets=("q", "inp.up")).apply(base.model)
    with torch.no_grad():
        for key, tensor in adapter_tensors(base.model).items():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator(0, key)))
    formats.write(tmp_path / "adapter", base.model, family="llama", base=toy)
    found = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    cost, other = found.repacked, merge(copy.deepcopy(base.model), probe=torch.tensor([probe_of(base, None)]))
    assert cost is not None and cost.form == "NF4" and found.mean_kl < 1e-6 < cost.mean_kl
    assert cost.mean_kl == pytest.approx(other.mean_kl, rel=1e-3)
    assert cost.bytes_before < 0.6 * cost.bytes_after
    merged = load(tmp_path / "merged").model
    assert merged.passes == ()
    close(merged(X).logits, base.model(X).logits)
    unmerge_adapter(tmp_path / "merged", tmp_path / "adapter", tmp_path / "base")
    quantized = Nf4().apply(load(toy).model)
    close(load(tmp_path / "base").model(X).logits, quantized(X).logits)


@torch.no_grad()
def merged_and_packed(folder: Path) -> float:
    """How far the merged model's own Q8_0 file is from the adapter beside the base, in nats, on the default text."""
    beside = load(folder / "adapter", dtype="fp32")
    tokens = torch.tensor([probe_of(beside, None)])
    wanted = beside.model(tokens).logits.log_softmax(-1)
    again = load(export_gguf(folder / "merged", folder / "again.gguf", dtype="q8_0"), dtype="fp32").model(tokens).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - again)).sum(-1).mean())
