"""Prefix language models (arXiv:1910.10683): the tokens of a prefix see one another, what follows sees what came before."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import DIM, apart, host, segments_of, tiny, tokens
from trivium.models.transformer import TransformerModel, build
from trivium.nn.attention import Attention, use_backend
from trivium.nn.inputs import Inputs, Prefix
from trivium.nn.positions import Rope

PART = Attention(heads=6, kv_heads=2, head_dim=8, position=Rope(base=50.0))
LENGTHS = torch.tensor([5, 0, 8, 3])


def model(*, causal: bool = True) -> TransformerModel:
    return tiny(host(PART, causal=causal))


def test_the_mask_is_the_matrix_it_is_said_to_be():
    """Weights are positive where the explicit matrix has a one, and zero elsewhere; the prefix is one of each document."""
    x, segments = tokens(2, 9), segments_of([[9], [6, 3]], 9)
    lengths = [4, 2]
    weights = model()(Inputs(x, segments=segments, mask=Prefix(torch.tensor(lengths))), weights=True).aux.weights[0]
    expected = torch.zeros(2, 9, 9, dtype=torch.bool)
    for row, begin, end in ((0, 0, 9), (1, 0, 6), (1, 6, 9)):
        expected[row, begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        expected[row, begin : begin + lengths[row], begin : begin + lengths[row]] = True
    assert torch.equal(weights[:, 0] > 0, expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_a_prefix_depends_on_all_of_itself_and_on_nothing_after(backend):
    subject, count = model(), 9
    use_backend(subject, backend)
    embeds = torch.randn(4, count, DIM, requires_grad=True, generator=torch.Generator().manual_seed(0))
    logits = subject(Inputs(embeds=embeds, mask=Prefix(LENGTHS))).logits
    for t in range(count):
        (grad,) = torch.autograd.grad(logits[:, t].sum(), embeds, retain_graph=True)
        depends = grad.abs().amax(-1) > 0
        for row, length in enumerate(LENGTHS.tolist()):
            assert depends[row].tolist() == [s < length if t < length else s <= t for s in range(count)]


def test_no_prefix_is_a_causal_model_and_a_whole_one_an_encoder():
    """To the bit."""
    subject, encoder, x = model(), model(causal=False), tokens(2, 9)
    for one in (subject, encoder):
        use_backend(one, "eager")
    none, whole = (subject(Inputs(x, mask=Prefix(torch.full((2,), n)))).logits for n in (0, 9))
    assert torch.equal(none, subject(x).logits) and torch.equal(whole, encoder(x).logits)
    assert torch.equal(whole, subject(Inputs(x, mask="full")).logits) and not torch.allclose(none, whole)


def test_packed_and_padded_documents_have_the_prefix_of_their_row():
    subject, x = model(), tokens(2, 10)
    segments, lengths = segments_of([[6, 4], [-2, 7]], 10), torch.tensor([3, 5])
    together = subject(Inputs(x, segments=segments, mask=Prefix(lengths))).logits
    for row, begin, end in ((0, 0, 6), (0, 6, 10), (1, 2, 9)):
        alone = subject(Inputs(x[row, begin:end][None], mask=Prefix(lengths[row : row + 1]))).logits
        assert apart(together[row, begin:end], alone[0]) <= 2e-5


@pytest.mark.parametrize("chunks", [(1, 1, 1), (3,), (2, 1)], ids=str)
def test_decoding_after_the_prefix_equals_the_full_forward(chunks):
    """The prefix is fed whole, rows of other lengths in one batch; what follows needs no mask."""
    subject, longest, new = model(), 8, 3
    lengths = torch.tensor([5, 8, 2])
    x, y = tokens(3, longest), tokens(3, new, seed=1)
    segments = segments_of([[n] for n in lengths.tolist()], longest)
    cache = subject.cache(rows=3, capacity=longest + new)
    with torch.inference_mode():
        first = subject(Inputs(x, segments=segments, mask=Prefix(lengths), cache=cache)).logits
        rest = torch.cat([subject(Inputs(piece, cache=cache)).logits for piece in y.split(chunks, 1)], 1)
        for row, n in enumerate(lengths.tolist()):
            whole = torch.cat([x[row, :n], y[row]])[None]
            full = subject(Inputs(whole, mask=Prefix(lengths[row : row + 1]))).logits[0]
            assert apart(torch.cat([first[row, :n], rest[row]]), full) <= 2e-5


def test_gradients_reach_every_parameter_through_the_prefix():
    subject = model()
    subject(Inputs(tokens(4, 9), mask=Prefix(LENGTHS))).logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0 for parameter in subject.parameters())


def test_lengths_are_one_a_row():
    with pytest.raises(ValueError, match="mask must be"):
        build(host(PART))(Inputs(tokens(2, 3), mask=Prefix(torch.tensor([1]))))
