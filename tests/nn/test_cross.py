"""Cross-attention against torch's and transformers', and what it must keep: padding, order, and the cache of the memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BartConfig, T5Config
from transformers.models.bart.modeling_bart import BartDecoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from tests.tiny import DIM, host, redraw, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.models.block import Block
from trivium.nn.activations import GELU, ReLU
from trivium.nn.attention import Attention, Place, Scores, use_backend
from trivium.nn.cross import CrossAttention
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS, Layer
from trivium.nn.step import Step
from trivium.nn.store import Handle

BIASES = ("q", "k", "v", "out")
SEGMENTS = torch.tensor([[0] * 7, [0] * 4 + [-1] * 3])  # two memories of 7 and of 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def put(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    assert dict(module.named_parameters()).keys() == tensors.keys()
    module.load_state_dict(tensors)


@pytest.mark.concept("T01.04", part="nn/cross.py")
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_equals_torchs_multihead_attention(backend):
    """Outputs, weights and gradients; queries and memory of other widths and lengths; the second memory is padded."""
    theirs = nn.MultiheadAttention(24, 4, kdim=20, vdim=20, batch_first=True)
    redraw(theirs)
    ours = CrossAttention(heads=4, kv_heads=4, head_dim=6, memory_dim=20, bias=BIASES).build(24)
    parts = {name: getattr(theirs, f"{name}_proj_weight").detach() for name in "qkv"}
    biases = dict(zip("qkv", theirs.in_proj_bias.detach().chunk(3), strict=True))
    tensors = {f"{'inp' if name == 'q' else 'memory'}.{name}": (parts[name], biases[name]) for name in "qkv"}
    tensors["out"] = (theirs.out_proj.weight.detach(), theirs.out_proj.bias.detach())
    put(ours, {f"{name}.{leaf}": tensor for name, pair in tensors.items() for leaf, tensor in zip(("weight", "bias"), pair, strict=True)})
    ours.backend = backend
    q, memory = drawn(2, 5, 24).requires_grad_(), drawn(2, 7, 20, seed=1).requires_grad_()
    expected, weights = theirs(q, memory, memory, key_padding_mask=SEGMENTS < 0, average_attn_weights=False)
    inputs = Inputs(embeds=q, memory=memory, memory_segments=SEGMENTS)
    step = Step.begin(inputs, causal=True)
    found = ours(q, step, Handle())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    upstream = drawn(2, 5, 24, seed=2)
    wanted = torch.autograd.grad(expected, [q, memory, theirs.in_proj_bias], upstream)
    mine = torch.autograd.grad(found, [q, memory, ours.inp.q.bias, ours.memory.k.bias, ours.memory.v.bias], upstream)
    for a, b in zip((*mine[:2], torch.cat(mine[2:])), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    asked = Step.begin(inputs, causal=True, weights=True)
    torch.testing.assert_close(ours(q, asked, Handle()), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(asked.aux.cross[0], weights, rtol=0, atol=1e-6)
    assert (asked.aux.cross[0][1, :, :, 4:] == 0).all()


def decoder_layer(block: Block, names: dict[str, str], theirs: nn.Module, dim: int) -> nn.Module:
    """`block` with the weights of transformers' layer, by ours to theirs."""
    ours = block.build(dim, Place())
    state = theirs.state_dict()
    made = {}
    for name in dict(ours.named_parameters()):
        module, _, leaf = name.rpartition(".")
        made[name] = state[f"{names[module]}.{leaf}"]
    put(ours, made)
    assert len(made) == len(state)
    return ours


def run(layer: nn.Module, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return layer(x, Step.begin(Inputs(embeds=x, memory=memory, memory_segments=SEGMENTS), causal=True))


def triangle(count: int) -> torch.Tensor:
    return torch.full((count, count), float("-inf")).triu(1)[None, None]


PADDING = torch.zeros(2, 1, 1, 7).masked_fill((SEGMENTS < 0)[:, None, None], float("-inf"))


@pytest.mark.concept("T01.04", part="nn/cross.py")
def test_a_decoder_layer_equals_barts():
    config = BartConfig(d_model=24, decoder_attention_heads=4, decoder_ffn_dim=40, attn_implementation="eager")
    theirs = BartDecoderLayer(config, layer_idx=0).eval()
    redraw(theirs)
    heads = {"heads": 4, "kv_heads": 4, "head_dim": 6, "bias": BIASES}
    mlp = MLP(hidden=40, activation=GELU(), gated=False, bias=True)
    block = Block(mixer=Attention(**heads), cross=CrossAttention(**heads), ffn=mlp, norm=Layer(), norm_at="post")
    names = {f"mixer.inp.{n}": f"self_attn.{n}_proj" for n in "qkv"} | {f"cross.memory.{n}": f"encoder_attn.{n}_proj" for n in "kv"}
    names |= {"mixer.out": "self_attn.out_proj", "cross.inp.q": "encoder_attn.q_proj", "cross.out": "encoder_attn.out_proj"}
    names |= {"mixer_norm": "self_attn_layer_norm", "cross_norm": "encoder_attn_layer_norm", "ffn_norm": "final_layer_norm"}
    ours = decoder_layer(block, names | {"ffn.inp.up": "fc1", "ffn.out": "fc2"}, theirs, 24)
    x, memory = drawn(2, 5, 24), drawn(2, 7, 24, seed=1)
    expected = theirs(x, attention_mask=triangle(5), encoder_hidden_states=memory, encoder_attention_mask=PADDING)
    torch.testing.assert_close(run(ours, x, memory), expected, rtol=0, atol=1e-5)


@pytest.mark.concept("T01.04", part="nn/cross.py")
def test_a_decoder_layer_equals_t5s():
    """A layer after the first, which has no table of relative positions of its own; heads wider than the model."""
    config = T5Config(d_model=24, d_kv=10, num_heads=4, d_ff=40, is_decoder=True, layer_norm_epsilon=0.01, attn_implementation="eager")
    theirs = T5Block(config, has_relative_attention_bias=False, layer_idx=0).eval()
    redraw(theirs)
    heads = {"heads": 4, "kv_heads": 4, "head_dim": 10}
    mlp = MLP(hidden=40, activation=ReLU(), gated=False)
    block = Block(mixer=Attention(**heads, scores=Scores(scale=1.0)), cross=CrossAttention(**heads, scale=1.0), ffn=mlp, norm=RMS(eps=0.01))
    own, cross, wide = "layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.2.DenseReluDense"
    names = {f"mixer.inp.{n}": f"{own}.{n}" for n in "qkv"} | {f"cross.memory.{n}": f"{cross}.{n}" for n in "kv"}
    names |= {"mixer.out": f"{own}.o", "cross.inp.q": f"{cross}.q", "cross.out": f"{cross}.o", "ffn.inp.up": f"{wide}.wi"}
    names |= {"mixer_norm": "layer.0.layer_norm", "cross_norm": "layer.1.layer_norm", "ffn_norm": "layer.2.layer_norm"}
    ours = decoder_layer(block, names | {"ffn.out": f"{wide}.wo"}, theirs, 24)
    x, memory = drawn(2, 5, 24), drawn(2, 7, 24, seed=1)
    zero = torch.zeros(1, 4, 5, 5) + triangle(5)
    expected = theirs(x, position_bias=zero, encoder_hidden_states=memory, encoder_decoder_position_bias=torch.zeros(1, 4, 5, 7) + PADDING)[
        0
    ]
    torch.testing.assert_close(run(ours, x, memory), expected, rtol=0, atol=1e-5)


def model():
    return tiny(host(CrossAttention(heads=6, kv_heads=2, head_dim=8, qk_norm=RMS())))


@pytest.mark.concept("T01.04", part="nn/cross.py")
def test_the_order_of_the_memory_means_nothing():
    subject, x, memory = model(), tokens(2, 6), drawn(2, 7, DIM)
    expected = subject(Inputs(x, memory=memory, memory_segments=SEGMENTS)).logits
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = subject(Inputs(x, memory=memory[:, order], memory_segments=SEGMENTS[:, order])).logits
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-5)
    without = subject(Inputs(x[1:], memory=memory[1:, :4])).logits
    torch.testing.assert_close(without, expected[1:], rtol=0, atol=1e-5)
    moved = memory.clone()
    moved[0, 3] += 1
    assert (subject(Inputs(x, memory=moved, memory_segments=SEGMENTS)).logits - expected).abs()[0].max() > 1e-2


@pytest.mark.concept("T01.04", part="nn/cross.py")
@pytest.mark.parametrize("chunks", [(1,) * 8, (3, 4, 1)], ids=str)
def test_decoding_reads_the_memory_once(chunks):
    """The memory is given with the first chunk alone; the rows are reordered, forked and rolled back with what was kept of it."""
    subject, x, memory = model(), tokens(2, 8), drawn(2, 7, DIM)
    full = subject(Inputs(x, memory=memory, memory_segments=SEGMENTS)).logits
    cache = subject.cache(rows=2, capacity=12)
    with torch.inference_mode():
        pieces = [
            subject(Inputs(piece, cache=cache, **({"memory": memory, "memory_segments": SEGMENTS} if i == 0 else {}))).logits
            for i, piece in enumerate(x.split(chunks, 1))
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=2e-5)
        fork = cache.fork()
        cache.reorder([1, 1])
        cache.drop_last(1)
        again = subject(Inputs(x[[1, 1], 7:], cache=cache)).logits
        torch.testing.assert_close(again, full[[1, 1], 7:], rtol=0, atol=2e-5)
        fork.drop_last(8)
        torch.testing.assert_close(subject(Inputs(x, cache=fork)).logits, full, rtol=0, atol=2e-5)


def test_each_backend_sees_the_padding():
    subject, x, memory = model(), tokens(2, 6), drawn(2, 7, DIM)
    other = memory.clone()
    other[1, 4:] = 1e4
    for backend in ("eager", "sdpa", "native"):
        use_backend(subject, backend)
        a, b = (subject(Inputs(x, memory=given, memory_segments=SEGMENTS)).logits for given in (memory, other))
        assert torch.equal(a, b)


def test_a_row_without_memory_reads_nothing():
    subject, x, memory = model(), tokens(2, 6), drawn(2, 7, DIM)
    empty = SEGMENTS.clone()
    empty[1] = -1
    logits = subject(Inputs(x, memory=memory, memory_segments=empty)).logits
    other = subject(Inputs(x, memory=memory * torch.tensor([1.0, 9.0])[:, None, None], memory_segments=empty)).logits
    assert logits.isfinite().all() and torch.equal(logits, other)


def test_dropout_is_of_the_weights_and_in_training_alone():
    spec = host(CrossAttention(heads=2, kv_heads=2, head_dim=12, dropout=0.5))
    subject = tiny(spec)
    still = copy.deepcopy(subject).train()
    still.layers[0].cross.spec = still.layers[1].cross.spec = spec.blocks["a"].cross.replace(dropout=0.0)
    x = Inputs(tokens(1, 6), memory=drawn(1, 7, DIM))
    assert torch.equal(subject(x).logits, still(x).logits)
    subject.train()
    assert (subject(x).logits - still(x).logits).abs().max() > 1e-2
    use_backend(subject, "sdpa")
    with pytest.raises(ConfigError, match="cannot drop weights"):
        subject(x)


def test_a_memory_that_is_missing_is_asked_for():
    with pytest.raises(ConfigError, match="reads a memory"):
        model()(tokens(1, 3))
