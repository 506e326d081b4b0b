"""Perplexity: a uniform model, a loop over transformers, windows, and independence of the tokenizer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.evaluate import subject as ours
from tests.evaluate import toys
from trivium.core.errors import ConfigError, DataError
from trivium.data.rows import Record
from trivium.evaluate.perplexity import Document, Perplexity, document, negative_log_likelihoods, terms, windows
from trivium.evaluate.results import summarize
from trivium.nn.inputs import Inputs, Output


class Constant(nn.Module):
    """Every next token has the same given distribution, whatever came before."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: Inputs, *, keep: torch.Tensor) -> Output:
        return Output(torch.empty(0), self.logits.expand(int(keep.sum()), -1))


def records(rows: list[dict]) -> list[Record]:
    return [Record(row, "toy.jsonl", line) for line, row in enumerate(rows, 1)]


def value(documents: list[Document], nlls: list[float], metric: str) -> float:
    parts = [terms(one, nll)[metric] for one, nll in zip(documents, nlls, strict=True)]
    ratio = sum(part.numerator for part in parts) / sum(part.denominator for part in parts)
    return ratio if metric == "bits_per_byte" else math.exp(ratio)


@pytest.mark.concept("T18.07", part="evaluate/perplexity.py")
def test_a_uniform_model_has_exactly_the_perplexity_of_its_vocabulary():
    documents = [Document(tuple(range(size)), size, 1) for size in (2, 7, 30)]
    for vocab in (1, 2, 64, 1024):  # powers of two: no rounding in log and exp of the ratio
        nlls = negative_log_likelihoods(Constant(torch.zeros(vocab)), [Document((0,) * len(one.ids), 1, 1) for one in documents])
        assert value(documents, nlls, "perplexity") == pytest.approx(vocab, rel=1e-7)


@pytest.mark.concept("T18.07", part="evaluate/perplexity.py")
@pytest.mark.parametrize("stride", [1, 5, 11])
def test_equals_a_loop_over_transformers(stride):
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in toys.CONFIG.items() if key != "architectures"}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, vocab_size=toys.vocab())).eval()
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in toys.weights().items()})
    context, tokenizer = 12, ours.tokenizer()
    documents = [document(tokenizer, row["text"]) for row in toys.texts()]
    total, count = 0.0, 0
    for one in documents:
        ids, previous = torch.tensor([one.ids]), 0
        for begin in range(0, ids.shape[1], stride):  # the loop of transformers' documentation, without its averaging
            end = min(begin + context, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, : -(end - previous)] = -100
            with torch.no_grad():
                logits = theirs(ids[:, begin:end]).logits
            total += nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum").item()
            count += int((labels[0, 1:] != -100).sum())
            previous = end
            if end == ids.shape[1]:
                break
    assert count == sum(len(one.ids) - 1 for one in documents)
    nlls = negative_log_likelihoods(ours.model(), documents, context=context, stride=stride, tokens=64)
    assert sum(nlls) / count == pytest.approx(total / count, abs=1e-5)


@pytest.mark.concept("T18.07", part="evaluate/perplexity.py")
def test_equals_torchmetrics_on_the_same_logits():
    oracle = pytest.importorskip("torchmetrics.text").Perplexity()
    model, tokenizer = ours.model(), ours.tokenizer()
    documents = [document(tokenizer, row["text"]) for row in toys.texts()]
    for one in documents:
        ids = torch.tensor([one.ids])
        with torch.no_grad():
            oracle.update(model(ids).logits[:, :-1], ids[:, 1:])
    found = value(documents, negative_log_likelihoods(model, documents), "perplexity")
    assert found == pytest.approx(oracle.compute().item(), rel=1e-5)


@pytest.mark.concept("T18.07", part="evaluate/perplexity.py")
def test_windows_differ_from_full_context_only_where_they_cut():
    model, tokenizer = ours.model(), ours.tokenizer()
    documents = [document(tokenizer, row["text"]) for row in toys.texts()]
    full = negative_log_likelihoods(model, documents)
    for stride in (1, 12, 23):
        cut = negative_log_likelihoods(model, documents, context=24, stride=stride)
        for one, a, b in zip(documents, full, cut, strict=True):
            assert (abs(a - b) > 1e-2) == (len(one.ids) > 24)
    longest = max(len(one.ids) for one in documents)
    assert negative_log_likelihoods(model, documents, context=longest, stride=1) == full


@pytest.mark.concept("T18.07", part="evaluate/perplexity.py")
def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """Independent letters, read one by one or in pairs: the same text, the same bits per byte, but not the same perplexity."""
    letter = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    pair = (letter[:, None] + letter[None, :]).flatten()
    text = [0, 1, 3, 2, 0, 0, 1, 2]
    singles = Document((0, *text), len(text), 1)
    pairs = Document((0, *(4 * a + b for a, b in zip(text[::2], text[1::2], strict=True))), len(text), 1)
    one = negative_log_likelihoods(Constant(letter), [singles])
    two = negative_log_likelihoods(Constant(pair), [pairs])
    expected = -sum(letter[i].item() for i in text) / math.log(2) / len(text)
    assert value([singles], one, "bits_per_byte") == pytest.approx(expected, rel=1e-6)
    assert value([pairs], two, "bits_per_byte") == pytest.approx(expected, rel=1e-6)
    assert value([pairs], two, "perplexity") > value([singles], one, "perplexity") * 1.5


@pytest.mark.concept("T18.07", part="evaluate/perplexity.py")
def test_equals_lm_evals_rolling_perplexity():
    fixture = json.loads((ours.HERE / "lm_eval.json").read_text())
    samples = Perplexity(data=("toy.jsonl",)).run(ours.subject(), records(fixture["rows"]["perplexity"]))
    measured = summarize(samples, Perplexity(data=("toy.jsonl",)).metrics())
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert measured[name].value == pytest.approx(fixture["metrics"]["perplexity"][name], rel=1e-5)
    assert measured["perplexity"].low < measured["perplexity"].value < measured["perplexity"].high


@given(st.integers(2, 60), st.integers(2, 20), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_predict_every_token_once_with_enough_before_it(length, context, data):
    stride = data.draw(st.none() | st.integers(1, context - 1))
    found = windows(length, context=context, stride=stride)
    assert [i for window in found for i in range(window.start, window.end)] == list(range(1, length))
    for window in found:
        assert window.end - window.begin <= context
        assert window.start - window.begin >= min(1 if stride is None else context - stride, window.start)


def test_windows_refuse_what_cannot_cover():
    assert windows(1) == []
    with pytest.raises(ConfigError, match="stride must lie between 1 and context - 1 = 7"):
        windows(20, context=8, stride=8)


def test_the_models_own_context_is_the_default_and_is_kept():
    subject = ours.subject()
    long = records([{"text": "the answer is water " * 120}])
    task = Perplexity(data=("x.jsonl",))
    (sample,) = task.run(subject, long)
    assert len(sample.prompt) > 256
    (same,) = task.replace(context=256).run(subject, long)
    (other,) = task.replace(context=100).run(subject, long)
    assert same.terms == sample.terms != other.terms


def test_a_tokenizer_without_a_start_token_leaves_the_first_token_out():
    tokenizer = ours.tokenizer()
    with_start = document(tokenizer, "étoile filante")
    tokenizer.eos = None
    without = document(tokenizer, "étoile filante")
    assert with_start.ids[1:] == without.ids
    assert with_start.bytes == 15 and without.bytes == 13  # é is one token of two bytes
    assert without.words == 2


def test_rows_that_do_not_fit():
    task = Perplexity(data=("x.jsonl",))
    with pytest.raises(DataError, match=r"toy.jsonl:2: it has no 'text' \(columns: prose\)"):
        task.run(ours.subject(), records([{"text": "a b"}, {"prose": "c"}]))
    with pytest.raises(DataError, match=r"toy.jsonl:1: its text has no token to predict"):
        task.run(ours.subject(), records([{"text": ""}]))
