"""Norms, activations, feed-forward, rotary positions, embeddings, heads, residuals: against torch's and transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.tiny import apart, host, redraw, tiny, tokens
from trivium.models.block import Block
from trivium.models.presets import presets
from trivium.models.transformer import Transformer, build, initialize
from trivium.nn.activations import SiLU, Swish, silu_times
from trivium.nn.attention import Attention, Place
from trivium.nn.embeddings import Tokens
from trivium.nn.feedforward import MLP
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS
from trivium.nn.positions import Rope, rotate
from trivium.nn.residual import NoResidual, Plain
from trivium.nn.rope_scaling import LinearScaling, Llama3Scaling
from trivium.nn.step import Step
from trivium.nn.store import Store


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_for(count: int, batch: int = 1) -> Step:
    return Step.begin(Inputs(torch.zeros(batch, count, dtype=torch.int64)), causal=True)


def apart_with_gradients(ours, theirs, x) -> float:
    """The largest difference of what two functions give for `x`, and of its gradients; those of parameters are left behind."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a), theirs(b)
    weight = draw(*out.shape, seed=8).to(out.dtype)
    out.backward(weight)
    expected.backward(weight)
    return max(apart(out, expected), apart(a.grad, b.grad))


@pytest.mark.concept("T17.01", part="nn/norms.py")
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_equals_torch_and_transformers(eps):
    weight = draw(16, seed=1) + 1
    for spec, theirs in (
        (RMS(eps=eps), nn.RMSNorm(16, eps=eps)),
        (RMS(eps=eps), LlamaRMSNorm(16, eps)),
        (RMS(eps=eps, offset=1.0, round_first=False), GemmaRMSNorm(16, eps)),
    ):
        ours = spec.build(16)
        with torch.no_grad():
            ours.weight.copy_(weight)
            theirs.weight.copy_(weight)
        x = draw(3, 5, 16)
        assert apart_with_gradients(ours, theirs, x) <= 1e-6
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=5e-6)
        ours, theirs, x = ours.bfloat16(), theirs.bfloat16(), x.bfloat16()
        if not isinstance(theirs, nn.RMSNorm):
            assert torch.equal(ours(x), theirs(x)), "the order of rounding is part of the spec"
    torch.testing.assert_close(RMS(eps=1e-12).build(16).to(torch.float64)(x.double() * 0) * 0, x.double() * 0)


@pytest.mark.concept("T17.01", part="nn/norms.py")
def test_rms_norm_does_not_see_scale():
    norm, x = redraw(RMS(eps=1e-12).build(32)), draw(4, 32)
    torch.testing.assert_close(norm(x * 37.0), norm(x))


@pytest.mark.concept("X.25", part="nn/activations.py")
def test_silu_and_swish():
    x = torch.linspace(-9, 9, 201)
    assert torch.equal(SiLU().build()(x), F.silu(x))
    swish = Swish(beta=1.0).build()
    swish.reset()
    torch.testing.assert_close(swish(x), F.silu(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        swish.beta.fill_(1e4)
    torch.testing.assert_close(swish(x), F.relu(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        swish.beta.zero_()
    assert torch.equal(swish(x), x / 2)
    swish(x).sum().backward()
    assert swish.beta.grad.abs() > 0
    gate, up = draw(3, 7).double().requires_grad_(), draw(3, 7, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(silu_times, (gate, up))
    assert torch.equal(silu_times(gate, up), F.silu(gate) * up)


@pytest.mark.concept("T16.01", part="nn/feedforward.py")
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_equals_llamas(bias):
    ours = redraw(MLP(hidden=20, bias=bias).build(12))
    theirs = LlamaMLP(LlamaConfig(hidden_size=12, num_attention_heads=2, intermediate_size=20, mlp_bias=bias))
    names = {"gate_proj": ours.inp.gate, "up_proj": ours.inp.up, "down_proj": ours.out}
    for name, module in names.items():
        getattr(theirs, name).load_state_dict(module.state_dict())
    assert apart_with_gradients(lambda x: ours(x, step_for(5)), theirs, draw(2, 5, 12)) <= 2e-6


@pytest.mark.concept("T16.01", part="nn/feedforward.py")
def test_swiglu_has_half_again_as_many_parameters_and_as_many_at_two_thirds():
    def count(hidden: int) -> int:
        return sum(p.numel() for p in MLP(hidden=hidden).build(24).parameters())

    assert count(96) == 3 * 24 * 96 == 1.5 * (2 * 24 * 96)
    assert count(64) == 2 * 24 * 96


@pytest.mark.concept("T02.01", part="nn/positions.py")
@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (None, {"rope_type": "default"}),
        (LinearScaling(factor=3.0), {"rope_type": "linear", "factor": 3.0}),
        (
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
    ids=["none", "linear", "llama3"],
)
def test_rotary_equals_transformers(scaling, parameters):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=512, rope_parameters={"rope_theta": 500.0, **parameters}
    )
    q, k = draw(2, 6, 40, 32), draw(2, 2, 40, 32, seed=1)
    step = step_for(40)
    rope = Rope(base=500.0, scaling=scaling)
    ours = [rope.turn(x, step) for x in (q, k)]
    theirs = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, step.positions))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.concept("T02.01", part="nn/positions.py")
def test_rotary_scores_depend_on_distance_alone_and_keep_lengths():
    q, k = draw(1, 1, 1, 32), draw(1, 1, 1, 32, seed=1)
    rope, zeros = Rope(base=100.0), torch.zeros(1, 1, dtype=torch.int64)

    def score(m: int, n: int) -> float:
        at = [Step.begin(Inputs(zeros, positions=torch.tensor([[p]])), causal=True) for p in (m, n)]
        turned_q, turned_k = rope.turn(q, at[0]), rope.turn(k, at[1])
        torch.testing.assert_close(turned_q.norm(), q.norm())
        return (turned_q * turned_k).sum().item()

    for shift in (1, 17, 300):
        assert abs(score(9 + shift, 4 + shift) - score(9, 4)) < 1e-4
    assert abs(score(9, 4) - score(9, 5)) > 1e-2
    angles = torch.tensor([0.3, 1.1, 2.0, -0.7])
    x = draw(3, 8)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.exp(1j * angles)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat([turned.real, turned.imag], -1))
    assert torch.autograd.gradcheck(lambda y: rotate(y, angles.cos().double(), angles.sin().double()), draw(3, 8).double().requires_grad_())


@pytest.mark.concept("X.16", part="nn/embeddings.py")
def test_embedding_is_a_one_hot_product():
    embed, x = redraw(Tokens(scale=16**0.5).build(13, 16)), tokens(2, 5, vocab=13)
    out = embed(x, step_for(5, 2))
    torch.testing.assert_close(out, F.one_hot(x, 13).float() @ embed.weight * 4.0, rtol=0, atol=1e-6)
    out.sum().backward()
    used = torch.zeros(13, dtype=torch.bool)
    used[x.unique()] = True
    assert torch.equal(embed.weight.grad.abs().sum(1) > 0, used), "only rows that were looked up get a gradient"


@pytest.mark.concept("X.17", part="nn/heads.py")
def test_tied_head_shares_storage_and_sums_gradients():
    tied, x = tiny(host(LMHead(tied=True))), tokens(2, 5)
    untied = tiny(host(LMHead(tied=False)))
    assert "head.out.weight" not in tied.state_dict() and "head.out.weight" in untied.state_dict()
    untied.load_state_dict({**tied.state_dict(), "head.out.weight": tied.embed.weight.detach().clone()})
    torch.testing.assert_close(tied(x).logits, untied(x).logits)
    for model in (tied, untied):
        model(x).logits.square().sum().backward()
    torch.testing.assert_close(tied.embed.weight.grad, untied.embed.weight.grad + untied.head.out.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.concept("T01.06", part="nn/residual.py")
@pytest.mark.parametrize("norm_at", ["pre", "post"])
def test_the_residual_stream_is_a_sum(norm_at):
    block = Block(mixer=Attention(heads=2, kv_heads=1, head_dim=4), ffn=MLP(hidden=12), norm=RMS(), norm_at=norm_at)
    layer = redraw(block.build(8, Place()))
    x, step = draw(2, 5, 8), step_for(5, 2)
    mixed = layer.mixer(layer.mixer_norm(x) if norm_at == "pre" else x, step, step.handle(0))
    middle = x + mixed if norm_at == "pre" else layer.mixer_norm(x + mixed)
    worked = layer.ffn(layer.ffn_norm(middle) if norm_at == "pre" else middle, step)
    expected = middle + worked if norm_at == "pre" else layer.ffn_norm(middle + worked)
    torch.testing.assert_close(layer(x, step), expected)
    assert torch.equal(Plain(scale=0.5).build(8).write(x, mixed, None), x + 0.5 * mixed)
    assert NoResidual().build(8).write(x, mixed, None) is mixed
    with torch.no_grad():
        layer.mixer.out.weight.zero_()
        layer.ffn.out.weight.zero_()
    if norm_at == "pre":
        assert torch.equal(layer(x, step), x), "sublayers that give zero make the block the identity"


@pytest.mark.concept("T01.06", part="nn/residual.py")
def test_gradients_reach_the_first_of_a_hundred_layers_only_with_residuals():
    ratios = {}
    for residual in ("plain", "none"):
        block = Block(mixer=Attention(heads=2, kv_heads=2, head_dim=8), ffn=MLP(hidden=32), residual={"kind": residual})
        model = initialize(build(Transformer(dim=16, vocab=29, layers=("a",) * 100, blocks={"a": block}), device="cpu"), seed=0)
        x = tokens(2, 9, vocab=29)
        F.cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).backward()
        first, last = (sum(p.grad.norm() ** 2 for p in model.layers[i].parameters()) ** 0.5 for i in (0, 99))
        ratios[residual] = (first / last).item()
    assert 0.1 < ratios["plain"] < 10 and not 0.1 < ratios["none"] < 10


def test_layers_shorthand_and_spec_errors():
    block = Block(ffn=MLP(hidden=4))

    def spec(layers, **blocks):
        return Transformer(dim=4, vocab=5, layers=layers, blocks=blocks or {"a": block})

    assert spec("2*(3*a b)", a=block, b=block).layers == tuple("aaabaaab")
    assert spec("3*a").layers == ("a",) * 3
    for bad, message in (
        ("2*(a", "not closed"),
        ("a)", "bracket too many"),
        ("3*", "cannot read"),
        ("a+a", "cannot read"),
        ("99999*a", "more than 10,000"),
        ("c", "unknown block 'c'"),
        ("", "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            spec(bad)
    with pytest.raises(ValueError, match="no layer uses it"):
        spec("a", a=block, b=block)
    with pytest.raises(ValueError, match="a mixer, a cross, an ffn, or several"):
        Block()
    with pytest.raises(ValueError, match="must be a multiple"):
        Attention(heads=3, kv_heads=2, head_dim=4)


def test_presets_build_and_smollm2_has_its_published_size():
    for name, make in presets.items():
        assert sum(p.numel() for p in build(make()).parameters()) > 0, name
    assert sum(p.numel() for p in build(presets.get("smollm2-135m")()).parameters()) == 134_515_008


def test_inputs_and_stores_refuse_what_does_not_fit():
    model = tiny(presets.get("tiny-llama")())
    for bad in (
        dict(tokens=torch.zeros(3, dtype=torch.int64)),
        dict(tokens=torch.zeros(1, 2)),
        dict(tokens=tokens(1, 4), segments=tokens(1, 3)),
        dict(tokens=tokens(2, 4), adapters=tokens(3)),
    ):
        with pytest.raises(ValueError, match="must be"):
            Inputs(**bad)
    cache = model.cache(rows=1, capacity=4)
    assert isinstance(cache, Store) and cache.bytes == 2 * 2 * 2 * 4 * 8 * 4
    model(Inputs(tokens(1, 3), cache=cache))
    for bad, message in ((tokens(1, 2), "holds 4 tokens a row; 3 are used"), (tokens(2, 1), "made for 1 rows")):
        with pytest.raises(ValueError, match=message):
            model(Inputs(bad, cache=cache))
    with pytest.raises(ValueError, match="cannot drop"):
        cache.drop_last(9)
    mark = cache.snapshot()
    cache.drop_last(2)
    with pytest.raises(ValueError, match="void"):
        cache.restore(mark)


def test_a_failed_forward_leaves_the_cache_as_it_was():
    model, x = tiny(presets.get("tiny-llama")()), tokens(2, 6)
    cache, clean = model.cache(rows=2, capacity=16), model.cache(rows=2, capacity=16)
    for store in (cache, clean):
        model(Inputs(x, cache=store))
    broken = model.layers[1].ffn.out.weight
    model.layers[1].ffn.out.weight = nn.Parameter(torch.zeros(1, 1))
    with pytest.raises(RuntimeError):
        model(Inputs(x[:, :4], segments=torch.tensor([[0, 0, -1, -1], [0] * 4]), cache=cache))
    model.layers[1].ffn.out.weight = broken
    assert cache.lengths == [6, 6]
    torch.testing.assert_close(model(Inputs(x[:, :2], cache=cache)).logits, model(Inputs(x[:, :2], cache=clean)).logits)
