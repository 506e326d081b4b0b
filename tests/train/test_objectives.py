"""Next-token prediction against torch's and transformers' losses, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from trivium.core.spec import validate
from trivium.data.batch import Batch
from trivium.nn.inputs import Inputs
from trivium.train import cross_entropy
from trivium.train.cross_entropy import cross_entropy_sum
from trivium.train.objectives import NextToken, Objective

from .toys import VOCAB, Rows, model


def draw(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.concept("X.18", part="train/cross_entropy.py")
@pytest.mark.concept("T05.01", part="train/objectives.py")
@given(st.integers(1, 40), st.integers(2, 50), st.sampled_from([0.0, 0.1, 0.7]), st.sampled_from([1, 64, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_cross_entropy_is_torchs(rows, vocab, smoothing, chunk):
    logits, labels = draw(rows, vocab)
    theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    (expected,) = torch.autograd.grad(theirs * 0.7, logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK", chunk)
        ours = cross_entropy_sum(logits, labels, label_smoothing=smoothing)
    (found,) = torch.autograd.grad(ours * 0.7, logits)
    assert abs(ours - theirs) <= 1e-6 * abs(theirs)
    assert (found - expected).abs().max() <= 1e-6


@pytest.mark.concept("X.18", part="train/cross_entropy.py")
def test_cross_entropy_of_fp64_is_computed_in_fp64():
    logits, labels = draw(5, 7, torch.float64)
    (found,) = torch.autograd.grad(cross_entropy_sum(logits, labels, label_smoothing=0.2), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="sum"), logits)
    assert (found - expected).abs().max() < 1e-14


def test_cross_entropy_of_bf16_is_computed_in_fp32():
    logits, labels = draw(64, 200, torch.bfloat16)
    ours = cross_entropy_sum(logits, labels)
    exact = logits.detach().float().requires_grad_()
    theirs = F.cross_entropy(exact, labels, reduction="sum")
    (found,) = torch.autograd.grad(ours, logits)
    (expected,) = torch.autograd.grad(theirs, exact)
    assert ours.dtype == torch.float32 and abs(ours - theirs) < 1e-6 * theirs
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())


def test_without_gradients_none_is_computed_and_a_second_backward_is_an_error():
    logits, labels = draw(3, 5)
    with torch.no_grad():
        assert not cross_entropy_sum(logits, labels).requires_grad
    loss = cross_entropy_sum(logits, labels)
    loss.backward(torch.tensor(0.5), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.concept("T05.01", part="train/objectives.py")
def test_loss_is_transformers_causal_loss():
    """Shifted, with what is no target ignored."""
    batch, trained = Rows().batch(0), model()
    logits = trained(Inputs(batch.tokens, segments=batch.segments)).logits
    labels = batch.tokens.masked_fill(~batch.targets, -100)
    theirs = ForCausalLMLoss(logits, labels, VOCAB)
    objective = NextToken()
    ours = objective.terms(trained, batch)["loss"] / objective.weights(batch)["loss"]
    assert abs(ours - theirs) < 1e-6 * abs(theirs)


def unpacked(batch: Batch) -> Batch:
    """Each document in its own row."""
    documents = [(row, segment) for row in range(len(batch.tokens)) for segment in batch.segments[row].unique().tolist() if segment >= 0]
    parts = {name: torch.zeros(len(documents), batch.tokens.shape[1], dtype=getattr(batch, name).dtype) for name in ("tokens", "targets")}
    segments = torch.full_like(parts["tokens"], -1)
    for index, (row, segment) in enumerate(documents):
        chosen = batch.segments[row] == segment
        for name, part in parts.items():
            part[index, : chosen.sum()] = getattr(batch, name)[row, chosen]
        segments[index, : chosen.sum()] = 0
    return Batch(segments=segments, **parts)


@pytest.mark.concept("T05.01", part="train/objectives.py")
def test_packed_is_unpacked_with_gradients():
    packed = Rows(rows=5).batch(1)
    apart = unpacked(packed)
    assert len(apart.tokens) == 10 and apart.targets.sum() == packed.targets.sum()
    found = []
    for batch in (packed, apart):
        trained = model()
        loss = NextToken().terms(trained, batch)["loss"]
        loss.backward()
        found.append((loss.detach(), {name: param.grad for name, param in trained.named_parameters()}))
    (loss, grads), (expected, expected_grads) = found
    assert abs(loss - expected) < 1e-5 * expected
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() < 1e-5 * max(1.0, expected_grads[name].abs().max()), name
    leaking = Batch(packed.tokens, packed.segments.clamp(max=0), packed.targets)  # one document a row: what packing must not be
    assert abs(NextToken().terms(model(), leaking)["loss"] - expected) > 1e-3 * expected


def test_an_objective_is_found_by_its_kind():
    assert validate(Objective, {"kind": "next_token", "label_smoothing": 0.1}) == NextToken(label_smoothing=0.1)
