"""Next-token prediction against torch's and transformers' losses, values and gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from trivium.adapt.lora import LoRA
from trivium.core.spec import validate
from trivium.data.batch import Batch
from trivium.kernels import native
from trivium.models.presets import presets
from trivium.models.transformer import build, initialize
from trivium.nn.heads import LanguageHead
from trivium.nn.inputs import Inputs
from trivium.train import cross_entropy
from trivium.train.cross_entropy import cross_entropy_sum, linear_cross_entropy_sum
from trivium.train.objectives import NextToken, Objective

from .toys import VOCAB, Rows, model


def draw(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.concept("X.18", part="train/cross_entropy.py")
@pytest.mark.concept("T05.01", part="train/objectives.py")
@given(st.integers(1, 40), st.integers(2, 50), st.sampled_from([0.0, 0.1, 0.7]), st.sampled_from([1, 64, 1 << 20]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_cross_entropy_is_torchs(rows, vocab, smoothing, chunk, compiled):
    logits, labels = draw(rows, vocab)
    theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    (expected,) = torch.autograd.grad(theirs * 0.7, logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK", chunk)
        with nullcontext() if compiled else native.switched_off():
            ours = cross_entropy_sum(logits, labels, label_smoothing=smoothing)
    (found,) = torch.autograd.grad(ours * 0.7, logits)
    assert abs(ours - theirs) <= 1e-6 * abs(theirs)
    assert (found - expected).abs().max() <= 1e-6


@pytest.mark.concept("X.18", part="train/cross_entropy.py")
@pytest.mark.parametrize("at_once", [1, 100, 1 << 24])
@pytest.mark.parametrize("trained", ["hidden", "table", "both"])
@pytest.mark.parametrize("compiled", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_linear_cross_entropy_is_the_product_and_the_loss(at_once, trained, compiled, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", at_once)
    monkeypatch.setattr(cross_entropy, "LOGITS_TRAINED", at_once)
    generator = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(n, 12, generator=generator, dtype=torch.float64).to(dtype) for n in (17, 23))
    labels = torch.randint(23, (17,), generator=generator)
    leaves = [x.requires_grad_() for x, name in ((hidden, "hidden"), (table, "table")) if trained in (name, "both")]
    exact = F.cross_entropy(hidden.double() @ table.double().t(), labels, reduction="sum", label_smoothing=0.1)
    with nullcontext() if compiled else native.switched_off():
        ours = linear_cross_entropy_sum(hidden, table, labels, label_smoothing=0.1)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    assert abs(ours - exact) <= tolerance * exact
    for found, expected in zip(torch.autograd.grad(ours * 0.7, leaves), torch.autograd.grad(exact * 0.7, leaves), strict=True):
        assert found.dtype == dtype and (found - expected).abs().max() <= tolerance * 2 * expected.abs().max()


def test_linear_cross_entropy_of_nothing():
    hidden, table = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    loss = linear_cross_entropy_sum(hidden, table, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 4) and not table.grad.any()


@pytest.mark.parametrize("tied", [True, False])
def test_the_objective_skips_the_logits_only_where_the_head_is_a_product(tied, monkeypatch):
    """The same loss and gradients with the head's table as through the head; an adapted head goes through it."""
    spec = presets.get("tiny-llama")()
    spec = spec.replace(head=spec.head.replace(tied=tied))
    trained, batch = build(spec, device="cpu"), Rows().batch(0)
    initialize(trained, seed=0)
    found = []
    for table in (LanguageHead.table, lambda head, embed: None):
        monkeypatch.setattr(LanguageHead, "table", table)
        loss = NextToken().terms(trained, batch)["loss"]
        found.append([loss, *torch.autograd.grad(loss, list(trained.parameters()))])
    monkeypatch.undo()
    for ours, naive in zip(*found, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-5 * float(naive.detach().abs().max()))
    assert trained.head.table(trained.embed) is (trained.embed.weight if tied else trained.head.out.weight)
    if not tied:
        LoRA(rank=2, targets=("head.out",)).apply(trained)
        assert trained.head.table(trained.embed) is None


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
