"""The pass that quantizes a base to four bits: what it takes, what goes on top, how it is saved, what merging costs."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from tests.models.test_count import counter
from tests.nn import bitsandbytes_golden as golden
from tests.parity import hf
from tests.tiny import VOCAB, tiny, tokens
from trivium.adapt.adapter import Adapter, adapter_tensors, initialize_adapter, merge, remove_adapter
from trivium.adapt.freeze import Freeze
from trivium.adapt.lora import LoRA
from trivium.adapt.low_bit import LowBit, pack_weights
from trivium.adapt.nf4 import Nf4, dequantize, memory
from trivium.adapt.passes import Pass, apply_passes
from trivium.adapt.resize import resize
from trivium.core.errors import ConfigError, TriviumError
from trivium.core.seed import generator
from trivium.core.spec import validate
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory, peft
from trivium.models import count
from trivium.models.presets import llama
from trivium.models.transformer import TransformerModel, build
from trivium.nn.inputs import Inputs
from trivium.nn.linear import Linear
from trivium.nn.nf4 import Nf4Linear

SPEC = llama(dim=24, layers=2, heads=4, kv_heads=2, hidden=40, vocab=VOCAB, context=64)
X = tokens(2, 9)
every_adapter = pytest.mark.parametrize("kind", list(Adapter.registry))


def quantized(step: Nf4 = Nf4(), dtype: torch.dtype = torch.float32) -> TransformerModel:  # noqa: B008 - frozen
    return step.apply(tiny(SPEC, dtype=dtype))


def adapted(model: TransformerModel, step: Adapter) -> TransformerModel:
    step.apply(model)
    initialize_adapter(model, step.name, seed=0)
    with torch.no_grad():
        for key, parameter in adapter_tensors(model, step.name).items():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(1, key)))
    return model.eval()


def maps(model: torch.nn.Module, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.concept("T06.04", part="adapt/nf4.py")
def test_every_map_but_the_head_and_nothing_is_trained():
    model = quantized()
    assert len(maps(model, Nf4Linear)) == 14 and maps(model, Linear) == {"head.out"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plain = tiny(SPEC)
    for name in maps(model, Nf4Linear):
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    close(model(X).logits, plain(X).logits)
    assert (model(X).logits - tiny(SPEC)(X).logits).abs().max() > 0.01
    some = quantized(Nf4(targets=("q", "head.out"), keep=("layers.1.mixer.inp.q",)))
    assert maps(some, Nf4Linear) == {"layers.0.mixer.inp.q", "head.out"}


@pytest.mark.concept("T06.04", part="adapt/nf4.py")
def test_bits_for_each_weight_by_the_bytes_that_are_held():
    """4 + 8 / 64 + 32 / (64 * 256) with double quantization, 4.127, beside one mean for each map; 4.5 without."""
    spec = llama(dim=512, layers=1, heads=8, kv_heads=8, hidden=1024, vocab=16)
    for step, bits in ((Nf4(), 4 + 8 / 64 + 32 / (64 * 256)), (Nf4(double=False), 4.5)):
        model = step.apply(tiny(spec, dtype=torch.bfloat16))
        found = memory(model)
        held = sum(p.nbytes for name, p in model.named_parameters() if name.rsplit(".", 1)[1] in ("codes", "scales", "outer"))
        assert found.packed == held and found.weights == 4 * 512**2 + 3 * 512 * 1024
        means = 32 * 7 / found.weights if step.double else 0.0
        assert found.bits == pytest.approx(bits + means, abs=1e-9) and found.bits == pytest.approx(bits, abs=2e-4)
        assert found.full == 2 * found.weights and count.parameters(model).total == count.parameters(build(spec)).total
    assert round(4 + 8 / 64 + 32 / (64 * 256), 3) == 4.127


@pytest.mark.concept("T06.04", part="nn/nf4.py")
def test_logits_and_gradients_of_peft_on_bitsandbytes(tmp_path):
    """LoRA on a 4-bit Llama: PEFT's own on bitsandbytes' Linear4bit, and what PEFT saved on ours."""
    found = json.loads(golden.FIXTURE.read_text())
    base = hf.save(hf.tiny("llama", **golden.LLAMA), tmp_path / "base")
    theirs = golden.adapted(hf.tiny("llama", **golden.LLAMA))
    theirs.save_pretrained(tmp_path / "adapter")
    model = Nf4().apply(directory.read(base).model)
    peft.read(tmp_path / "adapter", model, family="llama")
    logits = model(golden.X).logits
    wanted = golden.tensor(found["logits"], torch.float32).view(logits.shape)
    close(logits, wanted, 1e-4 * wanted.std().item())
    unquantized = directory.read(base).model
    peft.read(tmp_path / "adapter", unquantized, family="llama")
    assert (unquantized(golden.X).logits - wanted).abs().max() > 0.05 * wanted.std()
    for parameter in adapter_tensors(model).values():
        parameter.requires_grad_(True)
    model(golden.X).logits.square().sum().backward()
    update = model.get_submodule("layers.0.mixer.inp.v.lora.default")
    for side, parameter in (("lora_A", update.A), ("lora_B", update.B)):
        (key,) = [key for key in found["gradients"] if side in key]
        wanted = golden.tensor(found["gradients"][key], torch.float32).view(parameter.shape)
        close(parameter.grad, wanted, 1e-4 * wanted.abs().max().item())


@pytest.mark.concept("T06.04", part="adapt/nf4.py")
@every_adapter
def test_any_adapter_goes_on_top(kind):
    """Each computes, and learns, what it would on a full base of the same values; cached and row by row too."""
    step = Adapter.registry.get(kind).tiny()
    model, plain = adapted(quantized(), step), adapted(dequantize(quantized()), step)
    close(model(X).logits, plain(X).logits, 2e-5)
    for each in (model, plain):
        each(X).logits.square().mean().backward()
    mine, other = adapter_tensors(model), adapter_tensors(plain)
    for key, parameter in mine.items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other[key].grad, rtol=1e-4, atol=1e-5)
    mixed = model(Inputs(X, adapters=torch.tensor([0, -1]))).logits
    close(mixed[0], model(X).logits[0], 2e-5)
    close(mixed[1], quantized()(X).logits[1], 2e-5)
    rows, sampling = [[5, 6, 7], [8, 9, 10, 11]], Sampling(temperature=0, max_tokens=4)
    assert [list(done.ids) for done in generate(model, rows, sampling)] == [list(ids) for ids in generate_naive(model, rows, sampling)]
    remove_adapter(model)
    assert [step.kind for step in model.passes] == ["nf4"] and torch.equal(model(X).logits, quantized()(X).logits)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_replays_and_is_saved_in_four_bits(tmp_path, double, dtype):
    """Without the full weights at any time: the frame is built and quantized on the meta device, and codes fill it."""
    model = adapted(quantized(Nf4(block=32, double=double), dtype), LoRA(rank=2))
    replayed = [validate(Pass, json.loads(step.canonical())) for step in model.passes]
    twin = apply_passes(build(SPEC, dtype=dtype), replayed)
    assert {p.device.type for p in twin.parameters()} == {"meta"} and not list(twin.buffers())
    assert {k: (p.shape, p.dtype) for k, p in twin.named_parameters()} == {k: (p.shape, p.dtype) for k, p in model.named_parameters()}
    directory.write(tmp_path / "x", model)
    back = directory.read(tmp_path / "x").model
    assert back.passes == model.passes and memory(back) == memory(model)
    assert torch.equal(back(X).logits, model(X).logits)
    other = directory.read(tmp_path / "x", dtype="fp32").model
    assert other.get_submodule("layers.0.ffn.out").weight.dtype is torch.float32
    assert (tmp_path / "x" / "model.safetensors").stat().st_size < sum(p.nbytes for p in tiny(SPEC, dtype=dtype).parameters()) + 8192


def test_what_has_no_full_weights_is_not_written_as_if_it_had(tmp_path):
    with pytest.raises(TriviumError, match="cannot hold passes"):
        directory.write(tmp_path / "x", quantized(), family="llama")
    model = quantized()
    model.passes = ()
    with pytest.raises(TriviumError, match="in four bits, for which model_type 'llama' has no place"):
        directory.write(tmp_path / "x", model, family="llama")
    with pytest.raises(TriviumError, match="was packed for inference"):
        directory.write(tmp_path / "x", pack_weights(LowBit().apply(tiny(SPEC))))
    assert not (tmp_path / "x").exists()


def test_products_are_counted():
    model, segments = adapted(quantized(), LoRA(rank=2)), torch.zeros(2, 9, dtype=torch.int64)
    with counter() as mode:
        out = model(Inputs(X, segments=segments)).logits
    forward = mode.get_total_flops()
    with counter() as mode:
        out.square().sum().backward()
    found = count.flops(model, segments, kept=18)
    assert found.forward == forward and found.backward == mode.get_total_flops()


@pytest.mark.concept("T06.04", part="adapt/nf4.py")
def test_what_merging_costs():
    """Into full weights it costs their rounding; into four bits again, most of an update that is smaller than the codes' distance."""
    model = adapted(quantized(dtype=torch.bfloat16), LoRA(rank=2))
    full, four_bits = merge(dequantize(copy.deepcopy(model)), probe=X), merge(model, probe=X)
    assert full.maps == four_bits.maps == 14 and maps(model, Nf4Linear) and [step.kind for step in model.passes] == ["nf4"]
    assert 0 <= full.mean_kl < 0.1 * four_bits.mean_kl
    exact = adapted(quantized(), LoRA(rank=2))
    wanted = exact(X).logits
    merged = dequantize(exact)
    assert merge(merged, probe=X).relative < 1e-5 and merged.passes == ()
    close(merged(X).logits, wanted, 5e-5)
    for nothing in (memory, dequantize):
        with pytest.raises(TriviumError, match="no 4-bit weights"):
            nothing(tiny(SPEC))


def test_layers_that_share_their_weights_share_their_codes():
    spec = SPEC.replace(shared=tuple(set(SPEC.layers)))
    model = Nf4().apply(tiny(spec))
    for name in maps(model.layers[0], Nf4Linear):
        assert model.layers[0].get_submodule(name).codes is model.layers[1].get_submodule(name).codes
    plain = dequantize(copy.deepcopy(model))
    close(plain(X).logits, model(X).logits)
    assert plain.get_parameter("layers.1.ffn.out.weight") is plain.get_parameter("layers.0.ffn.out.weight")
    assert Nf4().apply(build(spec)).layers[0].ffn.out.codes.is_meta


def test_bad_input():
    for step, wrong in (
        (Nf4(targets=("nothing",)), "matches no linear map"),
        (Nf4(keep=("nothing",)), "matches none of the targets"),
        (Nf4(targets=("q",), keep=("q",)), "leaves nothing to quantize"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            step.apply(tiny(SPEC))
    with pytest.raises(ConfigError, match="quantize the base first"):
        Nf4().apply(LoRA(rank=2).apply(tiny(SPEC)))
    with pytest.raises(ConfigError, match="quantized already"):
        Nf4().apply(quantized())
    with pytest.raises(ConfigError, match="tied to the embedding"):
        Nf4(targets=("head.out",)).apply(tiny(SPEC.replace(head=SPEC.head.replace(tied=True))))
    with pytest.raises(ConfigError, match="nothing of it can be trained"):
        LowBit().apply(quantized())
    with pytest.raises(ConfigError, match="cannot be trained"):
        Freeze(last=1).apply(quantized())
    assert Freeze(last=0).apply(quantized()).head.out.weight.requires_grad
    with pytest.raises(ConfigError, match="adapted or quantized"):
        resize(quantized(Nf4(targets=("head.out",))), [[1]], used=VOCAB)
    with pytest.raises(ConfigError, match="block"):
        validate(Pass, {"kind": "nf4", "block": 48})
    bad = tiny(SPEC)
    with torch.no_grad():
        bad.layers[1].ffn.out.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"layers\.1\.ffn\.out holds weights that are not finite"):
        Nf4().apply(bad)
