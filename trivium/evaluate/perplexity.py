"""Perplexity of documents, and the same number per byte and per word, which models with other tokenizers can be compared by.

Every token of a document is predicted exactly once, the first one from a start token (the tokenizer's BOS, else its EOS, as in lm-eval).
A document longer than the context is read in windows that move on by `stride`: each token then has at least `context - stride` before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from ..checks.metrics import Term
from ..core.errors import ConfigError, DataError
from ..data.rows import Record
from ..models.context import check_length
from .likelihood import Request, likelihoods
from .task import Finish, Sample, Subject, Task, column, key

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first is given and the rest are predicted; what they spell has so many UTF-8 bytes and words."""

    ids: tuple[int, ...]
    bytes: int
    words: int


@dataclass(frozen=True)
class Window:
    """The model reads ids[begin:end] and predicts ids[start:end]."""

    begin: int
    start: int
    end: int


def windows(length: int, *, context: int | None = None, stride: int | None = None) -> list[Window]:
    """Windows that predict ids 1 to `length` - 1 once each. `context` None reads everything at once; `stride` None is `context` - 1."""
    if length < 2:
        return []
    if context is None or context >= length:
        return [Window(0, 1, length)]
    step = context - 1 if stride is None else stride
    if not 1 <= step < context:
        raise ConfigError(f"stride must lie between 1 and context - 1 = {context - 1}, got {step}", field="stride", value=step)
    found = [Window(0, 1, context)]
    while found[-1].end < length:
        last = found[-1]
        found.append(Window(last.begin + step, last.end, min(last.end + step, length)))
    return found


def negative_log_likelihoods(
    model: nn.Module, documents: Sequence[Document], *, context: int | None = None, stride: int | None = None, tokens: int = 2048
) -> list[float]:
    """Each document's negative log-likelihood, in nats."""
    cut = [windows(len(document.ids), context=context, stride=stride) for document in documents]
    requests = [
        Request(document.ids[window.begin : window.end], window.start - window.begin)
        for document, parts in zip(documents, cut, strict=True)
        for window in parts
    ]
    scores = iter(likelihoods(model, requests, tokens=tokens))
    return [-math.fsum(next(scores).total for _ in parts) for parts in cut]


def terms(document: Document, nll: float) -> dict[str, Term]:
    """One document's share of every metric."""
    return {
        "perplexity": Term(nll, len(document.ids) - 1),
        "bits_per_byte": Term(nll / math.log(2), document.bytes),
        "byte_perplexity": Term(nll, document.bytes),
        "word_perplexity": Term(nll, document.words),
    }


def document(tokenizer: Tokenizer, text: str) -> Document:
    """A text with its start token. A tokenizer that has neither BOS nor EOS leaves the first token, and its bytes, unpredicted."""
    ids = tokenizer.encode(text, bos=False)
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    size = len(text.encode())
    if start is not None:
        return Document((start, *ids), size, len(text.split()))
    return Document(tuple(ids), size - len(tokenizer.decode(ids[:1]).encode()), len(text.split()))


class Perplexity(Task):
    """Perplexity on texts. The main metric is e to the mean negative log-likelihood of a token."""

    kind: Literal["perplexity"] = "perplexity"
    column: str = Field("text", description="the column that holds the text")
    context: int | None = Field(None, ge=2, description="most tokens read at once; the default is the model's own context")
    stride: int | None = Field(None, ge=1, description="how far a window moves on; less is slower and gives each token more context")

    def metrics(self) -> dict[str, Finish]:
        return {"perplexity": "exp_ratio", "bits_per_byte": "ratio", "byte_perplexity": "exp_ratio", "word_perplexity": "exp_ratio"}

    def run(self, subject: Subject, records: Sequence[Record]) -> list[Sample]:
        documents = []
        for record in records:
            documents.append(document(subject.tokenizer, str(column(record, self.column))))
            if len(documents[-1].ids) < 2:
                raise DataError(f"{record.where}: its text has no token to predict")
        context = self.context if self.context is not None else subject.model.spec.context
        if self.context is not None:
            check_length(subject.model.spec.context, self.context, what="task.context: is", field="task.context")
        nlls = negative_log_likelihoods(subject.model, documents, context=context, stride=self.stride, tokens=subject.tokens)
        return [
            Sample(key(record), one.ids, terms(one, nll), {"tokens": len(one.ids) - 1, "bytes": one.bytes, "nll": nll})
            for record, one, nll in zip(records, documents, nlls, strict=True)
        ]
