"""A compressed past: segments against what the papers say token by token, and state that does not grow."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import redraw, segments_of
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.models import count
from trivium.models.block import Block
from trivium.models.model import Model, with_kind
from trivium.models.recurrent_memory import RecurrentMemory
from trivium.models.transformer import Transformer, build
from trivium.nn.attention import Attention, Mixer, use_backend
from trivium.nn.inputs import Inputs
from trivium.nn.memory import Compressive
from trivium.nn.memory_infini import Infini
from trivium.nn.patterns import Chunk, Window
from trivium.nn.positions import Rope
from trivium.nn.positions_absolute import Learned
from trivium.nn.step import Step

DIM, HEADS, KV, WIDTH = 20, 4, 2, 6
SHAPE: dict[str, Any] = {"heads": HEADS, "kv_heads": KV, "head_dim": WIDTH}
ROPE = Rope(base=50.0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def model_of(mixer: Mixer, *, layers: int = 2) -> Any:
    return redraw(build(Transformer(dim=DIM, vocab=31, layers=("a",) * layers, blocks={"a": Block(mixer=mixer)}), device="cpu")).eval()


def mixed(mixer: Mixer, x: torch.Tensor, *, like: Any = None) -> tuple[torch.Tensor, Any]:
    """What the mixer makes of x [B, T, C], and the mixer, with the parameters of `like` if given."""
    built = redraw(mixer.build(DIM))
    if like is not None:
        built.load_state_dict(like.state_dict())
    step = Step.begin(Inputs(torch.zeros(x.shape[:2], dtype=torch.int64)), causal=True)
    return built(x, step, step.handle(0)), built


def heads_of(built: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """q, k, v [T, heads, D] of one row."""
    return [F.linear(x[0], linear.weight).view(len(x[0]), -1, WIDTH) for linear in (built.inp.q, built.inp.k, built.inp.v)]


def softmax_read(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """One query [H, D] over keys and values [K, D] -> [H, D]."""
    k, v = (torch.stack(x).repeat_interleave(HEADS // KV, 1) for x in (keys, values))
    return torch.einsum("sh,shd->hd", torch.softmax(torch.einsum("hd,shd->sh", q, k) * WIDTH**-0.5, 0), v)


@pytest.mark.concept("T13.07", part="nn/memory.py")
@pytest.mark.parametrize("size", [3, 8])
def test_segment_recurrence_equals_full_attention_where_memory_covers_all(size):
    """Transformer-XL's, outputs and gradients; as a mixer that carries keys and values on, and as a pattern."""
    x, grad = draw(2, 29, DIM), draw(2, 29, DIM, seed=1)
    expected, full = mixed(Attention(**SHAPE, position=ROPE), x)
    recurrent = [
        mixed(Compressive(**SHAPE, position=ROPE, size=size, memory=40, through=True), x, like=full),
        mixed(Attention(**SHAPE, position=ROPE, pattern=Chunk(size=size, before=40)), x, like=full),
    ]
    expected.backward(grad)
    for out, built in recurrent:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        out.backward(grad)
        for mine, theirs in zip(built.parameters(), full.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-4)
    short, _ = mixed(Compressive(**SHAPE, position=ROPE, size=size, memory=size), x, like=full)
    assert (short - expected).abs().max() > 1e-2
    chunked, _ = mixed(Attention(**SHAPE, position=ROPE, pattern=Chunk(size=size, before=size)), x, like=full)
    torch.testing.assert_close(short, chunked, rtol=0, atol=1e-5)


@pytest.mark.concept("T13.07", part="nn/memory.py")
def test_gradients_stop_at_the_segment_unless_told_otherwise():
    for through in (False, True):
        x = draw(1, 12, DIM).requires_grad_()
        out, _ = mixed(Compressive(**SHAPE, size=4, memory=4, through=through), x)
        (grad,) = torch.autograd.grad(out[0, 9].sum(), x)
        seen = (grad[0].abs().amax(-1) > 0).nonzero()[:, 0].tolist()
        assert seen == list(range(4 if through else 8, 10))


@pytest.mark.concept("T13.07", part="nn/memory.py")
@pytest.mark.parametrize("pool", ["mean", "max", "conv"])
def test_compressed_memory_is_what_the_paper_says(pool):
    """Token by token: the segment so far, the tokens before it, and pooled ones before those, the oldest forgotten."""
    size, memory, kept, rate, length = 4, 6, 3, 2, 37
    x = draw(1, length, DIM)
    out, built = mixed(Compressive(**SHAPE, size=size, memory=memory, compressed=kept, rate=rate, pool=pool), x)
    q, k, v = heads_of(built, x)

    def packed(line: list[torch.Tensor], name: str) -> torch.Tensor:
        stacked = torch.stack(line)  # [rate, K, D]
        if pool == "conv":
            return (stacked * built.pool[name].weight).sum(0)
        return stacked.mean(0) if pool == "mean" else stacked.amax(0)

    recent: list[tuple[torch.Tensor, torch.Tensor]] = []
    old: list[tuple[torch.Tensor, torch.Tensor]] = []
    rows = []
    for start in range(0, length, size):
        for t in range(start, min(start + size, length)):
            pairs = [*old, *recent, *((k[s], v[s]) for s in range(start, t + 1))]
            rows.append(softmax_read(q[t], [a for a, _ in pairs], [b for _, b in pairs]))
        recent += [(k[s], v[s]) for s in range(start, min(start + size, length))]
        while len(recent) > memory:
            leaving, recent = recent[:rate], recent[rate:]
            old.append((packed([a for a, _ in leaving], "k"), packed([b for _, b in leaving], "v")))
        old = old[-kept:]
    torch.testing.assert_close(out[0], F.linear(torch.stack(rows).flatten(1), built.out.weight), rtol=0, atol=1e-5)
    assert len(old) == kept


@pytest.mark.concept("T13.07", part="nn/memory_infini.py")
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_infini_attention_is_what_the_paper_says(update):
    """Its equations, segment by segment: retrieval before update, one gate a head."""
    size, length = 5, 23
    x = draw(1, length, DIM)
    out, built = mixed(Infini(**SHAPE, size=size, update=update), x)
    q, k, v = heads_of(built, x)
    share = built.gate.weight.sigmoid()[:, None]
    total, norm = torch.zeros(KV, WIDTH, WIDTH), torch.zeros(KV, WIDTH)
    rows = []
    for start in range(0, length, size):
        end = min(start + size, length)
        for t in range(start, end):
            local = softmax_read(q[t], list(k[start : t + 1]), list(v[start : t + 1]))
            far = torch.zeros(HEADS, WIDTH)
            for head in range(HEADS if start else 0):
                sigma, group = F.elu(q[t, head]) + 1, head // (HEADS // KV)
                far[head] = sigma @ total[group] / (sigma @ norm[group])
            rows.append(share * far + (1 - share) * local)
        before, weight = total.clone(), norm.clone()
        for s in range(start, end):
            for head in range(KV):
                sigma = F.elu(k[s, head]) + 1
                known = sigma @ before[head] / (sigma @ weight[head]) if update == "delta" and start else 0.0
                total[head] += torch.outer(sigma, v[s, head] - known)
                norm[head] += sigma
    torch.testing.assert_close(out[0], F.linear(torch.stack(rows).flatten(1), built.out.weight), rtol=0, atol=1e-5)


MEMORIES: dict[str, Mixer] = {
    "xl": Compressive(**SHAPE, position=ROPE, size=4, memory=8),
    "compressive": Compressive(**SHAPE, position=ROPE, size=4, memory=4, compressed=3, rate=4, pool="conv"),
    "infini": Infini(**SHAPE, position=ROPE, size=4),
    "chunk": Attention(**SHAPE, position=ROPE, pattern=Chunk(size=4, before=8)),
}


@pytest.mark.concept("T13.07", part="nn/memory.py")
@pytest.mark.parametrize("mixer", MEMORIES.values(), ids=MEMORIES)
def test_state_is_the_same_for_10_and_1000_segments(mixer):
    model = model_of(mixer, layers=1)
    cache = model.cache(rows=1, capacity=10**9)
    size, x = cache.bytes, torch.randint(0, 31, (1, 4000), generator=torch.Generator().manual_seed(0))
    found = []
    with torch.inference_mode():
        for piece in x.split((40, 360, 3600 - 3, 3), 1):
            found.append((model(Inputs(piece, cache=cache)).logits, cache.bytes))
        again = model(Inputs(x[:, :40])).logits
    assert {held for _, held in found} == {size}
    torch.testing.assert_close(found[0][0], again, rtol=0, atol=1e-5)
    assert count.cache_bytes(model) == [0] and size == count.state_bytes(model)[0]
    assert found[-1][0].isfinite().all() and cache.lengths == [4000]


@pytest.mark.parametrize("held", [3, 4, 15, 30])
@pytest.mark.parametrize("name", MEMORIES)
def test_decoding_takes_the_products_that_are_counted(name, held):
    model = model_of(MEMORIES[name])
    use_backend(model, "eager")
    cache = model.cache(rows=1, capacity=40)
    with torch.no_grad():
        model(Inputs(torch.zeros(1, held, dtype=torch.int64), cache=cache))
        with FlopCounterMode(display=False) as mode:
            model(Inputs(torch.zeros(1, 1, dtype=torch.int64), cache=cache))
    assert count.decoding_flops(model, held=held) == mode.get_total_flops()


@pytest.mark.parametrize("name", ["compressive", "infini"])
def test_rows_that_have_come_differently_far(name):
    """A cache whose rows stand at other places of their segments, fed on by pieces of other lengths."""
    model = model_of(MEMORIES[name])
    lengths, more = [13, 2, 8, 21], [5, 9, 1, 3]
    x = torch.randint(0, 31, (4, 40), generator=torch.Generator().manual_seed(1))
    cache = model.cache(rows=4, capacity=60)
    with torch.inference_mode():
        model(Inputs(x[:, :21], segments=segments_of([[n] for n in lengths], 21), cache=cache))
        given = torch.stack([F.pad(x[row, n : n + new], (0, 9 - new)) for row, (n, new) in enumerate(zip(lengths, more, strict=True))])
        out = model(Inputs(given, segments=segments_of([[n] for n in more], 9), cache=cache)).logits
        for row, (n, new) in enumerate(zip(lengths, more, strict=True)):
            expected = model(x[row, : n + new][None]).logits[0, n:]
            torch.testing.assert_close(out[row, :new], expected, rtol=0, atol=1e-4)


def recurrent(*, horizon: int | None = None, size: int = 5, learned: bool = False) -> Any:
    block = Block(mixer=Attention(**SHAPE, position=None if learned else ROPE))
    embed = {"kind": "tokens", "scale": 2.0, "positions": Learned(size=16) if learned else None}
    body = Transformer(dim=DIM, vocab=31, layers=("a", "a"), blocks={"a": block}, embed=embed)
    spec = RecurrentMemory(body=body, memory=3, size=size, horizon=horizon)
    assert validate(Model, with_kind(json.loads(spec.canonical()))) == spec
    return redraw(build(spec, device="cpu")).eval()


@pytest.mark.concept("T13.07", part="models/recurrent_memory.py")
@pytest.mark.parametrize("learned", [False, True])
def test_recurrent_memory_is_what_the_paper_says(learned):
    """[memory, segment, memory] through the body by hand; what the last places become goes before the next segment."""
    model = recurrent(learned=learned)
    x = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(0))
    output = model(x)
    memory, logits = model.memory.weight.expand(2, -1, -1), []
    for piece in x.split(5, 1):
        given = torch.cat([memory, 2.0 * model.body.embed.weight[piece], memory], 1)
        out = model.body(Inputs(embeds=given))
        logits.append(out.logits[:, 3:-3])
        memory = out.hidden[:, -3:]
    torch.testing.assert_close(output.logits, torch.cat(logits, 1))
    assert output.hidden.shape == (2, 13, DIM)
    torch.testing.assert_close(model(x, keep="last").logits, output.logits[:, -1])
    chosen = torch.rand(2, 13, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(model(x, keep=chosen).logits, output.logits[chosen])


@pytest.mark.concept("T13.07", part="models/recurrent_memory.py")
def test_memory_is_all_that_passes_from_segment_to_segment():
    """Its size is that of 10 and of 1000 segments; without it nothing passes; the future never does; gradients pass as far as told."""
    model = recurrent(size=2)
    x = torch.randint(0, 31, (1, 2000), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        memory, sizes = model.start(1), set()
        for number, piece in enumerate(x.split(2, 1)):
            _, memory = model.read(Inputs(piece), memory)
            if number + 1 in (10, 1000):
                sizes.add(memory.numel() * memory.element_size())
        assert sizes == {3 * DIM * 4} and memory.isfinite().all()
    for horizon in (None, 1, 2):
        model = recurrent(horizon=horizon)
        embeds = draw(1, 20, DIM).requires_grad_()
        logits = model(Inputs(embeds=embeds)).logits
        (grad,) = torch.autograd.grad(logits[0, 17].sum(), embeds)
        seen = (grad[0].abs().amax(-1) > 0).nonzero()[:, 0].tolist()
        assert seen == list(range({None: 0, 1: 15, 2: 10}[horizon], 18))


def test_padding_changes_nothing_for_recurrent_memory():
    model = recurrent()
    x = torch.randint(0, 31, (3, 17), generator=torch.Generator().manual_seed(0))
    rows = [[17], [-3, 9, -5], [6, -11]]
    segments = segments_of(rows, 17)
    out = model(Inputs(x, segments=segments))
    for row, start in enumerate((0, 5, 0)):
        at = (segments[row] >= 0).nonzero()[:, 0]
        if row == 1:  # its text begins inside a segment: one that is shorter
            memory, logits = model.start(1), []
            for piece in (x[1:2, 3:5], x[1:2, 5:10], x[1:2, 10:12]):
                read, memory = model.read(Inputs(piece), memory)
                logits.append(read.logits[0])
            expected = torch.cat(logits)
        else:
            expected = model(x[row, at][None]).logits[0]
        torch.testing.assert_close(out.logits[row, at], expected, rtol=0, atol=1e-5), start


def test_what_recurrent_memory_cannot_do_is_an_error():
    model = recurrent()
    x = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ConfigError, match="no cache"):
        model.cache(1, 8)
    with pytest.raises(ConfigError, match="one document a row"):
        model(Inputs(x, segments=segments_of([[4, 4]], 8)))
    with pytest.raises(ConfigError, match="tokens and segments alone"):
        model(Inputs(x, mask="full"))
    with pytest.raises(ConfigError, match="causal"):
        validate(RecurrentMemory, {"body": model.spec.body.replace(causal=False), "memory": 1, "size": 4})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"memory": 5, "compressed": 2, "rate": 4}, "multiples of rate"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"position": {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}}}, "length"),
    ],
)
def test_specs_that_cannot_be(change, reason):
    spec = {"kind": "compressive", **SHAPE, "size": 4, "memory": 4}
    with pytest.raises(ConfigError, match=reason):
        validate(Mixer, {**spec, **change})


def test_a_window_of_the_segments_is_no_memory():
    """Nothing before a window reaches one layer; a compressed memory carries something of all of it."""
    for mixer, reaches in ((Attention(**SHAPE, pattern=Window(size=4)), False), (Infini(**SHAPE, size=4, through=True), True)):
        x = draw(1, 30, DIM).requires_grad_()
        out, _ = mixed(mixer, x)
        (grad,) = torch.autograd.grad(out[0, 29].sum(), x)
        assert bool((grad[0, 0].abs() > 0).any()) == reaches
