"""Compressed attention against transformers' DeepSeek-V4 attention, copied weight by weight, and what it promises of itself."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV4Config, DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from tests.parity.hf import redraw
from tests.tiny import host, tiny, tokens
from trivium.core.errors import TriviumError
from trivium.models import count
from trivium.nn.compressed import Compress, CompressedAttention, CompressedMixer, Index
from trivium.nn.inputs import Inputs
from trivium.nn.positions import Rope
from trivium.nn.rope_scaling import YarnScaling
from trivium.nn.step import Step
from trivium.nn.store import Store

DIM, WINDOW = 28, 5
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5}
KINDS = {"csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention", "window": "sliding_attention"}
HOW = {
    "csa": Compress(rate=3, overlap=True, index=Index(heads=7, head_dim=8, top_k=3)),
    "hca": Compress(rate=4),
    "window": None,
}


def theirs(kind: str) -> tuple[DeepseekV4Config, v4.DeepseekV4Attention]:
    config = DeepseekV4Config(
        hidden_size=DIM, num_hidden_layers=1, num_attention_heads=6, head_dim=12, q_lora_rank=18, layer_types=[KINDS[kind]], o_groups=3,
        compress_rates={"compressed_sparse_attention": 3, "heavily_compressed_attention": 4}, sliding_window=WINDOW, o_lora_rank=10,
        index_n_heads=7, index_head_dim=8, index_topk=3, partial_rotary_factor=4 / 12, rms_norm_eps=1e-3, max_position_embeddings=64,
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 4 / 12},
            "compress": {**YARN, "partial_rotary_factor": 4 / 12, "attention_factor": 1.0},
        },
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = v4.DeepseekV4Attention(config, 0).eval()
    redraw(attention, seed=1)
    return config, attention


def ours(kind: str, attention: v4.DeepseekV4Attention) -> CompressedMixer:
    """Of the same weights."""
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5, attention_factor=1.0)
    rope = Rope(base=50.0, layout="interleaved") if kind == "window" else Rope(base=300.0, layout="interleaved", scaling=scaling)
    spec = CompressedAttention(heads=6, head_dim=12, rope_dim=4, q_rank=18, window=WINDOW, groups=3, group_rank=10, position=rope)
    spec = spec.replace(norm=spec.norm.replace(eps=1e-3), compress=HOW[kind])
    names = {
        "q_a_proj": "inp.q", "q_a_norm": "q_norm", "q_b_proj": "q_up", "kv_proj": "inp.kv", "kv_norm": "kv_norm", "o_b_proj": "out",
        "compressor.kv_proj": "compressor.inp.kv", "compressor.gate_proj": "compressor.inp.gate", "compressor.kv_norm": "entry_norm",
        "compressor.indexer.kv_proj": "indexer.compressor.inp.kv", "compressor.indexer.gate_proj": "indexer.compressor.inp.gate",
        "compressor.indexer.kv_norm": "indexer.norm", "compressor.indexer.q_b_proj": "indexer.q",
        "compressor.indexer.scorer.weights_proj": "indexer.weight",
    }  # fmt: skip
    values = {}
    for name, value in attention.state_dict().items():
        if name == "sinks":
            values["sinks.weight"] = value
        elif name == "o_a_proj.weight":
            values |= {f"group_out.{k}.weight": part for k, part in enumerate(value.chunk(3))}
        elif name.endswith("position_bias"):
            values["indexer.compressor.places.weight" if "indexer" in name else "compressor.places.weight"] = value
        else:
            values[names[name.removesuffix(".weight")] + ".weight"] = value
    mixer = CompressedMixer(spec, DIM).eval()
    mixer.load_state_dict(values)
    return mixer


def run_theirs(config, attention, x: torch.Tensor, start: int = 0, cache: DynamicCache | None = None) -> torch.Tensor:
    positions = torch.arange(start, start + x.shape[1])[None]
    rotary = v4.DeepseekV4RotaryEmbedding(config)
    mask = create_sliding_window_causal_mask(config, x, None, cache, position_ids=positions)
    embeddings = {name: rotary(x, position_ids=positions, layer_type=name) for name in ("main", "compress")}
    return attention(x, embeddings, positions, mask, past_key_values=cache)[0]


def run_ours(mixer: CompressedMixer, x: torch.Tensor, store: Store | None = None) -> torch.Tensor:
    step = Step.begin(Inputs(embeds=x, cache=store), causal=True)
    y = mixer(x, step, step.handle(0))
    step.commit()
    return y


def store_of(mixer: CompressedMixer, rows: int, capacity: int) -> Store:
    return Store([mixer.state()], rows=rows, capacity=capacity, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.concept("X.03", part="nn/compressed.py")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 4, 31])
def test_it_is_transformers(kind, length):
    """Outputs, and the gradients of inputs and of every weight that is not the index's, which selection hides."""
    config, attention = theirs(kind)
    mixer = ours(kind, attention)
    x = torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(3))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    expected, found = run_theirs(config, attention, a), run_ours(mixer, b)
    assert length == 1 or expected.std() > 0.2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
    other = ours(kind, attention)
    other.load_state_dict({name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in mixer.named_parameters()})
    want = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in attention.named_parameters()}
    with torch.no_grad():
        for name, p in attention.named_parameters():
            p.copy_(want[name])
    for (name, mine), theirs_ in zip(other.named_parameters(), ours(kind, attention).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs_, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.concept("X.03", part="nn/compressed.py")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [(1,) * 14, (7, 1, 1, 5, 1), (2, 9, 4)], ids=str)
@torch.no_grad()
def test_its_cache_is_transformers(kind, chunks):
    config, attention = theirs(kind)
    mixer = ours(kind, attention)
    x = torch.randn(2, sum(chunks), DIM, generator=torch.Generator().manual_seed(4))
    cache, store, start = DynamicCache(config=config), store_of(mixer, 2, sum(chunks)), 0
    for piece in x.split(chunks, 1):
        expected, found = run_theirs(config, attention, piece, start, cache), run_ours(mixer, piece, store)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        start += piece.shape[1]
    if kind != "window":
        entries = store._keepers[0]["entries"]
        torch.testing.assert_close(
            entries.tensor[:, : int(entries.counts[0])], cache.layers[0].compressed_kv["compressor"], rtol=0, atol=1e-5
        )


@pytest.mark.concept("X.03", part="nn/compressed.py")
@pytest.mark.parametrize("name", ["csa", "hca"])
def test_gradients_cross_no_edge_of_a_stretch(name):
    """A token's output depends on itself and the past, to the token: on a stretch as a whole from the token that completes it on."""
    torch.manual_seed(0)
    how = HOW[name].replace(index=None)
    mixer = ours(name, theirs(name)[1])
    mixer.spec, mixer.indexer = mixer.spec.replace(compress=how, window=1), None
    x = torch.randn(1, 13, DIM, requires_grad=True)
    y = run_ours(mixer, x)
    for t in range(13):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        reached = (gradient[0].abs().amax(-1) > 0).tolist()
        complete = (t + 1) // how.rate * how.rate
        assert reached == [k < complete or k == t for k in range(13)], t


@pytest.mark.concept("X.03", part="nn/compressed.py")
@pytest.mark.parametrize("rate", [2, 5])
def test_the_cache_holds_an_entry_for_each_stretch_and_a_window(rate):
    """n / m + w entries of one key's width; what the open stretch needs is beside them, and does not grow."""
    spec = CompressedAttention.tiny().replace(compress=Compress(rate=rate), window=4)
    model = tiny(host(spec))
    for capacity in (20, 40):
        cache = model.cache(rows=3, capacity=capacity)
        kept = {name: sum(t.numel() for t in keeper.tensors()) for name, keeper in cache._keepers[0].items()}
        assert kept["entries"] + kept["kv"] == 3 * (capacity // rate + 4) * spec.head_dim
        assert sum(kept.values()) - kept["entries"] - kept["kv"] == 3 * (2 * spec.head_dim + 1)
    assert count.cache_bytes(model)[0] == -(-spec.head_dim * 4 // rate)


def test_more_queries_than_are_computed_at_a_time(monkeypatch):
    model, x = tiny(host(CompressedAttention.tiny())), tokens(2, 23)
    expected = model(x).logits
    monkeypatch.setattr("trivium.nn.compressed.QUERIES", 4)
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
    cache = model.cache(2, 23)
    found = torch.cat([model(Inputs(part, cache=cache)).logits for part in x.split([9, 13, 1], 1)], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compress", [Compress(rate=3), Compress(rate=4, overlap=True)], ids=["all", "overlapping"])
@torch.no_grad()
def test_stretches_are_counted_in_positions(compress):
    """A text whose first tokens are missing: its first stretch is made of what is there, in a cache as without one."""
    model, x = tiny(host(CompressedAttention.tiny().replace(compress=compress))), tokens(2, 13)
    positions = torch.stack([torch.arange(2, 15), torch.arange(7, 20)])
    expected = model(Inputs(x, positions=positions)).logits
    cache = model.cache(2, 16)
    pieces = zip(x.split([5, 1, 4, 1, 2], 1), positions.split([5, 1, 4, 1, 2], 1), strict=True)
    found = torch.cat([model(Inputs(part, positions=at, cache=cache)).logits for part, at in pieces], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (model(x).logits - expected).abs().max() > 0.1
    with pytest.raises(TriviumError, match="no room for one more entry"):
        model(Inputs(x, positions=positions[:1].expand(2, -1) + compress.rate - 3, cache=model.cache(2, 13)))
    with pytest.raises(TriviumError, match="count on by one"):
        model(Inputs(x[:, :4], positions=torch.arange(1, 5).expand(2, -1) * compress.rate - 1, cache=model.cache(2, 4)))


def test_an_index_learns_where_attention_looks():
    """Its term falls, and nothing but the index moves by it."""
    model = tiny(host(CompressedAttention.tiny())).train()
    x, seen = tokens(4, 24), []
    moved = [parameter for name, parameter in model.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(moved, lr=0.02)
    for _ in range(30):
        term = model(x, keep="none").aux.total("indexer")
        model.zero_grad()
        term.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if ".indexer." not in name)
        optimizer.step()
        seen.append(term.item())
    assert seen[-1] < 0.7 * seen[0]
