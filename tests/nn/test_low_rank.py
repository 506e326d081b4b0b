"""Low-rank attention: exact at full rank, what the paper says below it, and how the work grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.nn.test_patterns import Largest
from tests.tiny import redraw, segments_of
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.nn.attention import Attention, Mixer, use_backend
from trivium.nn.inputs import Inputs
from trivium.nn.low_rank import LowRank
from trivium.nn.positions import Rope
from trivium.nn.step import Step

DIM = 20
SHAPE: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 6, "position": Rope(base=50.0)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(mixer: Any, x: torch.Tensor, *, causal: bool, segments: torch.Tensor | None = None) -> torch.Tensor:
    step = Step.begin(Inputs(torch.zeros(x.shape[:2], dtype=torch.int64), segments=segments), causal=causal)
    return mixer(x, step, step.handle(0))


@pytest.mark.concept("X.08", part="nn/low_rank.py")
@pytest.mark.parametrize(
    ("causal", "size", "length", "blocks"), [(False, 24, 24, 0), (False, 8, 24, 1), (True, 24, 17, 1), (True, 6, 27, 4)]
)
def test_full_rank_with_the_identity_is_exact(causal, size, length, blocks):
    """Outputs and gradients are those of attention; the identity is where full rank starts."""
    full = redraw(Attention(**SHAPE).build(DIM))
    mixer = LowRank(**SHAPE, size=size, rank=size, blocks=blocks).build(DIM)
    for length_map in mixer.maps.values():
        length_map.reset()
        assert torch.equal(length_map.weight, torch.eye(size))
    assert not mixer.load_state_dict(full.state_dict(), strict=False).unexpected_keys
    x, grad, results = draw(2, length, DIM), draw(2, length, DIM, seed=1), []
    for built in (full, mixer):
        own = x.clone().requires_grad_()
        out = run(built, own, causal=causal)
        out.backward(grad)
        results.append([out, own.grad, *(built.get_parameter(name).grad for name, _ in full.named_parameters())])
    for index, (mine, exact) in enumerate(zip(results[1], results[0], strict=True)):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-4 if index else 1e-5)


@pytest.mark.concept("X.08", part="nn/low_rank.py")
@pytest.mark.parametrize("one_map", [False, True])
def test_it_is_what_the_paper_says(one_map):
    """softmax(q (E k)^T / sqrt(d)) F v, for documents of several lengths in a batch."""
    size, rank, rows = 16, 5, [[16], [9, 7], [-3, 13]]
    mixer = redraw(LowRank(heads=4, kv_heads=2, head_dim=6, size=size, rank=rank, one_map=one_map).build(DIM))
    x, segments = draw(3, size, DIM), segments_of(rows, size)
    out = run(mixer, x, causal=False, segments=segments)
    maps = [mixer.maps[name].weight for name in ("kk" if one_map else "kv")]
    for row in range(3):
        for name in set(segments[row].tolist()) - {-1}:
            at = (segments[row] == name).nonzero()[:, 0]
            q, k, v = (
                torch.nn.functional.linear(x[row, at], m.weight).view(len(at), -1, 6) for m in (mixer.inp.q, mixer.inp.k, mixer.inp.v)
            )
            keys, values = (
                torch.einsum("rl,lkd->rkd", m[:, : len(at)], y).repeat_interleave(2, 1) for m, y in zip(maps, (k, v), strict=True)
            )
            weights = torch.softmax(torch.einsum("lhd,rhd->hlr", q, keys) * 6**-0.5, -1)
            expected = torch.einsum("hlr,rhd->lhd", weights, values).flatten(1) @ mixer.out.weight.T
            torch.testing.assert_close(out[row, at], expected, rtol=0, atol=1e-5)


@pytest.mark.concept("X.08", part="nn/low_rank.py")
@pytest.mark.parametrize("causal", [False, True])
def test_flops_and_memory_grow_with_the_length(causal):
    """At one rank; dense attention's grow with its square. Not causal, the map grows with the longest document, too."""
    lengths = [256, 512, 1024]

    def cost(kind: str, count: int) -> tuple[float, float]:
        dense = Attention(heads=2, kv_heads=2, head_dim=4)
        low = LowRank(heads=2, kv_heads=2, head_dim=4, size=32 if causal else count, rank=16, blocks=2)
        built = redraw((low if kind == "low" else dense).build(8))
        use_backend(built, "eager")
        x = draw(1, count, 8)
        with FlopCounterMode(display=False) as mode:
            run(built, x, causal=causal).sum().backward()
        with Largest() as watch:
            run(built, x, causal=causal).sum().backward()
        return mode.get_total_flops(), watch.elements

    slopes = {kind: np.polyfit(np.log(lengths), np.log([cost(kind, count) for count in lengths]), 1)[0] for kind in ("low", "dense")}
    assert abs(slopes["low"][0] - 1) < 0.05 and slopes["low"][1] < 1.05  # causal, segments are computed one after the other
    assert slopes["dense"].min() > 1.7


@pytest.mark.concept("X.08", part="nn/low_rank.py")
def test_error_falls_with_the_rank():
    """Against exact attention, with maps that start as means of stretches: fewer keys, larger error, none at full rank."""
    full = redraw(Attention(**SHAPE).build(DIM))
    x = draw(2, 32, DIM).cumsum(1) * 0.2  # neighbors are alike, as in text
    exact, errors = run(full, x, causal=False), []
    for rank in (2, 8, 16, 32):
        mixer = LowRank(**SHAPE, size=32, rank=rank).build(DIM)
        for length_map in mixer.maps.values():
            length_map.reset()
        mixer.load_state_dict(full.state_dict(), strict=False)
        errors.append((run(mixer, x, causal=False) - exact).square().mean().sqrt().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < errors[-2]


def test_what_it_cannot_do_is_an_error():
    with pytest.raises(ConfigError, match="rank"):
        validate(Mixer, {"kind": "low_rank", "heads": 2, "kv_heads": 1, "head_dim": 4, "size": 4, "rank": 5})
