"""Linear attention, gated linear attention and retention: every form against the naive sums, and what they cost."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models.test_count import counter
from tests.tiny import apart as tiny_apart
from tests.tiny import host, redraw, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.core.seed import generator
from trivium.core.spec import validate
from trivium.models import count
from trivium.models.ledger import Ledger
from trivium.nn import gated_linear, linear_attention
from trivium.nn.attention import Attention, Mixer, use_backend
from trivium.nn.gated_linear import GatedLinear, Retention
from trivium.nn.inputs import Inputs, Prefix
from trivium.nn.linear_attention import (
    EluFeatures,
    FeatureMap,
    IdentityFeatures,
    LinearAttention,
    ReluFeatures,
    SoftmaxFeatures,
    each_document,
)
from trivium.nn.norms import RMS, RMSNorm
from trivium.nn.step import Step
from trivium.nn.store import Handle

LENGTHS = [1, 16, 17, 65]
KINDS = {
    "linear_attention": LinearAttention.tiny(),
    "favor": LinearAttention(heads=3, head_dim=6, features=SoftmaxFeatures(count=10)),
    "gated_linear": GatedLinear.tiny(),
    "retention": Retention.tiny(),
}


def draw(*shape: int, seed: str = "x") -> torch.Tensor:
    return torch.randn(shape, generator=generator(0, seed))


def qkv(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = draw(2, length, 3, 4, seed="q"), draw(2, length, 3, 4, seed="k"), draw(2, length, 3, 5, seed="v")
    return tuple(x.requires_grad_() for x in (q, k, v))


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    return tiny_apart(actual, expected, unit=max(expected.detach().abs().max().item(), 1.0))


def grads(y: torch.Tensor, of) -> list[torch.Tensor]:
    weight = draw(*y.shape, seed="weight")
    found = torch.autograd.grad((y * weight).sum(), of, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, of, strict=True)]


@pytest.mark.concept("T19.06", part="nn/linear_attention.py")
@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("length", LENGTHS)
def test_parallel_recurrent_and_chunked_are_one(length, size):
    q, k, v = qkv(length)
    scores = torch.einsum("nihd,njhd->nhij", q, k)  # phi(Q) phi(K)^T, then the future taken out, then V
    oracle = torch.einsum("nhij,njhe->nihe", scores * torch.ones(length, length).tril(), v)
    forms = {
        "parallel": linear_attention.parallel(q, k, v),
        "recurrent": linear_attention.recurrent(q, k, v, None)[0],
        "chunked": linear_attention.chunked(q, k, v, None, size=size)[0],
    }
    for y in forms.values():
        assert apart(y, oracle) <= 1e-5
        for mine, theirs in zip(grads(y, (q, k, v)), grads(oracle, (q, k, v)), strict=True):
            assert apart(mine, theirs) <= 1e-5


@pytest.mark.concept("T19.06", part="nn/linear_attention.py")
@pytest.mark.parametrize("first", [1, 7, 20])
def test_a_state_stands_for_all_that_came_before(first):
    q, k, v = qkv(33)
    whole, end = linear_attention.recurrent(q, k, v, None)
    _, state = linear_attention.chunked(q[:, :first], k[:, :first], v[:, :first], None, size=8)
    y, state = linear_attention.chunked(q[:, first:], k[:, first:], v[:, first:], state, size=8)
    assert apart(y, whole[:, first:]) <= 1e-5
    assert apart(state, end) <= 1e-5
    assert apart(state, torch.einsum("njhd,njhe->nhde", k, v)) <= 1e-5


@pytest.mark.concept("T19.06", part="nn/linear_attention.py")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "features", [EluFeatures(), ReluFeatures(), IdentityFeatures(), SoftmaxFeatures(count=9)], ids=lambda part: part.kind
)
def test_the_mixer_against_the_formula(features, causal):
    """phi(Q)(phi(K)^T V), each row over its weights' sum, from the maps' weights alone."""
    spec = LinearAttention(heads=3, head_dim=8, features=features, normalize=features.positive, bias=("k", "out"))
    mixer, x = redraw(spec.build(24)), draw(2, 70, 24)
    step = Step.begin(Inputs(embeds=x), causal=causal)
    q, k, v = ((x @ m.weight.T + (0 if m.bias is None else m.bias)).view(2, 70, 3, 8) for m in (mixer.inp.q, mixer.inp.k, mixer.inp.v))
    weights = torch.einsum("nihd,njhd->nhij", features.features(q, step), features.features(k, step))
    weights = weights.tril() if causal else weights
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.eps)
    expected = torch.einsum("nhij,njhe->nihe", weights, v).flatten(-2) @ mixer.out.weight.T + mixer.out.bias
    assert apart(mixer(x, step, Handle()), expected) <= 1e-5


def test_feature_maps():
    x = draw(3, 8)
    step = Step.begin(Inputs(embeds=x[None]), causal=True)
    assert apart(EluFeatures().features(x, step), torch.where(x > 0, x + 1, x.exp())) <= 1e-5
    assert torch.equal(ReluFeatures().features(x, step), x.clamp(min=0) + 0.001)
    assert (EluFeatures().features(draw(999) * 9, step) > 0).all()
    assert set(FeatureMap.registry.names()) >= {"elu", "relu", "identity", "favor"}
    with pytest.raises(ConfigError, match="normalize"):
        validate(Mixer, {"kind": "linear_attention", "heads": 2, "head_dim": 4, "features": "identity"})


@pytest.mark.concept("T19.06", part="nn/linear_attention.py")
def test_random_features_estimate_the_softmax():
    """The error of a weight falls as one over the root of their number; directions are orthogonal and a function of the spec."""
    x = draw(40, 8) * 0.5
    exact = torch.exp(x @ x.T / math.sqrt(8))
    step = Step.begin(Inputs(embeds=x[None]), causal=True)

    def error(features: int) -> float:
        found = []
        for seed in range(12):
            phi = SoftmaxFeatures(count=features, seed=seed).features(x, Step.begin(Inputs(embeds=x[None]), causal=True))
            found.append(((phi @ phi.T - exact) / exact).square().mean())
        return torch.stack(found).mean().sqrt().item()

    few, many = error(64), error(1024)
    assert many < 0.1 and 3 < few / many < 6  # 4; a bias would leave a floor
    w = SoftmaxFeatures(count=20, seed=1).directions(8)
    for group in w.split(8):
        unit = torch.nn.functional.normalize(group, dim=-1)
        assert apart(unit @ unit.T, torch.eye(len(group))) <= 1e-5
    assert torch.equal(w, SoftmaxFeatures(count=20, seed=1).directions(8))
    assert not torch.equal(w, SoftmaxFeatures(count=20, seed=2).directions(8))
    assert SoftmaxFeatures(count=64).features(x * 30, step).isfinite().all()


def decays(length: int, *, channels: int, strength: float) -> torch.Tensor:
    return (-strength * torch.rand(2, length, 3, channels, generator=generator(1, "decay")) ** 8).requires_grad_()


@pytest.mark.concept("T19.06", part="nn/gated_linear.py")
@pytest.mark.parametrize("channels", [1, 4], ids=["head", "channel"])
@pytest.mark.parametrize("strength", [0.5, 30.0, 1e5])
@pytest.mark.parametrize("length", LENGTHS)
def test_decaying_chunks_equal_the_recurrence(length, strength, channels):
    """Also where one token wipes the state and the next keeps nearly all of it: nothing overflows and nothing is lost."""
    q, k, v = qkv(length)
    decay, state = decays(length, channels=channels, strength=strength), draw(2, 3, 4, 5, seed="state")
    for start in (None, state):
        expected, end = gated_linear.recurrent(q, k, v, decay, start)
        y, found = gated_linear.chunked(q, k, v, decay, start, size=16)
        assert apart(y, expected) <= 1e-5
        assert apart(found, end) <= 1e-5
        assert y.isfinite().all()
        for mine, theirs in zip(grads(y, (q, k, v, decay)), grads(expected, (q, k, v, decay)), strict=True):
            assert mine.isfinite().all()
            assert apart(mine, theirs) <= 3e-5


@pytest.mark.concept("T19.06", part="nn/gated_linear.py")
def test_without_decay_it_is_linear_attention():
    q, k, v = qkv(40)
    none = torch.zeros(2, 40, 3, 1)
    assert apart(gated_linear.chunked(q, k, v, none, None, size=16)[0], linear_attention.parallel(q, k, v)) <= 1e-5


def normed(mixer, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """What both decaying mixers end with, written out."""
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight
    return (y.flatten(-2) * gate * gate.sigmoid()) @ mixer.out.weight.T


@pytest.mark.concept("T19.06", part="nn/gated_linear.py")
def test_gated_linear_against_the_formula():
    spec = GatedLinear(heads=3, key_dim=4, value_dim=8, gate_rank=5, temperature=2.0, norm=RMS())
    mixer, x = redraw(spec.build(24)), draw(2, 37, 24)
    assert isinstance(mixer.norm, RMSNorm)
    q, k, v, gate, low = (x @ m.weight.T for m in mixer.inp.children())
    keep = (low @ mixer.decay.weight.T + mixer.decay.bias).sigmoid().view(2, 37, 3, 4) ** 0.5
    q, k, v = q.view(2, 37, 3, 4) / 2, k.view(2, 37, 3, 4), v.view(2, 37, 3, 8)
    state, outputs = torch.zeros(2, 3, 4, 8), []
    for t in range(37):
        state = state * keep[:, t, :, :, None] + torch.einsum("nhd,nhe->nhde", k[:, t], v[:, t])
        outputs.append(torch.einsum("nhd,nhde->nhe", q[:, t], state))
    expected = normed(mixer, torch.stack(outputs, 1), gate)
    assert apart(mixer(x, Step.begin(Inputs(embeds=x), causal=True), Handle()), expected) <= 1e-5


@pytest.mark.concept("T19.06", part="nn/gated_linear.py")
def test_retention_against_its_parallel_form():
    """(Q K^T * D) V with D[i, j] = gamma^(i - j), over more than one chunk."""
    spec = Retention(heads=3, key_dim=4, value_dim=8, position=None)
    mixer, x = redraw(spec.build(24)), draw(2, 70, 24)
    q, k, v, gate = (x @ m.weight.T for m in mixer.inp.children())
    q, k, v = q.view(2, 70, 3, 4) / 2, k.view(2, 70, 3, 4), v.view(2, 70, 3, 8)
    gamma = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])
    distance = (torch.arange(70)[:, None] - torch.arange(70)).clamp(min=0)
    pairs = torch.einsum("nihd,njhd->nhij", q, k) * (gamma[:, None, None] ** distance).tril()
    expected = normed(mixer, torch.einsum("nhij,njhe->nihe", pairs, v), gate)
    assert apart(mixer(x, Step.begin(Inputs(embeds=x), causal=True), Handle()), expected) <= 1e-5


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_long_prompts_and_single_steps_agree(spec):
    """Over several chunks, and from a state that ended inside one."""
    model, x = tiny(host(spec)), tokens(2, 150)
    cache = model.cache(rows=2, capacity=150)
    with torch.inference_mode():
        full = model(x).logits
        pieces = [model(Inputs(part, cache=cache)).logits for part in x.split((70, 1, 1, 67, 11), 1)]
    assert apart(torch.cat(pieces, 1), full) <= 2e-5


@pytest.mark.concept("T19.06", part="nn/linear_attention.py")
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_the_state_has_one_size(spec):
    model = tiny(host(spec), dtype=torch.bfloat16)
    assert model.cache(rows=2, capacity=8).bytes == model.cache(rows=2, capacity=8000).bytes == 2 * sum(count.state_bytes(model))
    assert count.cache_bytes(model) == [0, 0]
    entry = model.layers[0].state()["kv"]
    assert entry.constant(torch.bfloat16) == math.prod(entry.shape) * 4, "sums are kept in float32"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_products_over_many_chunks(spec, causal):
    model = tiny(host(spec, causal=causal))
    segments = torch.zeros(2, 150, dtype=torch.int64)
    segments[1, 80:] = 1
    with counter() as mode:
        out = model(Inputs(tokens(2, 150), segments=segments)).logits
    forward = mode.get_total_flops()
    with counter() as mode:
        out.square().sum().backward()
    found = count.flops(model, segments, kept=300)
    assert found.forward == pytest.approx(forward, rel=1e-3) and found.backward == pytest.approx(mode.get_total_flops(), rel=1e-3)


@pytest.mark.concept("T19.06", part="nn/linear_attention.py")
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_products_grow_with_the_length_and_decoding_with_nothing(spec):
    model = tiny(host(spec))
    short, long = (count.flops(model, torch.zeros(1, length, dtype=torch.int64), kept=length).forward for length in (1024, 8192))
    assert long == pytest.approx(8 * short, rel=0.02)
    assert count.decoding_flops(model, held=10) == count.decoding_flops(model, held=100_000)


def kept(spec: Mixer, length: int) -> int:
    """Bytes that a forward leaves for its backward."""
    model = tiny(host(spec)).train()
    use_backend(model, "eager")
    with Ledger() as ledger:
        ledger.note(model.parameters(), "weights")
        out = model(tokens(1, length), keep="none").hidden
        held = ledger.live["tensors"]
    assert out.requires_grad
    return held


@pytest.mark.concept("T19.06", part="nn/linear_attention.py")
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_training_keeps_no_pairs_of_distant_tokens(spec):
    assert kept(spec, 1024) < 2.05 * kept(spec, 512)
    assert kept(Attention.tiny(), 1024) > 3 * kept(Attention.tiny(), 512), "attention as its naive statement does"


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_what_cannot_be_is_refused(spec):
    model = tiny(host(spec))
    with pytest.raises(ConfigError, match="left to right"):
        model(Inputs(tokens(2, 6), mask=Prefix(torch.tensor([2, 3]))))
    if spec.kind == "linear_attention":
        with pytest.raises(ConfigError, match="without a cache"):
            model(Inputs(tokens(2, 6), mask="full", cache=model.cache(rows=2, capacity=6)))


def test_each_document_alone_gets_its_own_tokens():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    step = Step.begin(Inputs(torch.zeros(2, 6, dtype=torch.int64), segments=segments), causal=False)
    x = draw(2, 6, 3)

    def total(inputs, real):
        (y,) = inputs
        return (y if real is None else y * real[..., None]).sum(1, keepdim=True).expand_as(y)

    y = each_document(total, (x,), step)
    assert apart(y[0, :3], x[0, :3].sum(0).expand(3, 3)) <= 1e-5
    assert apart(y[0, 3:5], x[0, 3:5].sum(0).expand(2, 3)) <= 1e-5
    assert apart(y[1], x[1].sum(0).expand(6, 3)) <= 1e-5


def test_against_the_naive_kernels_of_flash_linear_attention():
    gla = pytest.importorskip("fla.ops.gla.naive")
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn
    from fla.ops.retention.naive import naive_retention

    q, k, v = (x.detach() for x in qkv(128))
    assert apart(linear_attention.chunked(q, k, v, None, size=64)[0], naive_chunk_linear_attn(q, k, v, scale=1.0)) <= 1e-5
    decay = decays(128, channels=4, strength=0.5).detach()
    expected, end = gla.naive_recurrent_gla(q, k, v, decay, output_final_state=True)
    y, state = gated_linear.chunked(q * 4**-0.5, k, v, decay, None, size=16)
    assert apart(y, expected) <= 1e-5
    assert apart(state, end) <= 1e-5
    decay = gated_linear.retention_decays(3, q.device).float()[:, None].expand(2, 128, -1, -1)
    expected = naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert apart(gated_linear.chunked(q * 4**-0.5, k, v, decay, None, size=64)[0], expected) <= 1e-5
