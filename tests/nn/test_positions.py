"""Positions inside attention: rotary in both layouts and in part, ALiBi, T5's bias, Shaw's vectors, none; against transformers,
against naive statements, tile by tile, and moved along."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as turn_interleaved
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_half
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from tests.tiny import host, redraw, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.models.block import Block
from trivium.models.transformer import Transformer
from trivium.nn.attention import Attention, use_backend
from trivium.nn.backends import Extras, eager_weights
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.positions import Position, Rope, rotate
from trivium.nn.positions_relative import Alibi, Relative, RelativeBias, alibi_slopes
from trivium.nn.step import Step

HEADS = (1, 2, 3, 5, 6, 8, 12, 16, 20, 25, 64, 71)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_for(count: int, *, first: int = 0) -> Step:
    return Step.begin(Inputs(torch.zeros(1, count, dtype=torch.int64), positions=torch.arange(first, first + count)[None]), causal=True)


def angles(rope: Rope, dim: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [1, T, dim], as transformers has them: every frequency twice, one half after the other."""
    half = torch.arange(count)[None, :, None] * rope.frequencies(dim, torch.tensor(0))
    return torch.cat([half.cos(), half.cos()], -1), torch.cat([half.sin(), half.sin()], -1)


@pytest.mark.concept("T02.01", part="nn/positions.py")
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_both_layouts_over_all_or_part_of_a_head(layout, share):
    rope, q, k = Rope(base=300.0, layout=layout, share=share), draw(2, 6, 20, 16), draw(2, 2, 20, 16, seed=1)
    dim = rope.turned(16)
    cos, sin = angles(rope, dim, 20)
    if layout == "interleaved":  # Cohere's tables hold each frequency twice in a row
        cos, sin = (x[..., : dim // 2].repeat_interleave(2, -1) for x in (cos, sin))
    turn = turn_half if layout == "half" else turn_interleaved
    expected = [torch.cat([new, x[..., dim:]], -1) for new, x in zip(turn(q[..., :dim], k[..., :dim], cos, sin), (q, k), strict=True)]
    for ours, theirs in zip((rope.turn(x, step_for(20)) for x in (q, k)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.concept("T02.01", part="nn/positions.py")
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_turning_is_a_complex_product_and_a_matrix(layout):
    x, theta = draw(5, 8), draw(5, 4, seed=1)
    pairs = (x.unflatten(-1, (2, 4)).mT if layout == "half" else x.unflatten(-1, (4, 2))).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.exp(1j * theta))
    expected = (turned.mT if layout == "half" else turned).flatten(-2)
    torch.testing.assert_close(rotate(x, theta.cos(), theta.sin(), layout=layout), expected)
    matrix = torch.stack([torch.stack([theta.cos(), -theta.sin()], -1), torch.stack([theta.sin(), theta.cos()], -1)], -2)  # [5, 4, 2, 2]
    torch.testing.assert_close((matrix @ pairs[..., None])[..., 0], turned)
    y = draw(3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: rotate(y, theta[:3].cos().double(), theta[:3].sin().double(), layout=layout), y)


def with_position(position: Position | None, *, causal: bool = True, layers: int = 2, **fields: object) -> Transformer:
    mixer = Attention(heads=6, kv_heads=2, head_dim=8, position=position, **fields)
    return Transformer(dim=24, vocab=61, layers=("a",) * layers, blocks={"a": Block(mixer=mixer, ffn=MLP(hidden=40))}, causal=causal)


ROPES = [Rope(base=50.0), Rope(base=50.0, layout="interleaved"), Rope(base=50.0, share=0.5)]
RELATIVE = [Alibi(), RelativeBias(buckets=6, distance=9), RelativeBias(buckets=8, distance=9, bidirectional=True), Relative(reach=4)]


@pytest.mark.concept("T02.01", part="nn/positions.py")
@pytest.mark.concept("T02.04", "T02.05", part="nn/positions_relative.py")
@pytest.mark.parametrize("position", [*ROPES, *RELATIVE], ids=str)
def test_logits_do_not_change_when_all_positions_are_shifted(position):
    model, x = tiny(with_position(position)), tokens(2, 14)
    expected = model(x).logits
    for shift in (1, 9, 700):
        found = model(Inputs(x, positions=torch.arange(shift, shift + 14).expand(2, -1))).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    stretched = model(Inputs(x, positions=3 * torch.arange(14).expand(2, -1))).logits
    assert (stretched - expected).abs().max() > 1e-2


@pytest.mark.concept("T02.01", part="nn/positions.py")
@pytest.mark.parametrize("position", ROPES, ids=str)
def test_cached_steps_turn_by_the_place_in_the_text(position):
    model, x = tiny(with_position(position)), tokens(2, 14)
    cache = model.cache(2, 14)
    steps = torch.cat([model(Inputs(part, cache=cache)).logits for part in x.split((5, 1, 8), 1)], 1)
    torch.testing.assert_close(steps, model(x).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("share", "message"), [(0.1, "0.1 of 16, 1"), (0.2, "0.2 of 16, 3"), (0.05, "0.05 of 16, 0")])
def test_channels_turn_in_pairs(share, message):
    with pytest.raises(ConfigError, match=message):
        Rope(share=share).turn(draw(1, 1, 3, 16), step_for(3))
    with pytest.raises(ConfigError, match="head_dim"):
        Rope().turn(draw(1, 1, 3, 15), step_for(3))


# ALiBi


@pytest.mark.concept("T02.04", part="nn/positions_relative.py")
@pytest.mark.parametrize("heads", HEADS)
def test_alibi_equals_bloom_falcon_and_mpt(heads):
    count = 40
    ours = Alibi().bias(heads, None)(torch.arange(count)[None], torch.arange(count)[None])[0]  # [H, T, S]
    mpt = build_mpt_alibi_tensor(heads, count)
    torch.testing.assert_close(ours[:, -1:], mpt, rtol=5e-7, atol=1e-6)
    slopes = torch.tensor(alibi_slopes(heads))
    mask = torch.ones(1, count, dtype=torch.int64)
    bloom = bloom_alibi(mask, heads, torch.float32)  # [H, 1, S]: the distance from the first key, which softmax cannot tell
    torch.testing.assert_close(slopes, bloom[:, 0, 1], rtol=5e-7, atol=0)  # a rounding of theirs: they take powers of a rounded base
    if heads in (1, 2, 8):
        assert torch.equal(slopes, bloom[:, 0, 1]) and torch.equal(ours[:, -1:], mpt)
    for query in (0, 7, count - 1):
        seen = slice(0, query + 1)
        torch.testing.assert_close(
            ours[:, query, seen] - ours[:, query, :1], bloom[:, 0, seen], rtol=5e-7, atol=4e-6
        )  # differences of numbers near 36
    falcon = falcon_alibi(mask, heads, torch.float32)  # its slopes are rounded to bfloat16
    assert torch.equal(falcon[:, 0, 1], bloom[:, 0, 1].bfloat16().float())


@pytest.mark.concept("T02.04", part="nn/positions_relative.py")
def test_alibi_weights_equal_blooms():
    q, k = draw(1, 6, 9, 8), draw(1, 6, 9, 8, seed=1)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    bloom = bloom_alibi(torch.ones(1, 9, dtype=torch.int64), 6, torch.float32)
    expected = torch.softmax((q @ k.mT * 8**-0.5 + bloom).masked_fill(~causal, -torch.inf), -1)
    model = with_position(Alibi()).blocks["a"].mixer
    places = torch.arange(9)[None]
    extras = Extras(bias=model.position.bias(6, None), places=(places, places))
    torch.testing.assert_close(eager_weights(q, k, scale=8**-0.5, causal=True, mask=None, extras=extras), expected, rtol=0, atol=1e-6)


# T5's bias


def theirs_t5(spec: RelativeBias, heads: int) -> T5Attention:
    config = T5Config(
        d_model=24, d_kv=4, num_heads=heads, is_decoder=not spec.bidirectional, relative_attention_num_buckets=spec.buckets,
        relative_attention_max_distance=spec.distance,
    )  # fmt: skip
    return redraw(T5Attention(config, has_relative_attention_bias=True, layer_idx=0))


SPECS = [RelativeBias(bidirectional=b, buckets=n, distance=d) for b in (False, True) for n, d in ((32, 128), (8, 20), (4, 3))]


@pytest.mark.concept("T02.05", part="nn/positions_relative.py")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_t5_buckets_and_bias(spec):
    distance = torch.arange(-400, 401)
    theirs = T5Attention._relative_position_bucket(distance, spec.bidirectional, spec.buckets, spec.distance)
    assert torch.equal(spec.bucket(distance), theirs)
    attention = theirs_t5(spec, 6)
    table = spec.build(6, 4)
    with torch.no_grad():
        table.weight.copy_(attention.relative_attention_bias.weight)
    ours = spec.bias(6, table)(torch.arange(7, 40)[None], torch.arange(200)[None])
    expected = attention.compute_bias(33, 200, past_seen_tokens=7)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    weight = draw(*ours.shape)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(table.weight.grad, attention.relative_attention_bias.weight.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.concept("T02.05", part="nn/positions_relative.py")
def test_the_first_layer_of_a_block_holds_the_shared_table():
    spec = with_position(RelativeBias(buckets=6, distance=9), layers=3)
    model, x = tiny(spec), tokens(2, 12)
    names = [name for name, _ in model.named_parameters() if "table" in name]
    assert names == ["layers.0.mixer.table.weight"]
    own = tiny(with_position(RelativeBias(buckets=6, distance=9, shared=False), layers=3))
    own.load_state_dict({**own.state_dict(), **model.state_dict()})
    assert (own(x).logits - model(x).logits).abs().max() > 1e-2
    for layer in own.layers:
        layer.mixer.table.load_state_dict(model.layers[0].mixer.table.state_dict())
    torch.testing.assert_close(own(x).logits, model(x).logits)
    model(x).logits.square().sum().backward()
    own(x).logits.square().sum().backward()
    total = sum(layer.mixer.table.weight.grad for layer in own.layers)
    torch.testing.assert_close(model.layers[0].mixer.table.weight.grad, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields", [{"buckets": 6, "bidirectional": True, "distance": 1}, {"buckets": 8, "distance": 4}, {"buckets": 5, "bidirectional": True}]
)
def test_buckets_that_cannot_be_are_refused(fields):
    with pytest.raises(ConfigError, match="cannot be"):
        validate(Position, {"kind": "relative_bias", **fields})


# Shaw's relative representations


def naive_shaw(q, k, v, keys, values, *, scale: float, reach: int, causal: bool) -> torch.Tensor:
    """Every pair's own vectors, [T, S, D] of them."""
    count, slots = q.shape[2], k.shape[2]
    places = (torch.arange(slots)[None] - torch.arange(count)[:, None]).clamp(-reach, reach) + reach
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhtd,bhtsd->bhts", q, k[:, :, None] + keys[places]) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(count, slots, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhts,bhtsd->bhtd", scores.softmax(-1), v[:, :, None] + values[places])


def skewed(products: torch.Tensor) -> torch.Tensor:
    """[.., T, T], products with the vectors of the distances 1 - T to 0, moved to where those distances lie (arXiv:1809.04281)."""
    count = products.shape[-1]
    padded = torch.nn.functional.pad(products, (1, 0))
    return padded.reshape(*products.shape[:-2], count + 1, count)[..., 1:, :].tril()


@pytest.mark.concept("T02.05", part="nn/positions_relative.py")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reach", [1, 4, 30])
def test_shaws_vectors_equal_the_naive_gather(reach, causal):
    model = tiny(with_position(Relative(reach=reach), causal=causal))
    layer, seen = model.layers[0].mixer, {}
    layer.register_forward_hook(lambda module, inputs, out: seen.update(x=inputs[0], step=inputs[1], out=out))
    x = tokens(2, 13)
    model(x)
    q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in layer.inp(seen["x"], seen["step"]))
    expected = naive_shaw(q, k, v, layer.table.keys, layer.table.values, scale=layer.scale, reach=reach, causal=causal)
    expected = layer.out(expected.transpose(1, 2).flatten(2), seen["step"])
    torch.testing.assert_close(seen["out"], expected, rtol=0, atol=1e-5)
    weight = draw(*expected.shape)
    parameters = [layer.table.keys, layer.table.values, layer.inp.q.weight, layer.inp.k.weight]
    for ours, theirs in zip(
        torch.autograd.grad((seen["out"] * weight).sum(), parameters, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))
    told = model(x, weights=True)
    torch.testing.assert_close(told.logits, model(x).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(told.aux.weights[0].sum(-1), torch.ones(2, 6, 13))


@pytest.mark.concept("T02.05", part="nn/positions_relative.py")
def test_placing_by_distance_is_skewing():
    spec = Relative(reach=12)
    table, q = redraw(spec.build(1, 8)), draw(2, 3, 13, 8)
    places = torch.arange(13)[None]
    ours = (q @ table.keys.T).gather(-1, table.places(places, places).expand(2, 3, -1, -1)).tril()
    torch.testing.assert_close(ours, skewed(q @ table.keys[:13].T), rtol=0, atol=1e-6)


@pytest.mark.concept("T02.05", part="nn/positions_relative.py")
def test_nothing_is_as_large_as_every_pairs_own_vector():
    """The largest tensor of a forward and backward holds T x T scores of all heads, not D times as many."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    count, heads = 64, 6
    model = tiny(with_position(Relative(reach=4)))
    with Largest() as seen:
        model(tokens(1, count)).logits.sum().backward()
    assert count * count <= seen.size <= heads * count * count < count * count * 8


def test_shaws_vectors_need_the_weights():
    model = tiny(host(Relative(reach=4)))
    use_backend(model, "sdpa")
    with pytest.raises(ConfigError, match="sdpa"):
        model(tokens(1, 5))


@pytest.mark.concept("T02.04", "T02.05", part="nn/positions_relative.py")
@pytest.mark.parametrize("position", [Alibi(), *SPECS[:4]], ids=str)
def test_a_bias_is_made_of_its_tiles(position):
    table = position.build(6, 8)
    if table is not None:
        redraw(table)
    bias, queries, keys = position.bias(6, table), torch.randint(0, 90, (2, 11)), torch.randint(0, 90, (2, 17))
    whole = bias(queries, keys)
    assert whole.shape == (2, 6, 11, 17)
    for rows in (slice(0, 4), slice(4, 11)):
        for columns in (slice(0, 9), slice(9, 17)):
            assert torch.equal(bias(queries[:, rows], keys[:, columns]), whole[..., rows, columns])


# No positions


@pytest.mark.concept("T02.06", part="nn/attention.py")
def test_without_positions_both_directions_see_a_set_and_one_direction_an_order():
    x, order = tokens(1, 10), torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    both, causal = tiny(with_position(None, causal=False)), tiny(with_position(None))
    torch.testing.assert_close(both(x[:, order]).logits, both(x).logits[:, order], rtol=0, atol=1e-5)
    assert (causal(x[:, order]).logits - causal(x).logits[:, order]).abs().max() > 0.1


def position_probe(*, causal: bool, rows: int = 1000, count: int = 9) -> float:
    """How often a linear discriminant of the last hidden state names a token's position (1 to 8), in rows that it has not seen.
    Every row begins with one special token; the others differ little, so that it is not content that is read."""
    model, x = tiny(with_position(None, causal=causal, layers=4)), tokens(rows, count, vocab=60) + 1
    x[:, 0] = 0
    with torch.no_grad():
        model.embed.weight[1:] = draw(24, seed=3) + 0.2 * model.embed.weight[1:]
        hidden = model(x, keep="none").hidden[:, 1:].double()
    seen, unseen = hidden.split((3 * rows // 4, rows // 4))
    means = seen.mean(0)
    spread = (seen - means).flatten(0, 1)
    directions = torch.linalg.solve(spread.T @ spread / len(spread) + 1e-6 * torch.eye(24), means.T.double())
    scores = unseen @ directions - 0.5 * (means * directions.T).sum(-1)
    return (scores.argmax(-1) == torch.arange(count - 1)).double().mean().item()


@pytest.mark.concept("T02.06", part="nn/attention.py")
def test_a_probe_reads_positions_off_a_causal_model_without_positions():
    assert position_probe(causal=True) > 0.9
    assert position_probe(causal=False) < 0.2  # one in eight is chance
