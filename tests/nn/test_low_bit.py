"""Low-bit linear maps against the papers' formulas and transformers' BitNet layers; packing to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations import bitnet

from tests.nn.test_linear_attention import draw
from tests.tiny import redraw
from trivium.nn.inputs import Inputs
from trivium.nn.linear import Linear
from trivium.nn.low_bit import LowBitLinear, Scheme, add_up, code_activations, pack, rounded, schemes, unpack
from trivium.nn.norms import RMS
from trivium.nn.step import Step

SHAPES = [(8, 6), (5, 12), (13, 7), (3, 4), (64, 32)]
SIGN, TERNARY = schemes.get("sign"), schemes.get("ternary")
STEP = Step.begin(Inputs(embeds=torch.zeros(1, 1, 1)), causal=True)


@pytest.fixture(autouse=True)
def _transformers_uncompiled():
    """transformers compiles its layers; what they compute is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def made(scheme: str, shape: tuple[int, int], *, bits: int | None = 8, norm: bool = False, bias: bool = True) -> LowBitLinear:
    outputs, inputs = shape
    low = LowBitLinear(
        Linear(inputs, outputs, bias=bias), scheme=scheme, activation_bits=bits, norm=RMS(eps=1e-6).build(inputs) if norm else None
    )
    redraw(low)
    return low


def x_for(shape: tuple[int, int]) -> torch.Tensor:
    return (draw(2, 9, shape[1]) * draw(2, 9, 1, seed="size").exp()).requires_grad_()


@pytest.mark.concept("X.26", part="nn/low_bit.py")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sign_weights_against_the_formula(shape):
    """arXiv:2310.11453: y = Sign(W - mean W) x' * |W|_1 / nm, x' each token rounded to its largest magnitude over 127."""
    low, x = made("sign", shape), x_for(shape)
    signs = torch.where(low.weight - low.weight.mean() > 0, 1.0, -1.0)
    beta = low.weight.abs().sum() / low.weight.numel()
    gamma = x.abs().max(-1, keepdim=True).values
    expected = (torch.round(x * 127 / gamma) @ signs.T) * beta * gamma / 127 + low.bias
    torch.testing.assert_close(low(x, STEP), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    used = rounded(low.weight, SIGN.code)
    assert used.unique().numel() == 2 and torch.equal(used.unique(), torch.stack([-used.max(), used.max()]))


@pytest.mark.concept("X.27", part="nn/low_bit.py")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ternary_weights_are_those_of_transformers(shape, norm):
    """Forward and gradients of its AutoBitLinear, trained online."""
    low, x = made("ternary", shape, norm=norm), x_for(shape)
    theirs = bitnet.AutoBitLinear(shape[1], shape[0], online_quant=True, use_rms_norm=norm, rms_norm_eps=1e-6)
    names = {"weight": "weight", "bias": "bias", "norm.weight": "rms_norm.weight"}
    theirs.load_state_dict({names[name]: parameter.detach() for name, parameter in low.named_parameters()})
    y, expected = low(x, STEP), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    weight = draw(*y.shape, seed="w")
    mine = torch.autograd.grad((y * weight).sum(), [x, *low.parameters()])
    other = dict(theirs.named_parameters())
    found = torch.autograd.grad((expected * weight).sum(), [x, *(other[names[name]] for name, _ in low.named_parameters())])
    for a, b in zip(mine, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert set((rounded(low.weight, TERNARY.code) * TERNARY.code(low.weight)[1]).round().unique().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.concept("X.26", "X.27", part="nn/low_bit.py")
@pytest.mark.parametrize("scheme", ["sign", "ternary"])
def test_gradients_go_straight_through(scheme):
    """They are those of a plain map that holds the rounded values."""
    low, x = made(scheme, (5, 12)), x_for((5, 12))
    codes, scale = code_activations(x.detach(), 8)
    a = (codes / scale).requires_grad_()
    w = rounded(low.weight, schemes.get(scheme).code).detach().requires_grad_()
    weight = draw(2, 9, 5, seed="w")
    mine = torch.autograd.grad((low(x, STEP) * weight).sum(), [x, low.weight, low.bias])
    plain = torch.autograd.grad((F.linear(a, w, low.bias) * weight).sum(), [a, w, low.bias])
    for mine_of, plain_of in zip(mine, plain, strict=True):
        assert torch.equal(mine_of, plain_of)


def test_activations_are_whole_numbers_of_eight_bits():
    x = torch.cat([draw(50, 16) * 10, torch.zeros(1, 16), torch.tensor([[1e-9] * 16, [-3e30] + [1.0] * 15])])
    codes, scale = code_activations(x, 8)
    assert torch.equal(codes, codes.round()) and codes.abs().max() <= 127 and (codes / scale).isfinite().all()
    assert ((codes[:50] / scale[:50] - x[:50]).abs() <= 0.5 / scale[:50] + 1e-6).all()
    assert code_activations(x[:50], 4)[0].unique().tolist() == list(range(-7, 8))


def random_codes(scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(0, 2 // scheme.stride + 1, shape, generator=torch.Generator().manual_seed(0)) * scheme.stride - 1


@pytest.mark.concept("X.27", part="nn/low_bit.py")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_bits_are_packed_as_transformers_does(shape):
    codes = random_codes(TERNARY, shape)
    packed = pack(codes, TERNARY)
    assert torch.equal(packed, bitnet.pack_weights(codes.clone())) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, TERNARY, shape[0]), codes.to(torch.int8))
    assert torch.equal(bitnet.unpack_weights(packed, torch.int8)[: shape[0]], codes.to(torch.int8))
    assert packed.numel() == -(-shape[0] // 4) * shape[1]


@pytest.mark.concept("X.26", part="nn/low_bit.py")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_bit_is_one_bit(shape):
    codes = random_codes(SIGN, shape)
    assert codes.unique().tolist() == [-1, 1]
    packed = pack(codes, SIGN)
    assert torch.equal(unpack(packed, SIGN, shape[0]), codes.to(torch.int8))
    assert packed.numel() == -(-shape[0] // 8) * shape[1]
    rows = len(packed)
    for row in range(shape[0]):  # bit k of byte [r, c] is row r of the k-th part
        assert torch.equal(packed[row % rows] >> row // rows & 1, (codes[row] > 0).to(torch.uint8))


@pytest.mark.concept("X.26", "X.27", part="nn/low_bit.py")
@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scheme", ["sign", "ternary"])
def test_packed_maps_compute_the_same(scheme, norm, bits):
    low = made(scheme, (13, 32), norm=norm, bits=bits)
    x = x_for((13, 32)).detach()
    packed = low.packed()
    expected = low(x, STEP)
    torch.testing.assert_close(packed(x, STEP), expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())
    assert not any(p.dim() == 2 for p in packed.parameters())


@pytest.mark.concept("X.27", part="nn/low_bit.py")
def test_packed_maps_are_transformers_bitlinear():
    """From the same bytes: its inference layer reads ours."""
    low, x = made("ternary", (16, 32)), x_for((16, 32)).detach()
    packed = low.packed()
    theirs = bitnet.BitLinear(32, 16, bias=True, dtype=torch.float32)
    theirs.weight.copy_(packed.codes)
    theirs.weight_scale.copy_(packed.scale)
    theirs.bias.copy_(low.bias.detach())
    torch.testing.assert_close(packed(x, STEP), theirs(x), rtol=1e-6, atol=1e-6)


def test_adding_up_is_the_product():
    codes = random_codes(TERNARY, (33, 20))
    x = torch.randint(-128, 128, (7, 20), dtype=torch.int32)
    assert torch.equal(add_up(x, codes), (x.long() @ codes.T).to(torch.int32))
    big = torch.randint(-128, 128, (2**16, 20), dtype=torch.int32)  # some outputs at a time
    assert torch.equal(add_up(big, codes), (big.double() @ codes.T.double()).to(torch.int32))


def test_half_precision_rounds_in_full():
    low, x = made("ternary", (16, 32)), x_for((16, 32)).detach()
    half = low.bfloat16()
    y = half(x.bfloat16(), STEP)
    assert y.dtype == torch.bfloat16
    assert half.packed()(x.bfloat16(), STEP).dtype == torch.bfloat16
    expected = F.linear(x.bfloat16().float(), rounded(half.weight.float(), TERNARY.code), half.bias.float())
    assert (y.float() - expected).abs().max() < 0.1 * expected.std()
