"""The gated delta rule: its chunked form, its recurrent form, the paper's equation and transformers' two give one answer;
and the 3:1 hybrid with full attention, whose cache is that of the attention alone beside a constant."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_count import counted, ours
from tests.tiny import DIM, VOCAB, segments_of, tiny, tokens
from tests.tiny import apart as tiny_apart
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError
from trivium.core.seed import generator
from trivium.core.spec import validate
from trivium.models import count
from trivium.models.block import Block
from trivium.models.ledger import Ledger
from trivium.models.transformer import Transformer, TransformerModel, build, initialize
from trivium.nn.attention import Attention, Mixer
from trivium.nn.chunks import SIZE
from trivium.nn.delta import GatedDelta, chunked_gated_delta, recurrent_gated_delta, unit
from trivium.nn.feedforward import MLP
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs
from trivium.nn.norms import RMS
from trivium.nn.positions import Rope

# A larger eps than models have: a head's output may cancel to nearly nothing, and its norm would then be one of rounding.
DELTA = GatedDelta(key_heads=2, value_heads=4, key_dim=6, value_dim=5, kernel=3, norm=RMS(eps=0.01))
FULL = Attention(heads=4, kv_heads=2, head_dim=8, position=Rope(base=50.0), gate="channel")
LENGTHS = [1, 2, 7, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 5]


def given(length: int, *, rows: int = 2, keys: int = 2, values: int = 4, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k, v, log_decay, beta of some strength, and a memory."""
    g = generator(seed, "delta", length)
    q, k = (unit(torch.randn(rows, length, keys, 6, generator=g)) for _ in range(2))
    v = torch.randn(rows, length, values, 5, generator=g)
    decay, beta = -0.3 * torch.rand(rows, length, values, generator=g), torch.rand(rows, length, values, generator=g)
    return q * 6**-0.5, k, v, decay, beta, torch.randn(rows, values, 6, 5, generator=g)


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, absolute of what is small and relative of what is large."""
    return tiny_apart(actual, expected, unit=1 + expected.detach().abs())


def by_the_paper(q, k, v, log_decay, beta, memory):
    """S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T and o_t = S_t q_t (arXiv:2412.06464, equation 10), S [E, D];
    in float64, heads one by one."""
    q, k, v, log_decay, beta, memory = (x.double() for x in (q, k, v, log_decay, beta, memory))
    rows, length, heads = v.shape[:3]
    out, end = torch.zeros_like(v), torch.zeros_like(memory)
    for n in range(rows):
        for h in range(heads):
            state, of = memory[n, h].T, h // (heads // k.shape[2])
            for t in range(length):
                key = k[n, t, of]
                state = state @ (log_decay[n, t, h].exp() * (torch.eye(6) - beta[n, t, h] * torch.outer(key, key)).double())
                state = state + beta[n, t, h] * torch.outer(v[n, t, h], key)
                out[n, t, h] = state @ q[n, t, of]
            end[n, h] = state.T
    return out.float(), end.float()


@pytest.mark.concept("X.05", part="nn/delta.py")
def test_both_forms_are_the_equation():
    inputs = given(SIZE + 9)
    for form in (recurrent_gated_delta, chunked_gated_delta):
        for actual, expected in zip(form(*inputs), by_the_paper(*inputs), strict=True):
            assert apart(actual, expected) <= 1e-5


@pytest.mark.concept("X.05", part="nn/delta.py")
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_single_steps(length):
    *inputs, memory = given(length)
    for start in (memory, None):
        expected = recurrent_gated_delta(*inputs, start)
        for size in (None, 16, 5):
            for actual, wanted in zip(chunked_gated_delta(*inputs, start, size=size), expected, strict=True):
                assert apart(actual, wanted) <= 1e-5


@pytest.mark.concept("X.05", part="nn/delta.py")
@pytest.mark.parametrize("keys", [1, 2, 4])
def test_gradients_of_chunks_equal_those_of_single_steps(keys):
    inputs = [x.requires_grad_() for x in given(3 * 16 + 5, keys=keys)]
    weights = torch.randn(2, 53, 4, 5), torch.randn(2, 4, 6, 5)
    grads = []
    for form in (recurrent_gated_delta, lambda *x: chunked_gated_delta(*x, size=16)):
        y, memory = form(*inputs)
        grads.append(torch.autograd.grad((y * weights[0]).sum() + (memory * weights[1]).sum(), inputs))
    for actual, expected in zip(*grads, strict=True):
        assert apart(actual, expected) <= 5e-5


@pytest.mark.concept("X.05", part="nn/delta.py")
@pytest.mark.parametrize("length", [1, 7, SIZE, 2 * SIZE + 3])
def test_against_transformers(length):
    oracle = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, decay, beta, memory = given(length)
    options = {"initial_state": memory, "output_final_state": True}  # its queries are scaled inside
    for theirs in (oracle.torch_recurrent_gated_delta_rule, oracle.torch_chunk_gated_delta_rule):
        expected = theirs(q * 6**0.5, k, v, decay, beta, **options)
        for form in (recurrent_gated_delta, chunked_gated_delta):
            for actual, wanted in zip(form(q, k, v, decay, beta, memory), expected, strict=True):
                assert apart(actual, wanted) <= 1e-5


def test_against_the_naive_form_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    q, k, v, decay, beta, memory = given(90, keys=4)
    expected = naive.naive_recurrent_gated_delta_rule(q * 6**0.5, k, v, beta, decay, initial_state=memory, output_final_state=True)
    for actual, wanted in zip(chunked_gated_delta(q, k, v, decay, beta, memory), expected, strict=True):
        assert apart(actual, wanted) <= 1e-5


def test_one_key_written_over_and_over_holds_the_last_value():
    """No decay, beta one, the same key: the hardest system to solve in chunks, for powers of its matrix grow without end."""
    _, k, v, *_ = given(200)
    k = k[:, :1].expand_as(k)
    ones = torch.ones(2, 200, 4)
    for form in (recurrent_gated_delta, chunked_gated_delta):
        y, memory = form(k, k, v, 0 * ones, ones)
        assert apart(y, v) <= 1e-4
        assert apart(torch.einsum("nhd,nhde->nhe", k[:, 0].repeat_interleave(2, 1), memory), v[:, -1]) <= 1e-4


def test_what_fades_at_once_stays_finite():
    inputs = [x.requires_grad_() for x in given(100)[:5]]
    decay = inputs[3] - 200.0
    y, memory = chunked_gated_delta(*inputs[:3], decay, inputs[4])
    assert apart(y, recurrent_gated_delta(*inputs[:3], decay, inputs[4])[0]) <= 1e-5
    grads = torch.autograd.grad(y.square().sum() + memory.sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)


def test_one_token_that_forgets_all_blurs_no_other():
    q, k, v, decay, beta, memory = given(50)
    decay = decay * torch.where(torch.arange(50) == 20, 1e5, 1.0)[:, None]
    inputs = (q, k, v, decay, beta, memory)
    for actual, expected in zip(chunked_gated_delta(*inputs), recurrent_gated_delta(*inputs), strict=True):
        assert apart(actual, expected) <= 1e-5


def hybrid() -> Transformer:
    """Three layers of the delta rule, then one of full attention, twice; the blocks differ in more than their mixers."""
    return Transformer(
        dim=DIM,
        vocab=VOCAB,
        layers="2*(3*delta full)",
        blocks={
            "delta": Block(mixer=DELTA, ffn=MLP(hidden=40)),
            "full": Block(mixer=FULL, ffn=MLP(hidden=32), norm_at="sandwich"),
        },
        head=LMHead(tied=False),
    )


@torch.no_grad()
def made() -> TransformerModel:
    """A hybrid whose queries and keys are far from zero, where the direction of so short a vector would be mostly rounding."""
    model = tiny(hybrid())
    for name, parameter in model.named_parameters():
        if name.endswith("conv.weight"):
            parameter.mul_(6)
    return model


def deviations(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in standard deviations."""
    return tiny_apart(actual, expected, unit=expected.std())


@pytest.mark.concept("X.05", part="nn/delta.py")
@torch.no_grad()
def test_a_hybrid_decodes_what_it_was_trained_on():
    """Over several chunks, one token at a time and in uneven pieces; and again after tokens were taken back."""
    model, x, y = made(), tokens(2, SIZE + 30), tokens(2, 6, seed=5)
    full = model(x).logits
    for pieces in ((SIZE + 1, *(1,) * 29), (SIZE // 2, 3, SIZE // 2 - 3, 20, 10)):
        cache = model.cache(rows=2, capacity=SIZE + 36, rollback=4)
        assert deviations(torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split(pieces, 1)], 1), full) <= 2e-5
        cache.drop_last([3, 1])
        after = model(Inputs(y, cache=cache)).logits
        for row, end in enumerate((SIZE + 27, SIZE + 29)):
            assert deviations(after[row], model(torch.cat([x[row, :end], y[row]])[None]).logits[0, end:]) <= 2e-5


@pytest.mark.concept("X.05", part="nn/delta.py")
def test_a_hybrid_keeps_documents_apart():
    model, x = made(), tokens(3, 90)
    segments = segments_of([[40, 3, 47], [-5, 80, 1], [1, 89]], 90)
    together = model(Inputs(x, segments=segments)).logits
    for row in range(3):
        for document in segments[row][segments[row] >= 0].unique():
            at = (segments[row] == document).nonzero()[:, 0]
            assert deviations(together[row, at], model(x[row, at][None]).logits[0]) <= 5e-5


@pytest.mark.concept("X.05", part="nn/delta.py")
def test_a_hybrid_caches_its_attention_and_a_constant():
    model = tiny(hybrid())
    per_token, constant = count.cache_bytes(model), count.state_bytes(model)
    keys_and_values = 2 * FULL.kv_heads * FULL.head_dim * 4
    assert per_token == [0, 0, 0, keys_and_values] * 2
    memory, channels = 4 * 6 * 5, 2 * 2 * 6 + 4 * 5
    assert constant == [4 * (memory + 2 * channels)] * 3 + [0] + [4 * (memory + 2 * channels)] * 3 + [0]
    for rows, capacity in ((1, 10), (3, 1000)):
        assert model.cache(rows, capacity).bytes == rows * (capacity * sum(per_token) + sum(constant))
    half = build(hybrid(), dtype=torch.bfloat16)  # the memory stays in float32, the convolution's inputs do not
    assert count.state_bytes(half)[0] == 4 * memory + 2 * 2 * channels


def test_products_of_several_chunks():
    """Documents of several chunks, of one and of a single token; and with adapters on frozen weights."""
    segments = segments_of([[2 * SIZE + 3, 1, 20], [SIZE + 1, -5, SIZE + 18]], 2 * SIZE + 24)
    for lora in (None, LoRA(rank=2), LoRA(rank=2, targets=("k",)), LoRA(rank=2, targets=("out",))):
        model = tiny(hybrid().replace(layers="2*delta full"))
        if lora is not None:
            lora.apply(model)
        forward, backward = counted(model, segments)
        found = ours(model, segments)
        assert found.forward == pytest.approx(forward, rel=0.01)
        assert found.backward == pytest.approx(backward, rel=0.01)


def test_memory_grows_with_length_not_its_square():
    """The peak of a forward and backward: twice the length, twice the bytes."""

    def peak(length: int) -> int:
        inputs = [x.requires_grad_() for x in given(length)[:5]]
        with Ledger() as ledger:
            chunked_gated_delta(*inputs)[0].sum().backward()
        return ledger.peak["tensors"]

    assert peak(2048) < 2.1 * peak(1024)


def test_where_it_starts():
    model = initialize(build(hybrid(), device="cpu"), seed=1)
    decay = model.layers[0].mixer.decay
    dt = torch.nn.functional.softplus(decay.dt_bias)
    assert 0.00099 < dt.min() < dt.max() < 0.101 and decay.A_log.exp().min() >= 0.999 and decay.A_log.exp().max() <= 16.01
    weight = model.layers[0].mixer.conv.weight
    assert weight.abs().max() <= 3**-0.5 and weight.std() > 0.2
    assert model(tokens(1, 9)).logits.isfinite().all()


def test_value_heads_are_shared_evenly():
    with pytest.raises(ConfigError, match="multiple of key_heads"):
        validate(Mixer, {"kind": "gated_delta", "key_heads": 3, "value_heads": 4, "key_dim": 2, "value_dim": 2})
