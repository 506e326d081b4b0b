"""The gated attention unit: both forms against their naive statements, causality, decoding, and what they cost."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.models.test_count import counter
from tests.nn.test_linear_attention import apart, draw, grads, kept
from tests.tiny import host, redraw, segments_of, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.models import count
from trivium.nn import gated_unit
from trivium.nn.gated_unit import GatedUnit, naive
from trivium.nn.inputs import Inputs, Prefix
from trivium.nn.positions import Rope
from trivium.nn.step import Step
from trivium.nn.store import Handle

MIXED = GatedUnit(inner=20, key_dim=8, span=16, position=Rope(base=50.0))
QUADRATIC = MIXED.replace(form="quadratic")


def parts(length: int, *, span: int = 8) -> list[torch.Tensor]:
    """Queries, keys, the linear part's, and values; products are of the size of the span that they are divided by."""
    widths = {"q": 8, "k": 8, "linear_q": 8, "linear_k": 8, "v": 5}
    return [(draw(2, length, width, seed=name) * (1 if name == "v" else span**0.5)).requires_grad_() for name, width in widths.items()]


def decoded(inputs: list[torch.Tensor], sizes: list[int], span: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    states, outputs = None, []
    for piece in zip(*(x.split(sizes, 1) for x in inputs), strict=True):
        y, states = gated_unit._scan(piece, states, span=span)
        outputs.append(y)
    return torch.cat(outputs, 1), states


@pytest.mark.concept("X.07", part="nn/gated_unit.py")
@pytest.mark.parametrize("span", [1, 4, 16, 100])
@pytest.mark.parametrize("length", [1, 4, 15, 16, 17, 50])
def test_chunks_equal_the_naive_pairs(length, span):
    inputs = parts(length, span=span)
    expected = naive(*inputs, span=span)
    y, _ = gated_unit._scan(tuple(inputs), None, span=span)
    assert apart(y, expected) <= 1e-5
    assert 0.5 < expected.std() < 100
    for mine, theirs in zip(grads(y, inputs), grads(expected, inputs), strict=True):
        assert apart(mine, theirs) <= 1e-5


@pytest.mark.concept("X.07", part="nn/gated_unit.py")
@pytest.mark.parametrize("sizes", [[1] * 40, [16, 16, 8], [3, 1, 1, 20, 15], [33, 1, 6], [7, 33]], ids=str)
def test_any_steps_give_the_same(sizes):
    inputs = [x.detach() for x in parts(40)]
    y, states = decoded(inputs, sizes, 8)
    assert apart(y, naive(*inputs, span=8)) <= 1e-5
    for mine, whole in zip(states, decoded(inputs, [40], 8)[1], strict=True):
        assert apart(mine, whole) <= 1e-5


def test_rows_may_stand_at_different_places_of_their_chunks():
    inputs = [x.detach() for x in parts(40)]
    at = (5, 22)
    states = [decoded([x[row : row + 1, : at[row]] for x in inputs], [at[row]], 8)[1] for row in (0, 1)]
    together = tuple(torch.cat(pair) for pair in zip(*states, strict=True))
    for length in (1, 13):
        pieces = tuple(torch.stack([x[row, at[row] : at[row] + length] for row in (0, 1)]) for x in inputs)
        y, _ = gated_unit._scan(pieces, together, span=8)
        for row in (0, 1):
            assert apart(y[row], naive(*inputs, span=8)[row, at[row] : at[row] + length]) <= 1e-5


def formula(mixer: gated_unit.Unit, x: torch.Tensor, attend) -> torch.Tensor:
    """u * A v from the maps' weights; no positions."""
    u, v, z = (torch.nn.functional.silu(x @ m.weight.T) for m in mixer.inp.children())
    copies = [z * scale + shift for scale, shift in zip(mixer.copy.weight, mixer.copy.bias, strict=True)]
    return (u * attend(*copies, v)) @ mixer.out.weight.T


def whole(q, k, v, *, causal: bool) -> torch.Tensor:
    weights = (q @ k.mT / 16).relu() ** 2
    return (weights.tril() if causal else weights) @ v


def both_ways(q, k, linear_q, linear_k, v) -> torch.Tensor:
    chunk = torch.arange(37) // 16
    near = (q @ k.mT / 16).relu() ** 2 * (chunk[:, None] == chunk)
    return (near + linear_q @ linear_k.mT / 37) @ v


@pytest.mark.concept("X.07", part="nn/gated_unit.py")
@pytest.mark.parametrize(
    ("spec", "causal", "attend"),
    [
        (MIXED, True, partial(naive, span=16)),
        (MIXED, False, both_ways),
        (QUADRATIC, True, partial(whole, causal=True)),
        (QUADRATIC, False, partial(whole, causal=False)),
    ],
    ids=["mixed-causal", "mixed", "quadratic-causal", "quadratic"],
)
def test_the_unit_against_the_formula(spec, causal, attend):
    mixer, x = redraw(spec.replace(position=None).build(24), std=0.6), draw(2, 37, 24)
    y = mixer(x, Step.begin(Inputs(embeds=x), causal=causal), Handle())
    assert apart(y, formula(mixer, x, attend)) <= 1e-5
    assert y.std() > 0.05


@pytest.mark.concept("X.07", part="nn/gated_unit.py")
@pytest.mark.parametrize("spec", [MIXED, QUADRATIC], ids=["mixed", "quadratic"])
def test_the_future_does_not_show(spec):
    model, a = tiny(host(spec)), tokens(2, 60)
    b = a.clone()
    b[:, 37:] = tokens(2, 23, seed=1)
    assert torch.equal(model(a).logits[:, :37], model(b).logits[:, :37])
    assert not torch.equal(model(a).logits[:, 37:], model(b).logits[:, 37:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", [MIXED, QUADRATIC], ids=["mixed", "quadratic"])
def test_products_over_many_chunks(spec, causal):
    model = tiny(host(spec, causal=causal))
    segments = segments_of([[150], [80, 70]], 150)
    with counter() as mode:
        out = model(Inputs(tokens(2, 150), segments=segments)).logits
    forward = mode.get_total_flops()
    with counter() as mode:
        out.square().sum().backward()
    found = count.flops(model, segments, kept=300)
    assert found.forward == pytest.approx(forward, rel=1e-3) and found.backward == pytest.approx(mode.get_total_flops(), rel=1e-3)


@pytest.mark.concept("X.07", part="nn/gated_unit.py")
def test_the_mixed_form_is_linear_and_its_state_has_one_size():
    def forward(spec: GatedUnit, length: int) -> int:
        return count.flops(tiny(host(spec)), torch.zeros(1, length, dtype=torch.int64), kept=length).forward

    assert forward(MIXED, 8192) == pytest.approx(8 * forward(MIXED, 1024), rel=0.02)
    assert forward(QUADRATIC, 8192) > 30 * forward(QUADRATIC, 1024)
    assert kept(MIXED, 1024) < 2.05 * kept(MIXED, 512) and kept(QUADRATIC, 1024) > 3 * kept(QUADRATIC, 512)
    model = tiny(host(MIXED))
    assert model.cache(rows=1, capacity=8).bytes == model.cache(rows=1, capacity=8000).bytes
    cache = model.cache(rows=1, capacity=40)
    with torch.no_grad():
        model(Inputs(tokens(1, 21), cache=cache))
        with counter() as mode:
            model(Inputs(tokens(1, 1), cache=cache))
    assert count.decoding_flops(model, held=21) == mode.get_total_flops()


def test_masks():
    """A prefix sees itself in the quadratic form; the mixed form has no words for it."""
    x = tokens(2, 20)
    full, prefixed = (Inputs(x, mask=mask) for mask in ("full", Prefix(torch.tensor([20, 20]))))
    model = tiny(host(QUADRATIC))
    assert apart(model(prefixed).logits, model(full).logits) <= 1e-5
    with pytest.raises(ConfigError, match="left to right"):
        tiny(host(MIXED))(prefixed)
