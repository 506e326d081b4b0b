"""The rolling cache: bytes that stay the same, and decoding that equals attention over everything with a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.nn.test_patterns import Largest
from tests.parity import hf
from tests.tiny import redraw, segments_of
from trivium.core.errors import TriviumError
from trivium.io import directory
from trivium.models import count
from trivium.models.block import Block
from trivium.models.transformer import Transformer, build
from trivium.nn.attention import Attention, use_backend
from trivium.nn.inputs import Inputs
from trivium.nn.keepers import PerToken
from trivium.nn.patterns import Chunk, Full, Pattern, Window
from trivium.nn.patterns_sparse import BlockSparse, Dilated, Longformer, SinkWindow
from trivium.nn.positions import Rope
from trivium.nn.ring import Rolling

PATTERNS: dict[str, Pattern] = {
    "window": Window(size=5),
    "window-of-one": Window(size=1),
    "chunk": Chunk(size=6, before=2),
    "dilated": Dilated(size=3, dilation=2),
    "longformer": Longformer(size=3, first=2),
    "sink_window": SinkWindow(size=4, first=2),
    "rebased": SinkWindow(size=4, first=2, rebase=True),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
VOCAB = 31


def model_of(*patterns: Pattern) -> Any:
    blocks = {
        f"b{i}": Block(mixer=Attention(heads=4, kv_heads=2, head_dim=6, position=Rope(base=50.0), pattern=pattern))
        for i, pattern in enumerate(patterns)
    }
    spec = Transformer(dim=20, vocab=VOCAB, layers=tuple(blocks) * 2, blocks=blocks)
    return redraw(build(spec, device="cpu")).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def close(mine: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5 * max(expected.std().item(), 1.0))


@pytest.mark.concept("T13.05", part="nn/ring.py")
@every_pattern
@pytest.mark.parametrize("chunks", [(1,) * 40, (23, 1, 1, 15), (3, 17, 2, 18)], ids=["one-by-one", "long-first", "long-later"])
@pytest.mark.parametrize("rollback", [0, 3])
def test_decoding_equals_masked_full_attention(pattern, chunks, rollback):
    """Far beyond the window; pieces longer than it too."""
    model, x = model_of(pattern), tokens(2, 40)
    cache = model.cache(rows=2, capacity=40, rollback=rollback)
    with torch.inference_mode():
        expected = model(x).logits
        out = torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split(chunks, 1)], 1)
    close(out, expected)
    assert cache.lengths == [40, 40] and cache.bytes < model_of(Full()).cache(rows=2, capacity=40).bytes


@pytest.mark.concept("T13.05", part="nn/ring.py")
@every_pattern
def test_rows_of_different_lengths_roll_each_at_its_own_pace(pattern):
    """A prompt padded on the right, single steps, a padded piece, single steps with a row that pauses."""
    model, lengths = model_of(pattern), [21, 1, 9, 15]
    cache = model.cache(rows=4, capacity=80)
    rows: list[torch.Tensor] = [tokens(n, seed=n) for n in lengths]

    def feed(pieces: list[torch.Tensor]) -> None:
        width = max(len(piece) for piece in pieces)
        given = torch.stack([torch.cat([piece, torch.zeros(width - len(piece), dtype=torch.int64)]) for piece in pieces])
        segments = segments_of([[len(piece)] if len(piece) else [] for piece in pieces], width)
        logits = model(Inputs(given, segments=segments, cache=cache)).logits
        for row, piece in enumerate(pieces):
            if len(piece):
                close(logits[row, : len(piece)], model(rows[row][None]).logits[0, -len(piece) :])

    def grow(*counts: int) -> None:
        new = [tokens(n, seed=100 + n + len(rows[row])) for row, n in enumerate(counts)]
        for row, piece in enumerate(new):
            rows[row] = torch.cat([rows[row], piece])
        feed(new)

    with torch.inference_mode():
        feed(rows)
        for _ in range(4):
            grow(1, 1, 1, 1)
        grow(2, 9, 0, 5)
        for step in range(8):
            grow(1, 1, step % 2, 1)
    assert cache.lengths == [len(row) for row in rows]


LONG: dict[str, Pattern] = {
    "window": Window(size=20),
    "chunk": Chunk(size=24, before=5),
    "longformer": Longformer(size=9, first=3),
    "sink_window": SinkWindow(size=20, first=3),
    "rebased": SinkWindow(size=20, first=3, rebase=True),
    "block_sparse": BlockSparse(size=16, local=2, first=1, random=1),
}


@pytest.mark.concept("T19.05", part="nn/blocked.py")
@pytest.mark.parametrize("pattern", LONG.values(), ids=LONG)
def test_later_pieces_of_a_long_prompt_are_computed_in_blocks(pattern):
    """As the whole prompt is: equal to dense with a mask, and nothing as large as new tokens times keys is made."""
    model, x, sizes = model_of(pattern), tokens(1, 700), (37, 1, 400, 200, 62)
    cache, made, out = model.cache(rows=1, capacity=700), [], []
    with torch.inference_mode():
        expected = model(x, weights=True).logits
        for piece in x.split(sizes, 1):
            with Largest() as watch:
                out.append(model(Inputs(piece, cache=cache)).logits)
            made.append(watch.elements)
    close(torch.cat(out, 1), expected)
    heads = 4
    assert made[2] < 0.7 * heads * 400 * 400


@every_pattern
def test_rollback_reorder_fork_and_snapshot_after_the_ring_has_turned(pattern):
    model, x, y = model_of(pattern), tokens(3, 30), tokens(3, 5, seed=1)
    cache = model.cache(rows=3, capacity=60, rollback=5)

    def expect(row: int, *pieces: torch.Tensor) -> torch.Tensor:
        return model(torch.cat(pieces)[None]).logits[0, -1]

    with torch.inference_mode():
        for piece in x.split(7, 1):
            model(Inputs(piece, cache=cache))
        mark, fork = cache.snapshot(), cache.fork()
        first = model(Inputs(y, cache=cache)).logits
        for at in range(5):
            cache.restore(mark) if at == 0 else cache.drop_last(5)
            close(
                torch.cat([model(Inputs(piece, cache=cache)).logits for piece in y.split((at + 1, 4 - at) if at < 4 else (5,), 1)], 1),
                first,
            )
        cache.drop_last([0, 2, 5])
        out = model(Inputs(y[:, :1], cache=cache)).logits[:, -1]
        for row, n in enumerate([5, 3, 0]):
            close(out[row], expect(row, x[row], y[row, :n], y[row, :1]))
        cache.reorder([2, 0, 0])
        out = model(Inputs(y[:, 3:], cache=cache)).logits[:, -1]
        close(out[0], expect(2, x[2], y[2, :1], y[0, 3:]))
        for row in (1, 2):
            close(out[row], expect(0, x[0], y[0], y[0, :1], y[row, 3:]))
        close(model(Inputs(y, cache=fork)).logits, first)
        with pytest.raises(TriviumError, match="rollback"):
            fork.drop_last(12)


@pytest.mark.parametrize("pattern", [PATTERNS["window"], PATTERNS["sink_window"]], ids=["window", "sink_window"])
def test_documents_that_follow_one_another_in_a_row(pattern):
    model, x = model_of(pattern), tokens(1, 40)
    cache = model.cache(rows=1, capacity=40, rollback=3)
    segments = segments_of([[13, 11, 16]], 40)
    with torch.inference_mode():
        expected = model(Inputs(x, segments=segments)).logits
        pieces = [
            (piece, names) for piece, names in zip(x.split((9, 1, 7, 1, 1, 21), 1), segments.split((9, 1, 7, 1, 1, 21), 1), strict=True)
        ]
        close(torch.cat([model(Inputs(piece, segments=names, cache=cache)).logits for piece, names in pieces], 1), expected)
        begun = model.cache(rows=1, capacity=40, rollback=3)
        for start, end in ((0, 10), (10, 13), (13, 14)):
            model(Inputs(x[:, start:end], segments=segments[:, start:end], cache=begun))
        if pattern.keeps[1]:
            with pytest.raises(TriviumError, match="rollback"):
                begun.drop_last(2)  # the first document's first tokens are gone
        else:
            begun.drop_last(2)
            close(model(Inputs(x[:, 12:20], segments=segments[:, 12:20], cache=begun)).logits, expected[:, 12:20])


def test_a_forward_that_fails_changes_nothing():
    model, x = model_of(Window(size=4)), tokens(1, 20)
    cache = model.cache(rows=1, capacity=30)
    with torch.inference_mode():
        model(Inputs(x[:, :12], cache=cache))
        model.layers[1].mixer.out.weight.data, kept = torch.zeros(3), model.layers[1].mixer.out.weight.data
        with pytest.raises(RuntimeError):
            model(Inputs(x[:, 12:13], cache=cache))
        model.layers[1].mixer.out.weight.data = kept
        close(model(Inputs(x[:, 12:], cache=cache)).logits, model(x).logits[:, 12:])


@pytest.mark.concept("T13.05", part="nn/ring.py")
@every_pattern
def test_bytes_are_what_was_counted_and_do_not_grow(pattern):
    model = model_of(pattern)
    entries = 2 * 2 * 6 * 4  # keys and values, kv heads, head size, bytes
    assert count.cache_bytes(model) == [0, 0]
    assert count.state_bytes(model) == [sum(pattern.keeps) * entries] * 2
    bytes_of = {n: model.cache(rows=3, capacity=n).bytes for n in (100, 1000, 10**9)}
    assert set(bytes_of.values()) == {3 * sum(count.state_bytes(model))}
    assert model.cache(rows=3, capacity=100, rollback=4).bytes - bytes_of[100] == 3 * 2 * 4 * entries
    assert isinstance(model_of(BlockSparse(size=4)).layers[0].mixer.state()["k"], PerToken)
    assert model.cache(rows=1, capacity=1).bytes <= 2 * (1 + pattern.keeps[1]) * entries


@every_pattern
@pytest.mark.parametrize("held", [3, 30])
def test_decoding_takes_the_products_that_are_counted(pattern, held):
    model = model_of(pattern)
    use_backend(model, "eager")
    cache = model.cache(rows=1, capacity=40)
    with torch.no_grad():
        model(Inputs(tokens(1, held), cache=cache))
        with FlopCounterMode(display=False) as mode:
            model(Inputs(tokens(1, 1), cache=cache))
    assert count.decoding_flops(model, held=held) == mode.get_total_flops()


@pytest.mark.concept("X.10", part="nn/ring.py")
def test_bytes_of_local_and_global_layers():
    """One global layer to five local ones: n of the one and the window of the others."""
    model = model_of(*[Window(size=5)] * 5, Full())
    entry = 2 * 2 * 6 * 4
    for capacity in (20, 50, 500):
        assert model.cache(rows=2, capacity=capacity).bytes == 2 * 2 * entry * (5 * 5 + capacity)
    assert [a + b for a, b in zip(count.cache_bytes(model), count.state_bytes(model), strict=True)] == ([5 * entry] * 5 + [entry]) * 2


@pytest.mark.concept("X.09", part="nn/ring.py")
@pytest.mark.parametrize("pattern", [SinkWindow(size=16, first=4), SinkWindow(size=16, first=4, rebase=True)], ids=["absolute", "rebased"])
def test_streaming_goes_on_for_ever_in_constant_memory(pattern):
    """20 times the window and more, token by token after a long prompt, in a store that never grows."""
    model, x = model_of(pattern), tokens(1, 420)
    cache = model.cache(rows=1, capacity=10**9)
    size = cache.bytes
    with torch.inference_mode():
        expected = model(x).logits
        out = [model(Inputs(x[:, :300], cache=cache)).logits]
        out += [model(Inputs(x[:, t : t + 1], cache=cache)).logits for t in range(300, 420)]
        close(torch.cat(out, 1), expected)
    assert cache.bytes == size and isinstance(model.layers[0].mixer.state()["k"], Rolling)


@pytest.mark.concept("T13.05", part="nn/ring.py")
@pytest.mark.parametrize("window", [3, 7])
def test_mistral_decodes_as_transformers_does(tmp_path, window):
    """Logits 1e-5, whole and token by token from the rolling cache, five windows and more beyond it."""
    theirs = hf.tiny(
        "mistral", vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, sliding_window=window, rms_norm_eps=0.01,
    )  # fmt: skip
    model = directory.read(hf.save(theirs, tmp_path)).model
    x = torch.randint(0, 41, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = hf.logits(theirs, x)
    cache = model.cache(rows=2, capacity=40)
    with torch.inference_mode():
        out = [model(Inputs(piece, cache=cache)).logits for piece in x.split((10, *[1] * 30), 1)]
        for mine in (model(x).logits, torch.cat(out, 1)):
            assert (mine - expected).abs().max() < 1e-5 * max(expected.std().item(), 1.0)
    assert cache.bytes == 2 * 3 * 2 * 2 * 6 * window * 4
