"""Mamba and Mamba-2: scans in chunks, one step at a time, transformers' own and the papers' equations give one answer; their
state for decoding is constant. The short convolution, which the delta rule shares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_count import counted, counter, ours
from tests.nn.test_delta import apart, deviations
from tests.tiny import host, segments_of, tiny, tokens
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError
from trivium.core.seed import generator
from trivium.core.spec import validate
from trivium.models import count
from trivium.models.ledger import Ledger
from trivium.models.transformer import build, initialize
from trivium.nn import mamba, mamba2
from trivium.nn.attention import Mixer
from trivium.nn.chunks import SIZE
from trivium.nn.delta import GatedDelta
from trivium.nn.inputs import Inputs, Prefix
from trivium.nn.mamba import Mamba, chunked_scan, recurrent_scan
from trivium.nn.mamba2 import Mamba2, chunked_decay, recurrent_decay
from trivium.nn.short_conv import ShortConv
from trivium.nn.step import Step
from trivium.nn.store import Handle

LENGTHS = [1, 2, 5, mamba.SIZE - 1, mamba.SIZE, mamba.SIZE + 1, SIZE, SIZE + 1, 3 * SIZE + 7]
KINDS = [Mamba.tiny(), Mamba2.tiny()]
every_kind = pytest.mark.parametrize("spec", KINDS, ids=[spec.kind for spec in KINDS])


def selective(length: int, *, strength: float = 0.3) -> tuple[torch.Tensor, ...]:
    """x, dt, B, C, A and a memory: 5 channels of 3 states each."""
    g = generator(0, "scan", length)
    x, dt = torch.randn(2, length, 5, generator=g), strength * torch.rand(2, length, 5, generator=g)
    b, c = (torch.randn(2, length, 3, generator=g) for _ in range(2))
    return x, dt, b, c, -torch.rand(5, 3, generator=g) * 2, torch.randn(2, 5, 3, generator=g)


def decaying(length: int, *, groups: int = 2) -> tuple[torch.Tensor, ...]:
    """q, k, v, log_decay and a memory: 4 heads."""
    g = generator(0, "decay", length)
    q, k = (torch.randn(2, length, groups, 6, generator=g) * 0.4 for _ in range(2))
    v, decay = torch.randn(2, length, 4, 5, generator=g), -0.3 * torch.rand(2, length, 4, generator=g)
    return q, k, v, decay, torch.randn(2, 4, 6, 5, generator=g)


@pytest.mark.concept("X.06", part="nn/mamba.py")
@pytest.mark.parametrize("length", LENGTHS)
def test_the_parallel_scan_equals_the_sequential_one(length):
    *inputs, memory = selective(length)
    for start in (memory, None):
        expected = recurrent_scan(*inputs, start)
        for size in (mamba.SIZE, 7, 256):
            for actual, wanted in zip(chunked_scan(*inputs, start, size=size), expected, strict=True):
                assert apart(actual, wanted) <= 1e-5


@pytest.mark.concept("X.06", part="nn/mamba.py")
def test_gradients_of_the_parallel_scan():
    inputs = [x.requires_grad_() for x in selective(40)]
    weights = torch.randn(2, 40, 5), torch.randn(2, 5, 3)
    grads = []
    for form in (recurrent_scan, lambda *x: chunked_scan(*x, size=16)):
        y, memory = form(*inputs)
        grads.append(torch.autograd.grad((y * weights[0]).sum() + (memory * weights[1]).sum(), inputs))
    for actual, expected in zip(*grads, strict=True):
        assert apart(actual, expected) <= 5e-5


@pytest.mark.concept("X.06", part="nn/mamba.py")
@pytest.mark.parametrize("length", [1, 9, mamba.SIZE + 3])
def test_the_scan_against_transformers(length):
    oracle = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    x, dt, b, c, a, _ = selective(length)
    expected = oracle.mamba_selective_scan(
        *(t.transpose(1, 2) for t in (x, dt)), a, *(t.transpose(1, 2) for t in (b, c)), return_last_state=True
    )
    y, memory = chunked_scan(x, dt, b, c, a)
    assert apart(y, expected[0].transpose(1, 2)) <= 1e-5
    assert apart(memory, expected[1]) <= 1e-5


def test_a_layer_against_mambapy():
    """A second implementation, where it is installed: one block with the same weights."""
    mambapy = pytest.importorskip("mambapy.mamba")
    block = mambapy.MambaBlock(mambapy.MambaConfig(d_model=24, n_layers=1, d_state=5, expand_factor=2, dt_rank=3))
    layer = Mamba(inner=48, states=5, dt_rank=3).build(24)
    names = {
        "conv.weight": block.conv1d.weight, "conv.bias": block.conv1d.bias, "steps.weight": block.dt_proj.weight,
        "channels.dt_bias": block.dt_proj.bias, "channels.A_log": block.A_log, "channels.D": block.D, "out.weight": block.out_proj.weight,
        **dict(zip(("inp.x.weight", "inp.gate.weight"), block.in_proj.weight.split(48), strict=True)),
        **dict(zip([f"select.{name}.weight" for name in ("dt", "B", "C")], block.x_proj.weight.split((3, 5, 5)), strict=True)),
    }  # fmt: skip
    layer.load_state_dict(names)
    x = torch.randn(2, 50, 24, generator=generator(0, "x"))
    step = Step.begin(Inputs(torch.zeros(2, 50, dtype=torch.int64)), causal=True)
    assert apart(layer(x, step, Handle()), block(x)) <= 1e-5


def test_scans_that_forget_at_once_stay_finite():
    x, dt, b, c, a, memory = selective(80, strength=2000.0)
    dt, decay = dt.requires_grad_(), (decaying(80)[3] - 500.0).requires_grad_()
    y, end = chunked_scan(x, dt, b, c, a, memory)
    assert apart(y, recurrent_scan(x, dt, b, c, a, memory)[0]) <= 1e-4
    assert torch.autograd.grad(y.sum() + end.sum(), dt)[0].isfinite().all()
    q, k, v, _, memory = decaying(80)
    y, end = chunked_decay(q, k, v, decay, memory)
    assert apart(y, recurrent_decay(q, k, v, decay, memory)[0]) <= 1e-5
    assert torch.autograd.grad(y.sum() + end.sum(), decay)[0].isfinite().all()


def test_one_token_that_forgets_all_blurs_no_other():
    """A log decay of -10,000 between small ones: were decays differences of running sums, those after it would be rounding."""
    q, k, v, decay, memory = decaying(50)
    decay = decay * torch.where(torch.arange(50) == 20, 1e5, 1.0)[:, None]
    for actual, expected in zip(chunked_decay(q, k, v, decay, memory), recurrent_decay(q, k, v, decay, memory), strict=True):
        assert apart(actual, expected) <= 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mamba_2_in_chunks_equals_single_steps(length, groups):
    *inputs, memory = decaying(length, groups=groups)
    for start in (memory, None):
        expected = recurrent_decay(*inputs, start)
        for size in (None, 9):
            for actual, wanted in zip(chunked_decay(*inputs, start, size=size), expected, strict=True):
                assert apart(actual, wanted) <= 1e-5


def test_gradients_of_mamba_2_in_chunks():
    inputs = [x.requires_grad_() for x in decaying(40)]
    weights = torch.randn(2, 40, 4, 5), torch.randn(2, 4, 6, 5)
    grads = []
    for form in (recurrent_decay, lambda *x: chunked_decay(*x, size=16)):
        y, memory = form(*inputs)
        grads.append(torch.autograd.grad((y * weights[0]).sum() + (memory * weights[1]).sum(), inputs))
    for actual, expected in zip(*grads, strict=True):
        assert apart(actual, expected) <= 5e-5


def test_mamba_2_is_masked_attention():
    """Its duality: y = (L * (Q K^T)) V with L_ij the product of the decays from j + 1 to i (arXiv:2405.21060, equation 9)."""
    q, k, v, decay, _ = decaying(30, groups=4)
    expected = torch.zeros_like(v)
    for i in range(30):
        for j in range(i + 1):
            left = decay[:, j + 1 : i + 1].sum(1).exp()
            expected[:, i] += (left * (q[:, i] * k[:, j]).sum(-1))[..., None] * v[:, j]
    assert apart(chunked_decay(q, k, v, decay, size=8)[0], expected) <= 1e-5


@pytest.mark.parametrize("length", [1, 9, SIZE + 3])
def test_mamba_2_against_transformers(length):
    oracle = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    q, k, v, decay, memory = decaying(length)
    a = -torch.rand(4, generator=generator(1, "a")) - 0.1
    dt = decay / a
    expected = oracle.mamba2_chunk_scan(v, dt, a, k, q, 16, initial_states=memory.mT, return_final_states=True)
    y, end = chunked_decay(q, k, v * dt[..., None], decay, memory)
    assert apart(y, expected[0]) <= 1e-5
    assert apart(end.mT, expected[1]) <= 1e-5


@pytest.mark.concept("X.06", part="nn/mamba.py")
@every_kind
@torch.no_grad()
def test_decoding_over_chunks_equals_training(spec):
    model, x, y = tiny(host(spec)), tokens(2, SIZE + 20), tokens(2, 6, seed=5)
    full = model(x).logits
    for pieces in ((SIZE + 1, *(1,) * 19), (SIZE // 2, 3, SIZE // 2 - 3, 20)):
        cache = model.cache(rows=2, capacity=SIZE + 26, rollback=3)
        assert deviations(torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split(pieces, 1)], 1), full) <= 2e-5
        cache.drop_last([3, 1])
        after = model(Inputs(y, cache=cache)).logits
        for row, end in enumerate((SIZE + 17, SIZE + 19)):
            assert deviations(after[row], model(torch.cat([x[row, :end], y[row]])[None]).logits[0, end:]) <= 2e-5


@pytest.mark.concept("X.06", part="nn/mamba.py")
@every_kind
def test_the_state_is_constant(spec):
    model = tiny(host(spec))
    memory, channels = (30 * 4, 30) if spec.kind == "mamba" else (4 * 6 * 5, 4 * 5 + 2 * 2 * 6)
    assert count.cache_bytes(model) == [0, 0]
    assert count.state_bytes(model) == [4 * (memory + 2 * channels)] * 2
    assert model.cache(3, 10).bytes == model.cache(3, 1000).bytes == 3 * sum(count.state_bytes(model))


@every_kind
def test_products_of_several_chunks(spec):
    segments = segments_of([[2 * SIZE + 3, 1, 20], [SIZE + 1, -5, SIZE + 18]], 2 * SIZE + 24)
    for lora in (None, LoRA(rank=2), LoRA(rank=2, targets=("x",)), LoRA(rank=2, targets=("C",)), LoRA(rank=2, targets=("dt",))):
        model = tiny(host(spec))
        if lora is not None:
            lora.apply(model)
        forward, backward = counted(model, segments)
        found = ours(model, segments)
        assert found.forward == pytest.approx(forward, rel=0.01)
        assert found.backward == pytest.approx(backward, rel=0.01)


@pytest.mark.parametrize("spec", [*KINDS, GatedDelta.tiny()], ids=lambda spec: spec.kind)
@torch.no_grad()
def test_products_of_decoding(spec):
    model = tiny(host(spec))
    cache = model.cache(rows=1, capacity=20)
    model(Inputs(tokens(1, 11), cache=cache))
    with counter() as mode:
        model(Inputs(tokens(1, 1), cache=cache))
    assert count.decoding_flops(model, held=11) == mode.get_total_flops()


def test_memory_grows_with_length_not_its_square():
    def peak(run, inputs) -> int:
        inputs = [x.requires_grad_() for x in inputs]
        with Ledger() as ledger:
            run(*inputs)[0].sum().backward()
        return ledger.peak["tensors"]

    assert peak(chunked_scan, selective(2048)[:5]) < 2.1 * peak(chunked_scan, selective(1024)[:5])
    assert peak(chunked_decay, decaying(2048)[:4]) < 2.1 * peak(chunked_decay, decaying(1024)[:4])


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_is_torchs(kernel, bias):
    conv, x = ShortConv(6, kernel, bias=bias), torch.randn(2, 9, 6, generator=generator(0, "x"))
    conv.reset()
    if conv.bias is not None:
        torch.nn.init.normal_(conv.bias)
    expected = F.silu(F.conv1d(F.pad(x.mT, (kernel - 1, 0)), conv.weight, conv.bias, groups=6).mT)
    step = Step.begin(Inputs(torch.zeros(2, 9, dtype=torch.int64)), causal=True)
    assert apart(conv(x, step, Handle()), expected) <= 1e-5
    first, state = conv._scan((x[:, :4],), None)
    second, end = conv._scan((x[:, 4:],), state)
    assert apart(F.silu(torch.cat([first, second], 1)), expected) <= 1e-5
    assert torch.equal(end[0], x[:, 9 - (kernel - 1) :])


@every_kind
def test_where_they_start(spec):
    model = initialize(build(host(spec), device="cpu"), seed=1)
    mixer = model.layers[0].mixer
    own = mixer.channels if spec.kind == "mamba" else mixer.decay
    dt, a = F.softplus(own.dt_bias), own.A_log.exp()
    assert 0.00099 < dt.min() < dt.max() < 0.101 and len(dt.unique()) == len(dt)
    if spec.kind == "mamba":
        assert apart(a, torch.arange(1.0, 5.0).expand(30, -1)) <= 1e-5
        assert (own.D == 1).all()
    else:
        assert a.min() >= 0.999 and a.max() <= 16.01 and (mixer.skip.D == 1).all()


def test_steps_can_be_limited():
    free, bound = (mamba2.Decay(3, limit) for limit in ((0.0, None), (0.1, 0.5)))
    for decay in (free, bound):
        decay.reset()
    x = torch.linspace(-9.0, 9.0, 12)[:, None].expand(-1, 3)
    assert apart(bound(x)[0], free(x)[0].clamp(0.1, 0.5)) <= 1e-5
    assert apart(bound(x)[1], -bound.A_log.exp() * bound(x)[0]) <= 1e-5


@every_kind
def test_a_prefix_cannot_see_itself(spec):
    with pytest.raises(ConfigError, match="prefix"):
        tiny(host(spec))(Inputs(tokens(1, 5), mask=Prefix(torch.tensor([2]))))


def test_heads_share_groups_evenly():
    with pytest.raises(ConfigError, match="multiple of groups"):
        validate(Mixer, {"kind": "mamba2", "heads": 4, "head_dim": 3, "groups": 3})
