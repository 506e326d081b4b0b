"""The pass that makes linear maps low-bit: what it touches, how it trains, how it is saved, what packing saves."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_count import counter
from tests.tiny import VOCAB, host, tiny, tokens
from trivium.adapt.lora import LoRA
from trivium.adapt.low_bit import LowBit, memory, pack_weights
from trivium.adapt.passes import Pass, apply_passes
from trivium.core.errors import ConfigError, TriviumError
from trivium.core.spec import validate
from trivium.io import directory
from trivium.models import count
from trivium.models.presets import llama
from trivium.models.transformer import TransformerModel, build, initialize
from trivium.nn.attention import Attention
from trivium.nn.inputs import Inputs
from trivium.nn.linear import Linear
from trivium.nn.low_bit import LowBitLinear, PackedLinear
from trivium.nn.norms import RMS

SPEC = llama(dim=24, layers=2, heads=4, kv_heads=2, hidden=40, vocab=VOCAB)
BOTH = pytest.mark.parametrize("weights", ["ternary", "sign"])


def low_bit(weights: str = "ternary", *, norm: bool = False) -> TransformerModel:
    return LowBit(weights=weights, norm=RMS() if norm else None).apply(tiny(SPEC))


def maps(model: TransformerModel, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.concept("X.26", "X.27", part="adapt/low_bit.py")
@BOTH
def test_every_map_but_the_head_and_every_name_stays(weights):
    plain, model = tiny(SPEC), low_bit(weights)
    names = {f"layers.{i}.{name}" for i in (0, 1) for name in (*(f"mixer.inp.{x}" for x in "qkv"), "mixer.out")}
    names |= {f"layers.{i}.ffn.{name}" for i in (0, 1) for name in ("inp.gate", "inp.up", "out")}
    assert maps(model, LowBitLinear) == names and not maps(model, Linear) - {"head.out"}
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    x = tokens(2, 8)
    assert not torch.allclose(plain(x).logits, model(x).logits, atol=0.01)


@pytest.mark.concept("X.26", "X.27", part="adapt/low_bit.py")
@BOTH
def test_the_model_computes_with_rounded_weights(weights):
    """Without rounded activations it is the plain model that holds the rounded values."""
    model, plain = LowBit(weights=weights, activation_bits=None).apply(tiny(SPEC)), tiny(SPEC)
    with torch.no_grad():
        for name in maps(model, LowBitLinear):
            weight = plain.get_submodule(name).weight
            mean = weight.abs().mean()
            signs = torch.where(weight > weight.mean(), 1, -1) if weights == "sign" else (weight / mean).round().clamp(-1, 1)
            weight.copy_(signs * mean)
            assert weight.unique().numel() == (2 if weights == "sign" else 3)
    x = tokens(2, 8)
    torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=0, atol=1e-5)


def test_targets():
    model = LowBit(targets=("q", "ffn.out", "head.out")).apply(tiny(host(Attention.tiny())))
    assert maps(model, LowBitLinear) == {"head.out"} | {f"layers.{i}.{name}" for i in (0, 1) for name in ("mixer.inp.q", "ffn.out")}
    with pytest.raises(ConfigError, match="matches no linear map"):
        LowBit(targets=("nothing",)).apply(tiny(SPEC))
    with pytest.raises(ConfigError, match="no linear map"):
        LowBit().apply(LowBit(targets=("q", "k", "v", "mixer.out", "gate", "up", "ffn.out")).apply(tiny(SPEC)))
    with pytest.raises(ConfigError, match="merge the adapter first"):
        LowBit().apply(LoRA(rank=2).apply(tiny(SPEC)))
    with pytest.raises(ConfigError, match="did you mean 'ternary'"):
        validate(Pass, {"kind": "low_bit", "weights": "ternery"})


@BOTH
@pytest.mark.parametrize("norm", [False, True])
def test_it_replays_and_is_saved(tmp_path, weights, norm):
    model = low_bit(weights, norm=norm)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    replayed = [validate(Pass, json.loads(step.canonical())) for step in model.passes]
    twin = apply_passes(build(SPEC), replayed)
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    directory.write(tmp_path / "x", model)
    back = directory.read(tmp_path / "x")
    assert back.passes == model.passes
    assert torch.equal(back.model(tokens(2, 8)).logits, model(tokens(2, 8)).logits)


def test_initialized_as_without_it():
    plain = initialize(build(SPEC, device="cpu"), seed=1)
    model = initialize(LowBit(norm=RMS()).apply(build(SPEC, device="cpu")), seed=1)
    found = dict(model.named_parameters())
    assert all(torch.equal(parameter, found[name]) for name, parameter in plain.named_parameters())
    assert all((found[name] == 1).all() for name in found if name.endswith(".norm.weight"))
    placed = LowBit(norm=RMS()).apply(tiny(SPEC, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in placed.parameters()} == {torch.bfloat16}


@pytest.mark.concept("X.26", "X.27", part="adapt/low_bit.py")
@BOTH
def test_it_trains_from_scratch(weights):
    """A sequence is learned by heart through rounded weights, and the full ones are what moves."""
    model = initialize(LowBit(weights=weights).apply(build(SPEC, device="cpu")), seed=0).train()
    optimizer, x = torch.optim.Adam(model.parameters(), lr=3e-3), tokens(2, 24)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5 and losses[-1] < 1.0
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@BOTH
def test_products_are_counted(weights):
    model, segments = low_bit(weights, norm=True), torch.zeros(2, 9, dtype=torch.int64)
    with counter() as mode:
        out = model(Inputs(tokens(2, 9), segments=segments)).logits
    forward = mode.get_total_flops()
    with counter() as mode:
        out.square().sum().backward()
    found = count.flops(model, segments, kept=18)
    assert found.forward == forward and found.backward == mode.get_total_flops()


@pytest.mark.concept("X.26", "X.27", part="adapt/low_bit.py")
@pytest.mark.parametrize(("weights", "bits"), [("ternary", 2), ("sign", 1)])
def test_memory(weights, bits):
    """16 bits a weight become 2, or 1, and a scale for each map."""
    big = llama(dim=64, layers=2, heads=4, kv_heads=2, hidden=160, vocab=VOCAB)
    model = LowBit(weights=weights).apply(tiny(big, dtype=torch.bfloat16))
    found = memory(model)
    assert found.maps == 14 and found.weights == sum(model.get_submodule(name).weight.numel() for name in maps(model, LowBitLinear))
    assert found.full == 2 * found.weights and found.packed == found.weights * bits // 8 + 14 * 4
    assert found.bits == pytest.approx(bits, rel=0.01) and found.ratio == pytest.approx(16 / bits, rel=0.01)


@pytest.mark.concept("X.27", part="adapt/low_bit.py")
@BOTH
def test_packed_it_says_the_same(weights):
    """Logits of the packed model, whole and decoded with a cache."""
    model, x = low_bit(weights, norm=True), tokens(2, 10)
    with torch.inference_mode():
        expected = model(x).logits
        packed = pack_weights(model)
        assert maps(packed, PackedLinear) and not maps(packed, LowBitLinear)
        torch.testing.assert_close(packed(x).logits, expected, rtol=0, atol=1e-4 * expected.std().item())
        cache = packed.cache(rows=2, capacity=10)
        pieces = [packed(Inputs(piece, cache=cache)).logits for piece in x.split((4, 1, 5), 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-3 * expected.std().item())
    for nothing in (memory, pack_weights):
        with pytest.raises(TriviumError, match="apply the pass"):
            nothing(tiny(SPEC))
