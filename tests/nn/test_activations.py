"""Gated forms against transformers' own, activations against torch's and their formulas, norms without parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GemmaConfig, GptOssConfig, LlamaConfig, T5Config
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from tests.nn.test_parts import apart_with_gradients, draw, step_for
from tests.tiny import redraw
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.nn.activations import GELU, Activation, ReLU, SiLU, SquaredReLU, Swish
from trivium.nn.feedforward import MLP, FeedForward
from trivium.nn.norms import RMS, Layer, Norm

DIM, HIDDEN = 12, 20
SIZES = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_attention_heads": 2}
NAMES = {
    "gate_proj": "inp.gate", "up_proj": "inp.up", "down_proj": "out",
    "wi_0": "inp.gate", "wi_1": "inp.up", "wo": "out",
}  # fmt: skip


def t5(act: str) -> nn.Module:
    return T5DenseGatedActDense(T5Config(d_model=DIM, d_ff=HIDDEN, dense_act_fn=act, is_gated_act=True, dropout_rate=0.0))


GATED = {
    "geglu-t5": (GELU(approximate="tanh"), lambda: t5("gelu_new")),
    "geglu-exact-t5": (GELU(), lambda: t5("gelu")),
    "geglu-gemma": (GELU(approximate="tanh"), lambda: GemmaMLP(GemmaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"))),
    "reglu-t5": (ReLU(), lambda: t5("relu")),
    "swiglu-llama": (SiLU(), lambda: LlamaMLP(LlamaConfig(**SIZES))),
    "quick-llama": (GELU(approximate="sigmoid"), lambda: LlamaMLP(LlamaConfig(**SIZES, hidden_act="quick_gelu"))),
    "relu2-llama": (SquaredReLU(), lambda: LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu2"))),
}


@pytest.mark.concept("T16.03", "T16.01", part="nn/feedforward.py")
@pytest.mark.parametrize("name", GATED)
def test_gated_forms_equal_transformers(name):
    activation, make = GATED[name]
    ours, theirs = redraw(MLP(hidden=HIDDEN, activation=activation).build(DIM)), make()
    for key, module in theirs.named_children():
        if key in NAMES:
            module.load_state_dict(ours.get_submodule(NAMES[key]).state_dict())
    assert apart_with_gradients(lambda x: ours(x, step_for(5, 2)), theirs, draw(2, 5, DIM)) <= 1e-6
    for key, module in theirs.named_children():
        if key in NAMES:
            torch.testing.assert_close(ours.get_submodule(NAMES[key]).weight.grad, module.weight.grad, rtol=0, atol=5e-6)


@pytest.mark.concept("T16.03", part="nn/feedforward.py")
def test_geglu_has_half_again_as_many_parameters_and_as_many_at_two_thirds():
    def count(hidden: int, *, gated: bool) -> int:
        return sum(p.numel() for p in MLP(hidden=hidden, activation=GELU(), gated=gated).build(24).parameters())

    assert count(96, gated=True) == 3 * 24 * 96 == 1.5 * count(96, gated=False)
    assert count(64, gated=True) == count(96, gated=False)


def test_activations_equal_transformers_by_name():
    x = torch.linspace(-6, 6, 401)
    for name, activation in (("relu2", SquaredReLU()), ("quick_gelu", GELU(approximate="sigmoid")), ("relu", ReLU()), ("silu", SiLU())):
        assert apart_with_gradients(activation.build(), ACT2FN[name], x) <= 1e-6


@pytest.mark.concept("X.25", part="nn/activations.py")
@pytest.mark.parametrize("trained", [True, False])
def test_swish(trained):
    """F.silu at 1, half the input at 0, ReLU far out; a beta that is trained has the formula's gradient."""
    x = torch.linspace(-9, 9, 601)

    def swish(beta: float) -> nn.Module:
        built = Swish(beta=beta, trained=trained).build()
        if trained:
            built.reset()
        assert len(list(built.parameters())) == trained
        return built

    assert apart_with_gradients(swish(1.0), F.silu, x) <= 1e-6
    assert torch.equal(swish(0.0)(x), x / 2)
    torch.testing.assert_close(swish(1e4)(x), F.relu(x), rtol=0, atol=1e-6)
    if trained:
        built = swish(1.3).double()
        y = draw(9).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda y, beta: torch.func.functional_call(built, {"beta": beta}, (y,)), (y, built.beta))


@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (0.9, 0.3)])
def test_the_clamped_form_is_gpt_oss(alpha, limit):
    spec = MLP(hidden=HIDDEN, activation=Swish(beta=alpha, trained=False), bias=True, limit=limit, shift=1.0)
    ours = redraw(spec.build(DIM), std=0.6)
    theirs = GptOssExperts(GptOssConfig(**SIZES, num_local_experts=1, swiglu_alpha=alpha, swiglu_limit=limit))
    x = draw(7, DIM)
    gate, up = ours.inp(x, step_for(1))
    assert limit > 1 or ((gate > limit).any() and (up < -limit).any() and (up > limit).any())
    expected = theirs._apply_gate(torch.stack([gate, up], -1).flatten(-2))
    torch.testing.assert_close(ours(x, step_for(1)), F.linear(expected, ours.out.weight, ours.out.bias), rtol=0, atol=1e-6)


def test_a_limit_alone_clamps_before_silu():
    """DeepSeek-V4's form."""
    ours = redraw(MLP(hidden=HIDDEN, limit=0.2).build(DIM), std=0.6)
    assert isinstance(ours, FeedForward)
    x = draw(2, 5, DIM)
    gate, up = F.linear(x, ours.inp.gate.weight).clamp(max=0.2), F.linear(x, ours.inp.up.weight).clamp(-0.2, 0.2)
    torch.testing.assert_close(ours(x, step_for(5, 2)), F.linear(F.silu(gate) * up, ours.out.weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["relu2", "gelu", "silu", "relu", "swish"])
def test_activations_have_the_gradient_of_what_they_compute(kind):
    built = redraw(validate(Activation, kind).build()).double()
    assert torch.autograd.gradcheck(built, draw(11).double().requires_grad_())


@pytest.mark.concept("T17.01", part="nn/norms.py")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_without_a_weight_is_the_norm_with_ones(dtype):
    """Against transformers' and torch's with weights of one, also in the order of rounding."""
    norm = RMS(eps=1e-2, affine=False).build(16)
    assert not list(norm.parameters())
    norm.reset()
    x = draw(3, 5, 16).to(dtype)
    assert torch.equal(norm(x), LlamaRMSNorm(16, 1e-2).to(dtype)(x)) or dtype is torch.float32
    assert apart_with_gradients(norm, LlamaRMSNorm(16, 1e-2).to(dtype), x) <= (1e-6 if dtype is torch.float32 else 0.02)
    assert apart_with_gradients(norm.float(), nn.RMSNorm(16, eps=1e-2, elementwise_affine=False), x.float()) <= 1e-6


@pytest.mark.concept("T17.02", part="nn/norms.py")
def test_layer_norm_without_parameters():
    norm = Layer(eps=1e-2, affine=False).build(16)
    assert not list(norm.parameters())
    norm.reset()
    assert apart_with_gradients(norm, lambda x: F.layer_norm(x, (16,), eps=1e-2), draw(3, 5, 16)) <= 1e-6


@pytest.mark.parametrize(
    ("root", "spec", "reason"),
    [
        (Norm, {"kind": "rms", "offset": 1.0, "affine": False}, "offset is added to a weight"),
        (Activation, {"kind": "swish", "trained": 3}, "trained"),
        (Activation, "relu3", "relu2"),
    ],
)
def test_specs_that_make_no_sense(root, spec, reason):
    with pytest.raises(ConfigError, match=reason):
        validate(root, spec)
