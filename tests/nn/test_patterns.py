"""Patterns: computed in blocks against dense with a mask, against transformers and torch, and how the work grows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.big_bird import modeling_big_bird as big_bird
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.longformer import modeling_longformer as longformer

from tests.tiny import redraw, segments_of
from trivium.core.errors import ConfigError
from trivium.core.spec import validate
from trivium.models.block import Block
from trivium.models.transformer import Transformer, build, initialize
from trivium.nn import blocked
from trivium.nn.attention import Attention, Scores
from trivium.nn.backends import Extras, attend, weighted, weights_of
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS
from trivium.nn.patterns import Chunk, Full, Pattern, Window
from trivium.nn.patterns_sparse import BlockSparse, Dilated, Longformer, SinkWindow
from trivium.nn.positions import Rope
from trivium.nn.step import Reach, Step, View

PATTERNS: dict[str, Pattern] = {
    "window": Window(size=20),
    "window-narrow": Window(size=1),
    "chunk": Chunk(size=24),
    "chunk-before": Chunk(size=10, before=17),
    "dilated": Dilated(size=5, dilation=3),
    "longformer": Longformer(size=9, dilation=2, first=3),
    "longformer-many-first": Longformer(size=9, first=20),
    "sink_window": SinkWindow(size=12, first=3),
    "local-global-random": BlockSparse(size=16, local=2, first=1, random=1, seed=3),
    "local-strided-random": BlockSparse(size=8, local=2, stride=5, first=0, random=2),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
BATCHES = {"even": (210, None), "whole-blocks": (128, None), "packed": (150, [[150], [-5, 70, 70], [17, 130]])}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def view_of(reach: Reach | None, count: int, *, causal: bool, rows: list[list[int]] | None = None) -> View:
    segments = None if rows is None else segments_of(rows, count)
    tokens = torch.zeros(2 if rows is None else len(rows), count, dtype=torch.int64)
    return Step.begin(Inputs(tokens, segments=segments), causal=causal).view(reach)


def in_blocks(view: View) -> bool:
    return view.row_plan is not None or (view.documents is not None and any(view.plan(n) for n in view.step.runs[:, 1].tolist()))


def both_ways(view: View, extras: Extras = Extras(), *, backend: str = "eager") -> list[list[torch.Tensor]]:  # noqa: B008 - frozen
    """Output and gradients at real tokens: as `attend` computes them, and dense with a mask."""
    batch, count = view.step.inputs.shape
    real = torch.ones(batch, count, dtype=torch.bool) if view.step.segments is None else view.step.segments >= 0
    results = []
    for blocks in (True, False):
        q, k, v = (draw(batch, heads, count, 6, seed=heads).requires_grad_() for heads in (4, 2, 2))
        if blocks:
            out = attend(q, k, v, view, scale=0.4, backend=backend, extras=extras)
        else:
            out = weighted(weights_of(q, k, view, scale=0.4, extras=extras), v)
        out = out * real[:, None, :, None]
        out.backward(draw(*out.shape, seed=1))
        results.append([out.detach(), q.grad, k.grad, v.grad])
    return results


def agree(results: list[list[torch.Tensor]]) -> None:
    for index, (mine, naive) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(mine, naive, rtol=0, atol=1e-4 if index else 1e-5)


@pytest.mark.concept("T13.06", "T19.05", part="nn/blocked.py")
@every_pattern
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_blocks_equal_dense_with_a_mask(pattern, causal, batch):
    count, rows = BATCHES[batch]
    view = view_of(pattern.reach, count, causal=causal, rows=rows)
    if causal or batch == "even":
        assert in_blocks(view) or pattern.kind in ("block_sparse", "longformer")
    agree(both_ways(view))
    seen = view.mask()
    assert seen.float().mean() < (0.5 if causal else 0.8) and seen[0].any(-1).all()


@pytest.mark.concept("T13.06", "T19.05", part="nn/blocked.py")
@pytest.mark.parametrize("backend", ["native", "sdpa", "auto"])
def test_blocks_by_any_backend_with_sinks_bias_and_softcap(backend):
    view = view_of(Window(size=20).reach, 150, causal=True, rows=[[150], [70, 80]])
    assert in_blocks(view)
    slope = lambda q, k: -0.1 * (q[:, None, :, None] - k[:, None, None, :]).abs().float()  # noqa: E731
    agree(both_ways(view, Extras(bias=slope, sinks=draw(4)), backend=backend))
    if backend != "sdpa":
        agree(both_ways(view, Extras(softcap=1.5, bias=slope), backend=backend))


@pytest.mark.concept("T13.06", part="nn/patterns_sparse.py")
@every_pattern
@pytest.mark.parametrize("causal", [True, False])
def test_a_plan_needs_every_block_that_is_seen_and_few_others(pattern, causal):
    """By torch's block masks, which look at every pair; a plan looks at none."""
    count = 320
    found = pattern.plan(count, causal=causal)
    tokens = found.tokens()

    def sees(_b: Any, _h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        a, b = tokens.flatten()[q], tokens.flatten()[k]
        return pattern.sees(a, b) & (a < count) & (b < count) & ((b <= a) if causal else (b == b))

    total = tokens.numel()
    theirs = create_block_mask(sees, None, None, total, total, device="cpu", BLOCK_SIZE=found.size).to_dense()[0, 0].bool()
    ours = torch.zeros_like(theirs)
    for queries, keys in found.groups:
        for query, needed in zip(queries, keys, strict=True):
            ours[query, [key for key in needed if key >= 0]] = True
    assert not (theirs & ~ours).any()
    assert ours.sum() <= 1.25 * theirs.sum()


@pytest.mark.concept("T13.06", part="nn/patterns_sparse.py")
@pytest.mark.parametrize("name", ["window", "chunk", "local-global-random", "local-strided-random"])
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_with_its_block_mask_gives_the_same(name, causal):
    pattern, count = PATTERNS[name], 128
    q, k, v = (draw(1, heads, count, 8, seed=heads) for heads in (4, 2, 2))
    view = Step.begin(Inputs(torch.zeros(1, count, dtype=torch.int64)), causal=causal).view(pattern.reach)
    mask = create_block_mask(
        lambda _b, _h, a, b: pattern.sees(a, b) & ((b <= a) | (not causal)), None, None, count, count, device="cpu", BLOCK_SIZE=16
    )
    theirs = flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, view, scale=0.3, backend="eager"), theirs, rtol=0, atol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1))
        return out


def slope(cost: Callable[[int], float], lengths: list[int]) -> float:
    """The growth exponent: of log cost over log length."""
    return float(np.polyfit(np.log(lengths), np.log([cost(length) for length in lengths]), 1)[0])


@pytest.mark.concept("T13.06", "T19.05", part="nn/blocked.py")
@pytest.mark.parametrize("name", ["window", "chunk-before", "dilated", "longformer", "sink_window", "local-global-random", "full"])
def test_flops_and_memory_grow_with_the_length(name):
    """Forward and backward; dense attention's grow with its square."""
    pattern = PATTERNS.get(name, Full())
    lengths = [512, 1024, 2048]

    def run(count: int) -> None:
        view = Step.begin(Inputs(torch.zeros(1, count, dtype=torch.int64)), causal=True).view(pattern.reach)
        q, k, v = (draw(1, 1, count, 4).requires_grad_() for _ in range(3))
        attend(q, k, v, view, scale=0.5, backend="eager").sum().backward()

    def flops(count: int) -> float:
        with FlopCounterMode(display=False) as mode:
            run(count)
        return mode.get_total_flops()

    def memory(count: int) -> float:
        with Largest() as watch:
            run(count)
        return watch.elements

    expected = 2.0 if name == "full" else 1.0
    assert abs(slope(flops, lengths) - expected) < 0.05
    assert abs(slope(memory, lengths) - expected) < 0.05


@pytest.mark.concept("T13.06", part="nn/patterns_sparse.py")
def test_random_blocks_depend_on_the_seed_and_not_on_the_length():
    pattern = BlockSparse(size=4, local=1, first=0, random=2, seed=1)
    short, long = (torch.arange(n) for n in (64, 200))
    seen = [pattern.sees(x[:, None], x) for x in (short, long)]
    assert torch.equal(seen[0], seen[1][:64, :64])
    assert not torch.equal(seen[1], BlockSparse(size=4, local=1, first=0, random=2, seed=2).sees(long[:, None], long))
    blocks = torch.arange(1, 4001)
    drawn = pattern.drawn(blocks, 0)
    assert ((drawn >= 0) & (drawn < blocks)).all() and abs((drawn / blocks).mean() - 0.5) < 0.02  # evenly over what is earlier


@pytest.mark.parametrize("causal", [True, False])
def test_every_pattern_is_what_its_words_say(causal):
    """By loops over positions, in the words of the papers."""
    count = 60

    def blocks(spec: BlockSparse, q: int, k: int) -> bool:
        a, b = q // spec.size, k // spec.size
        return abs(a - b) < spec.local or a < spec.first or b < spec.first or (spec.stride > 0 and (b + 1) % spec.stride == 0)

    words: list[tuple[Pattern, Callable[[int, int], bool]]] = [
        (Window(size=7), lambda q, k: q - 7 < k < q + 7),
        (Chunk(size=8), lambda q, k: q // 8 == k // 8),
        (Chunk(size=8, before=3), lambda q, k: q // 8 == k // 8 or q // 8 * 8 - 3 <= k < q // 8 * 8),
        (Dilated(size=3, dilation=4), lambda q, k: abs(q - k) in (0, 4, 8)),
        (Longformer(size=3, dilation=2, first=2), lambda q, k: abs(q - k) in (0, 2, 4) or q < 2 or k < 2),
        (SinkWindow(size=5, first=3), lambda q, k: abs(q - k) < 5 or k < 3),
        (spec := BlockSparse(size=4, local=2, stride=3, first=1), lambda q, k: blocks(spec, q, k)),
    ]
    for pattern, says in words:
        view = view_of(pattern.reach, count, causal=causal)
        expected = torch.tensor([[says(q, k) and (k <= q or not causal) for k in range(count)] for q in range(count)])
        assert torch.equal(view.mask()[0, 0], expected), pattern
        assert pattern.whole(1) and (not pattern.whole(count))
        for length in range(1, count):
            places = torch.arange(length)
            assert not pattern.whole(length) or pattern.sees(places[:, None], places).all()


def one_layer(mixer: Attention, *, dim: int = 24, layers: int = 1, causal: bool = True) -> Any:
    spec = Transformer(dim=dim, vocab=31, layers=("a",) * layers, blocks={"a": Block(mixer=mixer)}, causal=causal)
    return redraw(build(spec, device="cpu")).eval()


@pytest.mark.concept("T13.05", part="nn/patterns.py")
@pytest.mark.parametrize("pattern", [Window(size=6), Window(size=16)], ids=str)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_influence_reaches_exactly_as_far_back_as_windows_add_up(pattern, layers):
    """L layers of a window w: L * (w - 1) tokens back, and not one more."""
    count, at = 64, 60
    model = one_layer(Attention(heads=4, kv_heads=2, head_dim=6, position=Rope(base=50.0), pattern=pattern), layers=layers)
    x = draw(1, count, 24).requires_grad_()
    (grad,) = torch.autograd.grad(model(Inputs(embeds=x)).hidden[0, at].square().sum(), x)
    seen = (grad[0].abs().amax(-1) > 0).nonzero()[:, 0]
    assert seen.tolist() == list(range(max(at - layers * (pattern.size - 1), 0), at + 1))


@pytest.mark.concept("T13.05", "T13.06", part="nn/patterns_sparse.py")
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("window", [8, 32])
def test_longformer_against_transformers(first, window):
    """LongformerSelfAttention with copied weights. Its tokens with global attention have maps of their own; ours have not, so
    theirs are given the same ones."""
    count, dim, heads = 256, 24, 3
    config = transformers.LongformerConfig(
        hidden_size=dim, num_attention_heads=heads, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    theirs = redraw(longformer.LongformerSelfAttention(config, 0).eval())
    pattern = Longformer(size=window // 2 + 1, first=first) if first else Window(size=window // 2 + 1)
    ours = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, bias=("q", "k", "v"), pattern=pattern).build(dim)
    with torch.no_grad():
        for name, linear in zip(("query", "key", "value"), (ours.inp.q, ours.inp.k, ours.inp.v), strict=True):
            source = getattr(theirs, name)
            getattr(theirs, f"{name}_global").load_state_dict(source.state_dict())
            linear.load_state_dict(source.state_dict())
        ours.out.weight.copy_(torch.eye(dim))
        x = draw(2, count, dim)
        mask = torch.zeros(2, count)
        mask[:, :first] = 10000.0
        expected = theirs(x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=first > 0)[0]
        step = Step.begin(Inputs(torch.zeros(2, count, dtype=torch.int64)), causal=False)
        assert in_blocks(step.view(pattern.reach))
        torch.testing.assert_close(ours(x, step, step.handle(0)), expected, rtol=0, atol=1e-4)


@dataclass(frozen=True)
class BigBird:
    """transformers' block pattern: three blocks around, the first and the last, and drawn ones for each block in between."""

    size: int
    drawn: tuple[tuple[int, ...], ...]  # for blocks 1 .. n - 2

    def blocks(self, query: int) -> set[int]:
        total = len(self.drawn) + 2
        if query in (0, total - 1):
            return set(range(total))
        return {0, total - 1, query - 1, query, query + 1, *self.drawn[query - 1]}

    def whole(self, length: int) -> bool:
        return False

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        total = len(self.drawn) + 2
        table = torch.zeros(total + 1, total + 1, dtype=torch.bool)  # one more for places without a token
        for query in range(total):
            table[query, list(self.blocks(query))] = True
        return table[queries // self.size, keys // self.size]

    def plan(self, length: int, *, causal: bool, start: int = 0, keys: int | None = None) -> blocked.Plan | None:
        return blocked.plan(length, self.size, self.blocks, causal=causal, start=start, keys=keys)


@pytest.mark.concept("T13.06", part="nn/blocked.py")
@pytest.mark.parametrize("seed", [0, 1])
def test_big_bird_against_transformers(seed):
    """BigBirdBlockSparseAttention with the blocks that its seed draws (it draws in training alone, for each head: here one)."""
    count, dim, size = 320, 8, 16
    config = transformers.BigBirdConfig(hidden_size=dim, num_attention_heads=1, block_size=size, num_random_blocks=2, use_bias=True)
    theirs = redraw(big_bird.BigBirdBlockSparseAttention(config, seed=seed).train())
    masks = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, count), size)
    names = ("to_blocked_mask", "band_mask", "from_mask", "to_mask")
    given = dict(zip(names, (masks[0], *masks[1:]), strict=True)) | {"from_blocked_mask": masks[0]}
    x = draw(2, count, dim)
    expected = theirs(x, **given)[0]
    np.random.seed(seed)
    lengths, counts = theirs._get_rand_attn_plan(count, size, 2)
    (drawn,) = theirs._bigbird_block_rand_mask_with_head(count, count, size, size, 1, lengths, counts)
    reach = BigBird(size, tuple(tuple(row) for row in drawn.tolist()))
    step = Step.begin(Inputs(torch.zeros(2, count, dtype=torch.int64)), causal=False)
    assert in_blocks(step.view(reach))
    q, k, v = (getattr(theirs, name)(x)[:, None] for name in ("query", "key", "value"))
    ours = attend(q, k, v, step.view(reach), scale=dim**-0.5, backend="eager")[:, 0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.concept("X.09", part="nn/attention.py")
@pytest.mark.parametrize("window", [None, 20])
def test_learned_sinks_against_gpt_oss(window):
    """GptOssAttention's eager attention with copied weights, full and sliding."""
    dim, count = 24, 96
    config = transformers.GptOssConfig(
        hidden_size=dim, num_attention_heads=6, num_key_value_heads=2, head_dim=8, sliding_window=window or 128,
        layer_types=["sliding_attention" if window else "full_attention"], num_hidden_layers=1, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )  # fmt: skip
    theirs = redraw(gpt_oss.GptOssAttention(config, 0).eval())
    pattern = Full() if window is None else Window(size=window)
    spec = Attention(
        heads=6, kv_heads=2, head_dim=8, bias=("q", "k", "v", "out"), position=Rope(base=50.0), pattern=pattern, scores=Scores(sinks=True)
    )
    ours = spec.build(dim)
    pairs = {"q_proj": ours.inp.q, "k_proj": ours.inp.k, "v_proj": ours.inp.v, "o_proj": ours.out}
    with torch.no_grad():
        for name, linear in pairs.items():
            linear.load_state_dict(getattr(theirs, name).state_dict())
        ours.sinks.weight.copy_(theirs.sinks)
        x = draw(2, count, dim)
        step = Step.begin(Inputs(torch.zeros(2, count, dtype=torch.int64)), causal=True)
        rotary = gpt_oss.GptOssRotaryEmbedding(config)(x, step.positions)
        mask = torch.where(step.view(pattern.reach).mask(), 0.0, torch.finfo(torch.float32).min)
        expected = theirs(x, position_embeddings=rotary, attention_mask=mask)[0]
        torch.testing.assert_close(ours(x, step, step.handle(0)), expected, rtol=0, atol=1e-5)


@pytest.mark.concept("X.10", part="nn/patterns.py")
def test_chunks_and_global_layers_without_positions_against_llama_4():
    """Llama4ForCausalLM with copied weights, its dense form: chunked layers with interleaved rotary positions, and full layers with
    none. Logits whole and token by token, past several chunks."""
    chunk, count = 16, 75
    config = transformers.Llama4TextConfig(
        vocab_size=41, hidden_size=24, intermediate_size=40, intermediate_size_mlp=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, attention_chunk_size=chunk, use_qk_norm=False, attn_temperature_tuning=False,
        interleave_moe_layer_step=9, no_rope_layers=[1, 1, 0, 1], rope_parameters={"rope_type": "default", "rope_theta": 60.0},
        layer_types=["chunked_attention", "chunked_attention", "full_attention", "chunked_attention"], pad_token_id=0, rms_norm_eps=0.01,
    )  # fmt: skip
    theirs = redraw(transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager").eval())
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 6}
    near = Attention(**shape, position=Rope(base=60.0, layout="interleaved"), pattern=Chunk(size=chunk))
    blocks = {
        "near": Block(mixer=near, ffn=MLP(hidden=40), norm=RMS(eps=0.01)),
        "far": Block(mixer=Attention(**shape), ffn=MLP(hidden=40), norm=RMS(eps=0.01)),
    }
    spec = Transformer(dim=24, vocab=41, layers=("near", "near", "far", "near"), blocks=blocks, final_norm=RMS(eps=0.01))
    ours = build(spec, device="cpu").eval()
    names = {
        "model.": "", "embed_tokens": "embed", "lm_head": "head.out", "input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "mixer.out", "self_attn.": "mixer.inp.", "feed_forward.down_proj": "ffn.out", "feed_forward.": "ffn.inp.",
        "_proj": "",
    }  # fmt: skip
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights["final_norm.weight" if name == "norm.weight" else name] = tensor
    ours.load_state_dict(weights)
    x = torch.randint(0, 41, (2, count), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=x, attention_mask=torch.ones_like(x)).logits
        cache = ours.cache(rows=2, capacity=count)
        pieces = torch.cat([ours(Inputs(piece, cache=cache)).logits for piece in x.split((23, *[1] * 30, 22), 1)], 1)
        for mine in (ours(x).logits, pieces):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)
    assert cache.bytes == 2 * 2 * 2 * 6 * 4 * (3 * chunk + count)


@pytest.mark.concept("X.09", part="nn/rebased.py")
@pytest.mark.parametrize("first", [0, 1, 4])
def test_rebased_positions_are_places_in_the_cache(first):
    """Against StreamingLLM's own words: at each token, the cache holds the first tokens and the last ones; their places from 0 on
    are their positions."""
    size, count, dim = 6, 40, 24
    model = one_layer(
        Attention(heads=4, kv_heads=2, head_dim=6, position=Rope(base=50.0), pattern=SinkWindow(size=size, first=first, rebase=True))
    )
    plain = one_layer(Attention(heads=4, kv_heads=2, head_dim=6, position=Rope(base=50.0)))
    plain.load_state_dict(model.state_dict())
    x = draw(1, count, dim)
    with torch.no_grad():
        out = model(Inputs(embeds=x)).logits
        for at in range(count):
            kept = [t for t in range(at + 1) if t < first or t > at - size]
            expected = plain(Inputs(embeds=x[:, kept])).logits[:, -1]
            torch.testing.assert_close(out[:, at], expected, rtol=0, atol=2e-5)
        absolute = one_layer(
            Attention(heads=4, kv_heads=2, head_dim=6, position=Rope(base=50.0), pattern=SinkWindow(size=size, first=first))
        )
        absolute.load_state_dict(model.state_dict())
        off = (absolute(Inputs(embeds=x)).logits - out).abs().amax(-1)[0]
        assert off[: first + size].max() < 1e-5 and (off[first + size + 1 :].min() > 1e-4) == (first > 0)


def test_places_in_the_cache_need_rotary_positions():
    pattern = {"kind": "sink_window", "size": 4, "rebase": True}
    with pytest.raises(ConfigError, match="rotary"):
        validate(Attention, {"heads": 2, "kv_heads": 2, "head_dim": 4, "pattern": pattern})


def test_a_layer_that_shares_keys_that_roll_has_the_same_pattern():
    def model(pattern: Pattern) -> Any:
        shape = {"heads": 2, "kv_heads": 1, "head_dim": 6, "position": Rope(base=50.0)}
        blocks = {
            "a": Block(mixer=Attention(**shape, pattern=Window(size=4))),
            "b": Block(mixer=Attention(**shape, pattern=pattern, share="a")),
        }
        return initialize(build(Transformer(dim=12, vocab=9, layers=("a", "b"), blocks=blocks), device="cpu"), seed=0)

    x = torch.zeros(1, 9, dtype=torch.int64)
    model(Window(size=4))(x)
    with pytest.raises(ConfigError, match="same pattern"):
        model(Full())(x)


def test_a_plan_that_would_not_halve_the_work_is_none():
    assert Window(size=64).plan(128, causal=True) is None
    assert Window(size=8).plan(40, causal=True) is None  # fewer than four blocks
    found = Window(size=64).plan(4096, causal=True)
    assert found.pairs < 4096 * 64 * 2 and math.prod(found.tokens().shape) == 4096
