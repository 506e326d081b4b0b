"""Layer norm, plain feed-forward, GELU, ReLU and absolute positions: against torch, transformers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from tests.nn.test_parts import apart_with_gradients, draw, step_for
from tests.tiny import VOCAB, host, redraw, segments_of, tiny, tokens
from trivium.core.errors import ConfigError, TriviumError
from trivium.models.presets import presets
from trivium.models.transformer import build
from trivium.nn.activations import GELU, ReLU, SiLU
from trivium.nn.embeddings import Tokens
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.monitors import dead_units
from trivium.nn.norms import Layer
from trivium.nn.positions_absolute import Learned, Sinusoidal
from trivium.nn.step import Step


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, in float64."""
    x = x.double()
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


@pytest.mark.concept("T01.07", "T17.02", part="nn/norms.py")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layer_norm_is_its_definition_and_torchs(eps, bias):
    norm = redraw(Layer(eps=eps, bias=bias).build(16))
    assert sum(p.numel() for p in norm.parameters()) == (32 if bias else 16)
    shift = norm.bias if bias else torch.zeros(16)
    assert apart_with_gradients(norm, lambda x: by_hand(x, norm.weight, shift, eps).float(), draw(3, 5, 16)) <= 2e-6
    norm.zero_grad()
    assert apart_with_gradients(norm, lambda x: F.layer_norm(x, (16,), norm.weight.detach(), shift.detach(), eps), draw(3, 5, 16)) <= 1e-6
    theirs = nn.LayerNorm(16, eps=eps, bias=bias)
    theirs.load_state_dict(norm.state_dict())
    for module in (norm, theirs):
        module.zero_grad()
        (module(draw(3, 5, 16)) * draw(3, 5, 16, seed=9)).sum().backward()
    for a, b in zip(norm.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.autograd.gradcheck(redraw(Layer(eps=eps, bias=bias).build(4).double()), draw(2, 3, 4).double().requires_grad_())


@pytest.mark.concept("T01.07", "T17.02", part="nn/norms.py")
@pytest.mark.parametrize(
    ("dtype", "offset", "atol"), [(torch.float16, 500.0, 2e-3), (torch.bfloat16, 30.0, 2e-2), (torch.float32, 1e4, 5e-4)]
)
def test_layer_norm_holds_far_from_zero(dtype, offset, atol):
    """Mean and variance that a sum of squares in the dtype would lose; the bounds are the rounding of what goes in and out."""
    norm = redraw(Layer(eps=1e-5).build(64)).to(dtype)
    x = (4 * draw(9, 64) + offset).to(dtype)
    torch.testing.assert_close(norm(x).double(), by_hand(x, norm.weight, norm.bias, 1e-5), rtol=0, atol=atol)
    still = torch.full((1, 64), 0.5, dtype=dtype)
    assert torch.equal(norm(still), norm.bias[None]), "no variance: the bias alone, and no division by zero"


@pytest.mark.concept("T01.07", "T17.02", part="nn/norms.py")
@settings(max_examples=20)
@given(st.integers(0, 6), st.integers(1, 7))
def test_layer_norm_sees_one_token_alone(row, size):
    norm, x = redraw(Layer().build(24)), draw(7, 5, 24)
    assert torch.equal(norm(x)[row], norm(x[row : row + 1])[0])
    assert torch.equal(norm(x[:size]), norm(x)[:size])


@pytest.mark.concept("T01.05", part="nn/feedforward.py")
@pytest.mark.parametrize("bias", [False, True])
def test_plain_mlp_equals_torchs(bias):
    ours = redraw(MLP(hidden=48, activation=ReLU(), gated=False, bias=bias).build(12))
    theirs = nn.Sequential(nn.Linear(12, 48, bias=bias), nn.ReLU(), nn.Linear(48, 12, bias=bias))
    theirs[0].load_state_dict(ours.inp.up.state_dict())
    theirs[2].load_state_dict(ours.out.state_dict())
    assert apart_with_gradients(lambda x: ours(x, step_for(5, 2)), theirs, draw(2, 5, 12)) <= 2e-6
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5)
    if not bias:
        assert sum(p.numel() for p in ours.parameters()) == 8 * 12 * 12


@pytest.mark.concept("T01.05", part="nn/feedforward.py")
@pytest.mark.parametrize(("name", "approximate"), [("gelu_new", "tanh"), ("gelu", "none")])
def test_plain_mlp_equals_gpt2s(name, approximate):
    ours = redraw(MLP(hidden=20, activation=GELU(approximate=approximate), gated=False, bias=True).build(12))
    theirs = GPT2MLP(20, GPT2Config(n_embd=12, n_head=2, activation_function=name)).eval()
    with torch.no_grad():
        for mine, other in ((ours.inp.up, theirs.c_fc), (ours.out, theirs.c_proj)):
            other.weight.copy_(mine.weight.T)
            other.bias.copy_(mine.bias)
    assert apart_with_gradients(lambda x: ours(x, step_for(5, 2)), theirs, draw(2, 5, 12)) <= 2e-6


@pytest.mark.concept("T01.05", part="nn/feedforward.py")
def test_an_mlp_works_on_each_position_alone():
    for mlp in (MLP(hidden=48, activation=ReLU(), gated=False), MLP(hidden=48)):
        ours, x, order = redraw(mlp.build(12)), draw(2, 5, 12), torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(ours(x, step_for(5, 2))[:, order], ours(x[:, order], step_for(5, 2)))


@pytest.mark.concept("T01.05", part="nn/feedforward.py")
def test_mlps_are_two_thirds_of_the_parameters_of_gpt2s_layers():
    layer = build(presets.get("gpt2")()).layers[0]
    share = sum(p.numel() for p in layer.ffn.parameters()) / sum(p.numel() for p in layer.parameters())
    assert abs(share - 2 / 3) < 0.01


@pytest.mark.concept("T16.02", part="nn/activations.py")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_equals_torchs(approximate):
    x = torch.linspace(-9, 9, 601)
    assert apart_with_gradients(GELU(approximate=approximate).build(), lambda y: F.gelu(y, approximate=approximate), x) <= 1e-6


@pytest.mark.concept("T16.02", part="nn/activations.py")
def test_gelu_is_x_times_phi_and_its_approximations_are_as_far_off_as_they_say():
    x = torch.linspace(-9, 9, 601, dtype=torch.float64)
    phi = 0.5 * (1 + torch.tensor([math.erf(v / math.sqrt(2)) for v in x.tolist()], dtype=torch.float64))
    for approximate, low, high in (("none", 0.0, 1e-12), ("tanh", 1e-5, 5e-4), ("sigmoid", 1e-3, 2.1e-2)):
        assert low <= (GELU(approximate=approximate).build()(x) - x * phi).abs().max() <= high
    torch.testing.assert_close(GELU(approximate="sigmoid").build()(x), x * torch.sigmoid(1.702 * x))
    for approximate in ("none", "tanh", "sigmoid"):
        assert torch.autograd.gradcheck(GELU(approximate=approximate).build(), draw(7).double().requires_grad_())


@pytest.mark.concept("T16.02", part="nn/activations.py")
def test_gelu_is_the_mean_of_a_dropout_that_looks_at_its_input():
    x = torch.linspace(-3, 3, 13)
    kept = torch.bernoulli(torch.special.ndtr(x).expand(200_000, -1), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((x * kept).mean(0), GELU().build()(x), rtol=0, atol=1e-2)


@pytest.mark.concept("T16.04", part="nn/activations.py")
def test_relu_equals_torchs():
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0, math.inf], requires_grad=True)
    out = ReLU().build()(x)
    assert torch.equal(out, F.relu(x)) and torch.equal(out, torch.tensor([0.0, 0.0, 0.0, 1e-30, 3.0, math.inf]))
    out[:5].sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 0]


@pytest.mark.concept("T16.04", part="nn/monitors.py")
def test_dead_units_are_those_that_no_token_wakes():
    spec = host(ReLU())
    block = spec.blocks["a"]
    model = tiny(spec.replace(blocks={"a": block.replace(ffn=MLP(hidden=40, activation=ReLU(), gated=False, bias=True))}))
    with torch.no_grad():
        model.layers[0].ffn.inp.up.bias[:10] = -1e4
        model.layers[1].ffn.inp.up.weight[:3] = 0.0
        model.layers[1].ffn.inp.up.bias[:3] = 0.0
        model.layers[1].ffn.inp.up.bias[3:] = 0.1
    plain = model(tokens(2, 9)).logits
    with dead_units(model) as seen:
        assert torch.equal(model(tokens(2, 9)).logits, plain)
        once = seen.fractions()
        for seed in range(1, 30):
            model(tokens(8, 20, seed=seed))
    assert seen.fractions() == pytest.approx({"layers.0.ffn": 10 / 40, "layers.1.ffn": 3 / 40})
    assert all(once[name] >= seen.fractions()[name] for name in once) and once != seen.fractions()
    model(tokens(2, 3))
    with dead_units(model) as after:
        pass
    assert after.fractions() == {} and not model.layers[0].ffn.activation._forward_hooks
    with dead_units(tiny(host(SiLU()))) as gated:
        pass
    assert gated.fractions() == {}


@pytest.mark.concept("T16.04", part="nn/monitors.py")
def test_a_high_learning_rate_kills_relus_and_no_gelus():
    dead = {}
    for name, activation in (("relu", ReLU()), ("gelu", GELU())):
        mlp = redraw(MLP(hidden=64, activation=activation, gated=False, bias=True).build(8), std=0.5)
        x, target = draw(64, 8), 5 * draw(64, 8, seed=1)
        optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
        for _ in range(30):
            optimizer.zero_grad()
            F.mse_loss(mlp(x, step_for(1)), target).backward()
            optimizer.step()
        with dead_units(mlp) as seen:
            mlp(x, step_for(1))
        dead[name] = seen.fractions()[""]
    assert dead["relu"] > 0.05 and dead["gelu"] == 0.0


def closed_form(position: int, dim: int) -> list[float]:
    return [(math.cos if c % 2 else math.sin)(position / 10000 ** (c // 2 * 2 / dim)) for c in range(dim)]


def table(spec: Sinusoidal, dim: int, positions: torch.Tensor) -> torch.Tensor:
    step = Step.begin(Inputs(torch.zeros_like(positions), positions=positions), causal=True)
    return spec.build(dim)(step, torch.float32)


@pytest.mark.concept("T02.03", part="nn/positions_absolute.py")
@pytest.mark.concept("T01.08", part="nn/positions_absolute.py")
def test_sinusoidal_positions_are_the_closed_form():
    positions = torch.tensor([[0, 1, 2, 77], [1000, 9999, 54_321, 1_000_003]])
    out = table(Sinusoidal(), 32, positions)
    expected = torch.tensor([[closed_form(p, 32) for p in row] for row in positions.tolist()], dtype=torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    theirs = MarianSinusoidalPositionalEmbedding(100, 32)
    theirs.weight.data = theirs.create_weight()
    halves = theirs(torch.Size([1, 100]))  # their layout: all sines, then all cosines
    ours = table(Sinusoidal(), 32, torch.arange(100)[None])[0]
    torch.testing.assert_close(torch.cat([ours[:, ::2], ours[:, 1::2]], 1), halves, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="must be even"):
        Sinusoidal().build(33)


@pytest.mark.concept("T02.03", part="nn/positions_absolute.py")
def test_sinusoidal_positions_shift_by_a_linear_map_and_never_repeat():
    everything = table(Sinusoidal(), 64, torch.arange(10_000)[None])[0]
    for shift in (1, 13, 500):
        before, after = everything[:-shift].double(), everything[shift:].double()
        solution = torch.linalg.lstsq(before, after).solution
        assert (before @ solution - after).abs().max() < 1e-5
    assert len(everything.unique(dim=0)) == 10_000


@pytest.mark.concept("T02.02", part="nn/positions_absolute.py")
def test_learned_positions_follow_documents_padding_and_cache():
    model = tiny(host(Learned(size=20)))
    embed, x = model.embed, tokens(2, 9)
    segments = segments_of([[4, 3, -2], [-1, 8]], 9)
    step = Step.begin(Inputs(x, segments=segments), causal=True)
    rows = [[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7]]
    expected = F.embedding(x, embed.weight) + embed.positions.weight[torch.tensor(rows)]
    real = segments >= 0
    assert torch.equal(embed(x, step)[real], expected[real])
    given_ = torch.tensor([[7, 3, 19, 0, 1, 2, 2, 2, 5]]).expand(2, -1)
    at = embed(x, Step.begin(Inputs(x, positions=given_), causal=True))
    assert torch.equal(at, F.embedding(x, embed.weight) + embed.positions.weight[given_])


@pytest.mark.concept("T02.02", part="nn/positions_absolute.py")
def test_a_position_beyond_the_table_is_refused():
    model, x = tiny(host(Learned(size=12))), tokens(2, 12)
    model(x)
    with pytest.raises(TriviumError, match="position 12 was asked for, but this model has learned 12 positions"):
        model(tokens(1, 13))
    cache = model.cache(rows=2, capacity=20)
    model(Inputs(x, cache=cache))
    with pytest.raises(TriviumError, match="position 12"):
        model(Inputs(x[:, :1], cache=cache))
    assert cache.lengths == [12, 12]
    packed = tokens(1, 30)
    model(Inputs(packed, segments=segments_of([[12, 12, 6]], 30)))  # longer than the table, but no document is
    with pytest.raises(TriviumError, match="position 12"):
        model(Inputs(packed, segments=segments_of([[13, 12, 5]], 30)))
    for bad in (12, -1):
        with pytest.raises(TriviumError, match=f"position {bad} was"):
            model(Inputs(x, positions=torch.full((2, 12), bad)))


def bidirectional(positions: dict | None) -> torch.nn.Module:
    spec = host(Tokens(positions=positions), causal=False)
    block = spec.blocks["a"]
    return tiny(spec.replace(blocks={"a": block.replace(mixer=block.mixer.replace(position=None))}))


@pytest.mark.concept("T01.08", part="nn/positions_absolute.py")
@settings(max_examples=12)
@given(st.permutations(range(9)))
def test_without_positions_a_stack_does_not_see_order(order):
    x, order = tokens(2, 9), torch.tensor(order)
    plain = bidirectional(None)
    torch.testing.assert_close(plain(x[:, order]).hidden, plain(x).hidden[:, order], rtol=0, atol=1e-5)
    if not torch.equal(x[:, order], x):
        for positions in ({"kind": "sinusoidal"}, {"kind": "learned", "size": 20}):
            model = bidirectional(positions)
            assert (model(x[:, order]).hidden - model(x).hidden[:, order]).abs().max() > 1e-2


@pytest.mark.concept("T01.08", part="nn/positions_absolute.py")
def test_dog_bites_man():
    dog, bites, man = 7, 23, 41
    assert max(dog, bites, man) < VOCAB
    news = torch.tensor([[dog, bites, man], [man, bites, dog]])
    for positions in (None, {"kind": "sinusoidal"}, {"kind": "learned", "size": 4}):
        a, b = bidirectional(positions)(news).logits.mean(1)
        assert (a - b).abs().max() < 1e-5 if positions is None else (a - b).abs().max() > 0.01
