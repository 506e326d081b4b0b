"""Attention against torch's own, over head shapes, masks and rows that see nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tiny import segments_of, tiny, tokens
from trivium.models.block import Block
from trivium.models.transformer import Transformer
from trivium.nn.attention import Attention
from trivium.nn.backends import backends, eager_weights
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.linear import Linear
from trivium.nn.patterns import Window
from trivium.nn.step import Step, find_documents, find_runs

# flash and triton need a GPU, flex has no gradients without one: see test_backends.py
BACKENDS = pytest.mark.parametrize("name", [name for name in backends.names() if name not in ("flash", "flex", "triton")])


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def math_sdpa(q, k, v, **options):
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


@pytest.mark.concept("T01.01", part="nn/backends.py")
@pytest.mark.concept("T01.02", "T19.01", "T19.03", part="nn/attention.py")
@BACKENDS
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (6, 1)])
@pytest.mark.parametrize(("queries", "keys", "mask"), [(7, 7, "none"), (7, 7, "causal"), (3, 9, "bool"), (1, 9, "bool"), (5, 1, "none")])
def test_backends_equal_torch_forward_and_gradients(name, heads, kv_heads, queries, keys, mask):
    q, k, v = draw(2, heads, queries, 8), draw(2, kv_heads, keys, 8, seed=1), draw(2, kv_heads, keys, 8, seed=2)
    allowed = draw(2, 1, queries, keys, seed=3) > -0.3 if mask == "bool" else None
    if allowed is not None:
        allowed[..., 0] = True
    grad, results = draw(2, heads, queries, 8, seed=4), []
    for run in (backends.get(name), None):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if run is None:
            out = math_sdpa(*inputs, attn_mask=allowed, is_causal=mask == "causal", scale=0.4)
        else:
            out = run(*inputs, scale=0.4, causal=mask == "causal", mask=allowed)
        out.backward(grad)
        results.append([out, *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if ours is results[0][0] else 5e-6)


@pytest.mark.concept("T01.01", part="nn/backends.py")
@BACKENDS
def test_gradcheck_in_double(name):
    inputs = [draw(1, 4, 3, 2, dtype=torch.float64), draw(1, 2, 5, 2, dtype=torch.float64), draw(1, 2, 5, 2, seed=9, dtype=torch.float64)]
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool).tril(2)
    run = backends.get(name)
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, scale=0.7, causal=False, mask=mask), [x.requires_grad_() for x in inputs])


@pytest.mark.concept("T01.01", part="nn/backends.py")
def test_weights_are_a_distribution_over_what_is_seen():
    q, k = draw(2, 6, 5, 8), draw(2, 2, 5, 8)
    weights = eager_weights(q, k, scale=8**-0.5, causal=True, mask=None)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 5))
    assert weights.triu(1).abs().max() == 0


@pytest.mark.concept("T01.01", part="nn/backends.py")
@pytest.mark.parametrize("dim", [16, 64, 256, 1024])
def test_scaling_keeps_the_variance_of_scores_at_one(dim):
    q, k = draw(1, 1, 600, dim), draw(1, 1, 600, dim, seed=1)
    raw = (q @ k.mT).var().item()
    assert abs(raw / dim - 1) < 0.05 and abs(raw * (dim**-0.5) ** 2 - 1) < 0.05

    def entropy(scale: float) -> float:
        weights = eager_weights(q, k, scale=scale, causal=False, mask=None)
        return -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean().item()

    assert entropy(1.0) < (1.0 if dim >= 64 else 3.0) < 5.5 < entropy(dim**-0.5)


@pytest.mark.concept("T01.02", part="nn/attention.py")
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("bias", [(), ("q", "k", "v", "out")], ids=["plain", "bias"])
def test_multi_head_equals_torch(heads, bias):
    """Outputs, per-head weights and gradients against torch.nn.MultiheadAttention with the same packed weights."""
    dim = 16
    spec = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, bias=bias)
    mixer = spec.build(dim)
    theirs = nn.MultiheadAttention(dim, heads, bias=bool(bias), batch_first=True)
    ours = [mixer.inp.q, mixer.inp.k, mixer.inp.v]
    with torch.no_grad():
        for index, parameter in enumerate(mixer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=index) * 0.2)
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in ours]))
        theirs.out_proj.weight.copy_(mixer.out.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([m.bias for m in ours]))
            theirs.out_proj.bias.copy_(mixer.out.bias)
    x = draw(2, 7, dim)
    inputs = Inputs(torch.zeros(2, 7, dtype=torch.int64))
    step = Step.begin(inputs, causal=False)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = mixer(a, step, step.handle(0))
    expected, weights = theirs(b, b, b, average_attn_weights=False)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    q, k = (m(x, step).view(2, 7, heads, -1).transpose(1, 2) for m in ours[:2])
    torch.testing.assert_close(eager_weights(q, k, scale=mixer.scale, causal=False, mask=None), weights, rtol=0, atol=1e-6)
    grad = draw(2, 7, dim, seed=5)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * dim * dim + (4 * dim if bias else 0)


@pytest.mark.concept("T19.01", "T19.03", part="nn/attention.py")
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_attention_is_multi_head_with_repeated_heads(kv_heads):
    """kv_heads = heads is multi-head, 1 is multi-query; cache bytes are kv_heads / heads of multi-head's, exactly."""
    q, k, v = draw(2, 6, 5, 8), draw(2, kv_heads, 5, 8, seed=1), draw(2, kv_heads, 5, 8, seed=2)
    wide_k, wide_v = (x.repeat_interleave(6 // kv_heads, 1) for x in (k, v))
    run = backends.get("eager")
    grouped = run(q, k, v, scale=0.3, causal=True, mask=None)
    torch.testing.assert_close(grouped, run(q, wide_k, wide_v, scale=0.3, causal=True, mask=None), rtol=0, atol=1e-6)

    def cache_bytes(count: int) -> int:
        block = Block(mixer=Attention(heads=6, kv_heads=count, head_dim=8), ffn=MLP(hidden=8))
        return tiny(Transformer(dim=12, vocab=9, layers=("a",), blocks={"a": block})).cache(rows=2, capacity=10).bytes

    assert cache_bytes(kv_heads) * 6 == cache_bytes(6) * kv_heads


@pytest.mark.concept("T01.03", part="nn/step.py")
@BACKENDS
def test_a_query_that_sees_nothing_gives_zero(name):
    q, k, v = draw(2, 4, 3, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8, seed=1)
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    mask[1, :, 1] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = backends.get(name)(*leaves, scale=0.3, causal=False, mask=mask)
    assert out.isfinite().all() and out[1, :, 1].abs().max() == 0 and out[0].abs().min() > 0
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def small(window: int | None = None, *, causal: bool = True):
    pattern = {} if window is None else {"pattern": Window(size=window)}
    block = Block(mixer=Attention(heads=4, kv_heads=2, head_dim=4, position={"kind": "rope"}, **pattern), ffn=MLP(hidden=12))
    return tiny(Transformer(dim=12, vocab=31, layers=("a",), blocks={"a": block}, causal=causal))


@pytest.mark.concept("T01.03", part="nn/step.py")
@pytest.mark.parametrize("form", ["plain", "left", "right", "packed", "cached"])
def test_gradients_from_the_future_are_exactly_zero(form):
    """d output[t] / d input[s] is 0 for every s > t, with padding on either side, packed documents, and a cache."""
    model, x = small(), tokens(1, 8, vocab=31)
    segments = {
        "plain": None,
        "left": segments_of([[-3, 5]], 8),
        "right": segments_of([[5, -3]], 8),
        "packed": segments_of([[3, 5]], 8),
        "cached": None,
    }[form]
    embedded = model.embed.weight[x].detach().requires_grad_()
    for t in range(8):
        if segments is not None and segments[0, t] < 0:
            continue
        cache = None
        if form == "cached":
            cache = model.cache(rows=1, capacity=12)
            model(Inputs(tokens(1, 3, vocab=31, seed=4), cache=cache))
        step = Step.begin(Inputs(x, segments=segments, cache=cache), causal=True)
        hidden = model.run(embedded, step)
        (grad,) = torch.autograd.grad(hidden[0, t].square().sum(), embedded)
        seen = grad[0].abs().amax(-1) > 0
        for s in range(8):
            same = segments is None or segments[0, s] == segments[0, t]
            assert bool(seen[s]) == (s <= t and bool(same)), (t, s)


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_hides_what_is_further_back(window, causal):
    model, x = small(window, causal=causal), tokens(1, 10, vocab=31)
    embedded = model.embed.weight[x].detach().requires_grad_()
    step = Step.begin(Inputs(x), causal=causal)
    for t in range(10):
        (grad,) = torch.autograd.grad(model.run(embedded, step)[0, t].sum(), embedded)
        seen = (grad[0].abs().amax(-1) > 0).nonzero()[:, 0].tolist()
        assert seen == [s for s in range(10) if abs(t - s) < window and (s <= t or not causal)]


def test_documents_are_grouped_by_length_and_none_is_lost():
    segments = segments_of([[5, 3, -2, 4], [14], [-1, 1, 2, 3, 4, -3], [-14]], 14)
    runs = find_runs(segments.numpy())
    assert sorted(runs[:, 1].tolist()) == [1, 2, 3, 3, 4, 4, 5, 14]
    documents = find_documents(runs, 4, 14, device=torch.device("cpu"))
    x = torch.arange(1, 57)
    back = x[documents.slots][documents.places].view(4, 14)
    assert torch.equal(back[segments >= 0], x.view(4, 14)[segments >= 0])
    assert sum(group.slots.numel() for group in documents.groups) <= 36 / 0.85
    with pytest.raises(ValueError, match="two places of one row"):
        find_runs(torch.tensor([[0, 1, 0]]).numpy())


def test_no_square_mask_is_built_for_packed_training():
    """A long packed row costs memory by document, not by row: no tensor with T x T places is made."""
    model, count = small(), 512
    x, segments = tokens(1, count, vocab=31), segments_of([[16] * 32], count)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        model(Inputs(x, segments=segments)).logits.sum().backward()
    assert largest < count * count / 4


def test_linear_is_torchs():
    linear = Linear(5, 3, bias=True)
    with torch.no_grad():
        linear.weight.copy_(draw(3, 5))
        linear.bias.copy_(draw(3))
    x = draw(2, 4, 5)
    step = Step.begin(Inputs(torch.zeros(2, 4, dtype=torch.int64)), causal=True)
    assert torch.equal(linear(x, step), F.linear(x, linear.weight, linear.bias))
