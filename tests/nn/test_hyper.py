"""Hyper-connections against transformers' DeepSeek-V4, the paper's formulas, and what depth does to a signal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from tests.nn.test_parts import apart_with_gradients, draw
from tests.tiny import host, redraw, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.models.transformer import build, initialize
from trivium.nn.hyper import Hyper, HyperConnection, sinkhorn
from trivium.nn.residual import Plain, deep_norm

DIM = 12


def built(spec: Hyper, *, seed: int = 0) -> HyperConnection:
    return redraw(spec.build(DIM), seed=seed, std=0.4)


@pytest.mark.concept("X.02", part="nn/hyper.py")
@pytest.mark.parametrize("rounds", [1, 4, 20])
def test_constrained_equals_transformers(rounds):
    """What the sublayer reads and what the streams become, with gradients of streams and parameters."""
    ours = built(Hyper(streams=4, rounds=rounds, eps=1e-3, norm_eps=1e-2))
    config = SimpleNamespace(hc_mult=4, hc_sinkhorn_iters=rounds, hc_eps=1e-3, rms_norm_eps=1e-2, hidden_size=DIM)
    theirs = DeepseekV4HyperConnection(config)
    with torch.no_grad():
        theirs.fn.copy_(ours.weight)
        theirs.base.copy_(ours.start.base)
        theirs.scale.copy_(ours.start.scale)
    kernel = draw(DIM, DIM, seed=5)

    def mine(x):
        y, maps = ours.read(x)
        return ours.write(x, y @ kernel, maps)

    def expected(x):
        post, comb, collapsed = theirs(x)
        return post[..., None] * (collapsed @ kernel)[..., None, :] + comb.transpose(-1, -2) @ x

    x = draw(2, 5, 4, DIM)
    torch.testing.assert_close(ours.read(x)[0], theirs(x)[2], rtol=0, atol=1e-5)
    assert apart_with_gradients(mine, expected, x) <= 1e-5
    for a, b in ((ours.weight, theirs.fn), (ours.start.base, theirs.base), (ours.start.scale, theirs.scale)):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=2e-5)
        assert b.grad.abs().max() > 1e-3


@pytest.mark.concept("X.02", part="nn/hyper.py")
@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_mixing_is_doubly_stochastic(n):
    scores = draw(50, n, n)
    mix = sinkhorn(scores, rounds=20, eps=1e-6)
    assert (mix > 0).all()
    for side in (-1, -2):
        torch.testing.assert_close(mix.sum(side), torch.ones(50, n), rtol=0, atol=1e-4)
    assert torch.linalg.matrix_norm(mix, 2).max() <= 1 + 1e-5
    join = built(Hyper(streams=n))
    with torch.no_grad():
        join.weight.mul_(0.2)
    maps = join.maps(draw(3, 6, n, DIM))
    torch.testing.assert_close(maps.mix.sum(-1), torch.ones(3, 6, n), rtol=0, atol=1e-4)
    assert torch.linalg.matrix_norm(maps.mix, 2).max() <= 1 + 1e-4
    assert n == 1 or (maps.mix[0, 0] - maps.mix[1, 3]).abs().max() > 0.01, "another token, another mix"


@pytest.mark.concept("X.02", part="nn/hyper.py")
@pytest.mark.parametrize("constrained", [True, False])
def test_one_static_stream_is_the_plain_residual(constrained):
    x, y = draw(2, 3, DIM), draw(2, 3, DIM, seed=1)
    spec = Hyper(streams=1, constrained=constrained, dynamic=False)
    join = spec.build(DIM)
    join.start.reset()
    if constrained:
        with torch.no_grad():
            join.start.base[0] = 30.0
    read, maps = join.read(spec.open(x))
    torch.testing.assert_close(read, x, rtol=0, atol=0 if not constrained else 2e-5)
    found = spec.close(join.write(spec.open(x), y, maps))
    torch.testing.assert_close(found, Plain().build(DIM).write(x, y, None), rtol=0, atol=0 if not constrained else 2e-5)


@pytest.mark.concept("X.02", part="nn/hyper.py")
def test_free_connections_are_the_papers():
    """arXiv:2409.19606, equations 2 to 13, one token at a time: reads, writes and mixes, static and dynamic."""
    join = built(Hyper(streams=3, constrained=False))
    x, y = draw(2, 3, DIM), draw(2, DIM, seed=2)
    base_m, base_b, base_r = join.start.base.split([3, 3, 9])
    s_m, s_b, s_r = join.start.scale
    read, maps = join.read(x[None])
    written = join.write(x[None], y[None], maps)[0]
    for t in range(2):
        normal = x[t] / (x[t].square().mean(-1, keepdim=True) + 1e-6).sqrt()  # [n, C]
        w_m, w_b, w_r = join.weight[0], join.weight[1], join.weight[2:]
        alpha_m = s_m * torch.tanh(normal @ w_m) + base_m  # [n]
        beta = s_b * torch.tanh(normal @ w_b) + base_b
        alpha_r = s_r * torch.tanh(normal @ w_r.T) + base_r.view(3, 3)
        torch.testing.assert_close(read[0, t], alpha_m @ x[t], rtol=0, atol=1e-5)
        torch.testing.assert_close(written[t], torch.outer(beta, y[t]) + alpha_r.T @ x[t], rtol=0, atol=1e-5)


def gain(spec: Hyper, depth: int) -> float:
    """The largest sum of a row or a column of all layers' mixing matrices multiplied, for one token."""
    total = torch.eye(spec.streams)
    for layer in range(depth):
        join = built(spec, seed=layer)
        with torch.no_grad():
            join.start.base.mul_(0.3)
            if not spec.constrained:
                join.start.base[2 * spec.streams :] += torch.eye(spec.streams).flatten()
        total = join.maps(draw(1, 1, spec.streams, DIM, seed=layer)).mix[0, 0].T @ total
    return max(total.abs().sum(0).max().item(), total.abs().sum(1).max().item())


@pytest.mark.concept("X.02", part="nn/hyper.py")
def test_depth_multiplies_gains_only_without_the_constraint():
    with torch.no_grad():
        assert gain(Hyper(streams=4), 60) == pytest.approx(1, abs=0.01)
        assert gain(Hyper(streams=4, constrained=False), 60) > 1e3


@pytest.mark.concept("X.02", part="nn/hyper.py")
@pytest.mark.parametrize("constrained", [True, False])
def test_a_new_model_is_the_plain_one(constrained):
    """Streams start alike and stay so; free ones take turns at being read, so that training tells them apart."""
    hyper = Hyper(streams=3, constrained=constrained, end="mean", dynamic=False)
    plain = initialize(build(host(Plain()), device="cpu"), seed=1)
    model = initialize(build(host(hyper), device="cpu"), seed=1)
    torch.testing.assert_close(model(tokens(2, 5)).logits, plain(tokens(2, 5)).logits, rtol=0, atol=2e-4)
    if not constrained:
        read = [join.start.base[:3].argmax().item() for layer in model.layers for join in (layer.mixer_join, layer.ffn_join)]
        assert read == [0, 1, 2, 0]


def test_streams_learn_to_differ():
    """All parameters of the maps get gradients from a start that treats streams alike."""
    for constrained in (True, False):
        model = initialize(build(host(Hyper(streams=3, constrained=constrained)), device="cpu"), seed=1)
        model(tokens(2, 9)).logits.square().mean().backward()
        join = model.layers[1].mixer_join
        for parameter in (join.weight, join.start.base, join.start.scale):
            assert parameter.grad.abs().max() > 0


def test_all_blocks_carry_as_many_streams():
    spec = host(Hyper.tiny())
    with pytest.raises(ConfigError, match="as many residual streams, not 1, 3"):
        spec.replace(layers=("a", "b"), blocks={"a": spec.blocks["a"], "b": spec.blocks["a"].replace(residual=Plain())})


def test_half_precision_maps_in_single():
    join, x = built(Hyper(streams=3)).bfloat16(), draw(1, 4, 3, DIM).bfloat16()
    read, maps = join.read(x)
    assert {m.dtype for m in maps} == {torch.float32} and read.dtype == join.write(x, read, maps).dtype == torch.bfloat16


def test_deep_norm():
    """arXiv:2203.00555, table 1; the plain residual with 1 / alpha is the formula, up to what a norm does not see."""
    one = deep_norm(8)
    assert (one.alpha, one.beta) == pytest.approx((2.0, 64**-0.25))
    decoder, encoder = deep_norm(6, encoder=6), deep_norm(6, encoder=6, part="encoder")
    assert (decoder.alpha, decoder.beta) == pytest.approx((18**0.25, 72**-0.25))
    assert (encoder.alpha, encoder.beta) == pytest.approx((0.81 * 6 ** (5 / 16), 0.87 * 6 ** (-5 / 16)))
    x, y = draw(4, 64), draw(4, 64, seed=1)
    found = torch.nn.functional.layer_norm(one.residual.build(64).write(x, y, None), (64,))
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(one.alpha * x + y, (64,)), rtol=0, atol=1e-4)


def test_a_stack_that_is_trained_deep_stays_finite():
    model = tiny(host(Hyper(streams=4)).replace(layers=("a",) * 24))
    out = model(tokens(1, 6))
    out.logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
