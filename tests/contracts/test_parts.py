"""What every registered part of a model must keep, whatever it does. A part is picked up by being registered."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
import torch

from tests.tiny import VOCAB, ask, host, parts, segments_of, tiny, tokens
from trivium.adapt.lora import LoRA, initialize_adapter
from trivium.adapt.passes import Pass, apply_passes
from trivium.core.errors import ConfigError
from trivium.core.seed import generator
from trivium.core.spec import Part, exemptions, validate
from trivium.models.transformer import Transformer, build, initialize
from trivium.nn.attention import Mixer, use_backend
from trivium.nn.backends import backends
from trivium.nn.heads import Head
from trivium.nn.patterns import Pattern
from trivium.nn.positions import Position

PARTS = parts()
every_part = pytest.mark.parametrize("part", [part for _, part in PARTS], ids=[name for name, _ in PARTS])
LENGTHS = [[5, 3, 4], [-2, 6, 1], [11, -1], [12]]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    deviation = max(expected.std().item(), 1e-3) if expected.unique().numel() > 1 else 1.0
    torch.testing.assert_close(actual / deviation, expected / deviation, rtol=0, atol=tolerance)


def must(part: Part, contract: str) -> None:
    """Skip where the part declares that it does not keep this contract."""
    if reason := part.exempt.get(contract):
        pytest.skip(reason)


@every_part
def test_shapes_and_spread(part):
    model = tiny(host(part))
    output = model(ask(part, tokens(2, 9)))
    assert output.hidden.shape == (2, 9, 24)
    assert output.logits.shape == (2, 9, VOCAB) or (isinstance(part, Head) and output.logits.shape[:2] == (2, 9))
    assert output.logits.std() > 0.1, "too flat a model proves nothing"


@every_part
def test_the_spec_is_its_json(part):
    spec = host(part)
    again = validate(Transformer, json.loads(spec.canonical()))
    assert again == spec and again.digest() == spec.digest()
    assert validate(Transformer, spec.to_dict(defaults=True)).digest() == spec.digest()


@every_part
def test_nothing_leaks_from_the_future(part):
    model = tiny(host(part))
    a = tokens(2, 10)
    b = a.clone()
    b[:, 6:] = tokens(2, 4, seed=1)
    assert torch.equal(model(ask(part, a)).logits[:, :6], model(ask(part, b)).logits[:, :6])


@every_part
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 4, 3), (7, 1, 1, 3)], ids=str)
def test_cached_steps_equal_the_full_forward(part, chunks):
    must(part, "cache")
    model, x = tiny(host(part)), tokens(2, 12)
    cache = model.cache(rows=2, capacity=12)
    with torch.inference_mode():
        pieces = [model(ask(part, piece, cache=cache)).logits for piece in x.split(chunks, dim=1)]
        close(torch.cat(pieces, 1), model(ask(part, x)).logits)
    assert cache.lengths == [12, 12]


@every_part
def test_cached_rows_of_different_lengths(part):
    must(part, "cache")
    model, x, y = tiny(host(part)), tokens(4, 9), tokens(4, 3, seed=5)
    lengths = [9, 1, 4, 7]
    segments = segments_of([[n] for n in lengths], 9)
    cache = model.cache(rows=4, capacity=14)
    with torch.inference_mode():
        model(ask(part, x, segments=segments, cache=cache))
        assert cache.lengths == lengths
        steps = torch.cat([model(ask(part, y[:, t : t + 1], cache=cache)).logits for t in range(3)], 1)
        for row, n in enumerate(lengths):
            close(steps[row], model(ask(part, torch.cat([x[row, :n], y[row]])[None])).logits[0, n:])


@every_part
def test_rollback_fork_and_reorder(part):
    must(part, "cache")
    model, x, y = tiny(host(part)), tokens(3, 8), tokens(3, 4, seed=7)
    cache = model.cache(rows=3, capacity=16, rollback=4)
    with torch.inference_mode():
        model(ask(part, x, cache=cache))
        mark, fork = cache.snapshot(), cache.fork()
        first = model(ask(part, y, cache=cache)).logits
        cache.drop_last(4)
        close(model(ask(part, y, cache=cache)).logits, first)
        cache.restore(mark)
        close(model(ask(part, y, cache=cache)).logits, first)
        cache.drop_last([0, 2, 4])
        assert cache.lengths == [12, 10, 8]
        ragged = model(ask(part, y[:, :1], cache=cache)).logits
        for row, n in enumerate([4, 2, 0]):
            full = torch.cat([x[row], y[row, :n], y[row, :1]])[None]
            close(ragged[row, -1], model(ask(part, full)).logits[0, -1])
        cache.reorder([2, 2, 0])
        again = model(ask(part, y[[2, 2, 0], :1], cache=cache)).logits
        close(again[:2], model(ask(part, torch.cat([x[2], y[2, :1], y[2, :1]])[None])).logits[0, -1].expand(again[:2].shape))
        close(again[2, 0], model(ask(part, torch.cat([x[0], y[0], y[0, :1], y[0, :1]])[None])).logits[0, -1])
        close(model(ask(part, y, cache=fork)).logits, first)


@every_part
def test_padding_packing_and_batch_mates_change_nothing(part):
    must(part, "packing")
    model, x = tiny(host(part)), tokens(4, 12)
    segments = segments_of(LENGTHS, 12)
    together = model(ask(part, x, segments=segments)).logits
    assert together.isfinite().all()
    for row in range(4):
        for document in range(int(segments[row].max()) + 1):
            at = (segments[row] == document).nonzero()[:, 0]
            if len(at):
                close(together[row, at], model(ask(part, x[row, at][None])).logits[0])


@every_part
@pytest.mark.parametrize("causal", [True, False])
def test_packed_gradients_equal_those_of_each_document_alone(part, causal):
    must(part, "packing")
    model, x = tiny(host(part, causal=causal)), tokens(4, 12)
    segments = segments_of(LENGTHS, 12)
    logits = model(ask(part, x, segments=segments)).logits
    weight = torch.randn(logits.shape, generator=generator(0, "weight")) * (segments >= 0).view(4, 12, *(1,) * (logits.dim() - 2))
    (logits * weight).sum().backward()
    trained = {  # an indexer learns from a term of its own alone
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad and ".indexer." not in name
    }
    packed = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()
    for row in range(4):
        for document in segments[row].unique().tolist():
            at = (segments[row] == document).nonzero()[:, 0]
            if document >= 0:
                (model(ask(part, x[row, at][None])).logits[0] * weight[row, at]).sum().backward()
    for name, parameter in trained.items():
        assert parameter.grad.isfinite().all()
        close(packed[name], parameter.grad, 1e-4)


@every_part
def test_keep_selects_the_same_logits(part):
    model, x = tiny(host(part)), tokens(3, 7)
    segments = segments_of([[7], [4], [2, 3]], 7)
    full = model(ask(part, x, segments=segments))
    last = model(ask(part, x, segments=segments), keep="last")
    close(last.logits, full.logits[[0, 1, 2], [6, 3, 4]])
    selector = segments == 0
    close(model(ask(part, x, segments=segments), keep=selector).logits, full.logits[selector])
    assert model(ask(part, x, segments=segments), keep="none").logits is None
    assert torch.equal(last.hidden, full.hidden)


@every_part
def test_every_backend_gives_the_same(part):
    model, x = tiny(host(part)), tokens(4, 12)
    segments = segments_of(LENGTHS, 12)
    for inputs in (ask(part, x), ask(part, x, segments=segments)):
        use_backend(model, "eager")
        expected = model(inputs).logits[segments >= 0]
        done = set()
        names = backends.names() if isinstance(part, (Mixer, Position, Pattern)) else ["auto"]
        for name in names:
            use_backend(model, name)
            with suppress(ConfigError):  # a backend may refuse what it cannot do
                close(model(inputs).logits[segments >= 0], expected)
                done.add(name)
        assert done >= {"native", "auto"} & set(names)


@every_part
def test_build_draws_nothing_and_leaves_nothing_on_meta(part):
    spec = host(part)
    meta = build(spec)
    assert {p.device.type for p in meta.parameters()} <= {"meta"} and not list(meta.buffers())
    model = initialize(build(spec, device="cpu"), seed=3)
    again = initialize(build(spec, device="cpu"), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model(ask(part, tokens(1, 4))).logits.isfinite().all()
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in model.parameters())


@every_part
def test_passes_replay(part):
    """An adapted model, rebuilt on meta from its spec and passes and filled with its tensors, is the same model."""
    model = tiny(host(part))
    plain = model(ask(part, tokens(1, 6))).logits
    LoRA(rank=2).apply(model)
    initialize_adapter(model, seed=1)
    close(model(ask(part, tokens(1, 6))).logits, plain, 1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    replayed = [validate(Pass, json.loads(step.canonical())) for step in model.passes]
    twin = apply_passes(build(host(part)), replayed)
    missing = twin.load_state_dict(model.state_dict(), assign=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(twin.eval()(ask(part, tokens(1, 6))).logits, model(ask(part, tokens(1, 6))).logits)
    assert not torch.equal(plain, model(ask(part, tokens(1, 6))).logits)


def test_what_is_not_kept_is_declared():
    """The one table of exemptions, over all parts as they are tried here."""
    table = {(name, contract) for name, part in PARTS for _, contract, _ in exemptions(host(part))}
    assert table == {
        ("ffn-moe-capacity", "cache"), ("ffn-moe-capacity", "packing"), ("ffn-moe-capacity", "flops"),
        ("mixer-cross-latest", "packing"), ("rope scaling-dynamic", "cache"), ("rope scaling-longrope", "cache"),
    }  # fmt: skip


def test_every_registered_part_is_here():
    names = [name for name, _ in PARTS]
    assert {"mixer-attention", "ffn-mlp", "norm-rms", "position-rope", "pattern-window", "head-lm"} <= set(names)
    assert len(names) == len(set(names))
