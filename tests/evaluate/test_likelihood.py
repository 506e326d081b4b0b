"""Scores do not depend on what shares their batch, and are those of a plain forward."""

from __future__ import annotations

import pytest
import torch

from tests.evaluate import subject as ours
from tests.evaluate import toys
from trivium.core.errors import DataError
from trivium.evaluate import likelihood
from trivium.evaluate.likelihood import Request, likelihoods


def requests() -> list[Request]:
    tokenizer = ours.tokenizer()
    rows = [tokenizer.encode(row["question"]) for row in toys.questions(30)]
    return [Request(ids, 1 + index % (len(ids) - 1)) for index, ids in enumerate(rows)]


def test_scores_equal_a_plain_forward_row_by_row():
    model = ours.model()
    for request, found in zip(requests(), likelihoods(model, requests()), strict=True):
        with torch.no_grad():
            table = model(torch.tensor([request.ids])).logits[0].log_softmax(-1)
        places = range(request.start, len(request.ids))
        assert found.logprobs == pytest.approx([table[i - 1, request.ids[i]].item() for i in places], abs=2e-5)
        assert found.greedy == all(table[i - 1].argmax() == request.ids[i] for i in places)
        assert found.total == pytest.approx(sum(found.logprobs))


@pytest.mark.concept("X.97", part="evaluate/likelihood.py")
def test_scores_do_not_depend_on_the_batch(monkeypatch):
    model, asked = ours.model(), requests()
    alone = likelihoods(model, asked, tokens=1)
    for tokens in (40, 200, 10_000):
        together = likelihoods(model, asked, tokens=tokens)
        assert [one.total for one in together] == pytest.approx([one.total for one in alone], abs=2e-4)
        assert [one.greedy for one in together] == [one.greedy for one in alone]
    monkeypatch.setattr(likelihood, "_CHUNK", 500)  # a logit table in many pieces
    assert [one.total for one in likelihoods(model, asked)] == pytest.approx([one.total for one in alone], abs=2e-4)
    shuffled = likelihoods(model, asked[::-1])[::-1]
    assert [one.total for one in shuffled] == pytest.approx([one.total for one in alone], abs=2e-4)


def test_batches_keep_within_the_tokens_given():
    asked = requests()
    for tokens in (1, 30, 100):
        batches = list(likelihood.batched([len(request.ids) - 1 for request in asked], tokens))
        assert sorted(index for batch in batches for index in batch) == list(range(len(asked)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(len(asked[i].ids) - 1 for i in batch) <= tokens


def test_the_models_mode_is_put_back():
    model = ours.model().train()
    likelihoods(model, requests()[:1])
    assert model.training
    likelihoods(model.eval(), requests()[:1])
    assert not model.training


@pytest.mark.parametrize(("ids", "start"), [([1, 2], 0), ([1, 2], 2), ([1], 1), ([], 1)])
def test_a_request_needs_something_before_and_something_to_score(ids, start):
    with pytest.raises(DataError, match="at least one token before"):
        likelihoods(ours.model(), [Request(ids, start)])
