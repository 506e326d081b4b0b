"""Classification: the class that a classifier gives each text, with accuracy, F1 of each class and of all, and who is taken for whom.

Accuracy and each class's F1 are sums of terms over rows, as all metrics here; macro F1, a mean of such ratios, stands in the
report with its own interval over the same rows, as does the confusion table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..checks import bootstrap
from ..checks.metrics import Term
from ..core.errors import ConfigError
from ..data.classes import class_of, cut, document
from ..data.rows import Record
from ..models.transformer import TransformerModel
from ..nn.heads_task import ClassifierHead
from ..nn.inputs import Inputs
from .likelihood import batched, evaluating
from .task import Finish, Sample, Subject, Task, key


class Classification(Task):
    """Give each text one of `names`. Accuracy is the main metric."""

    kind: Literal["classification"] = "classification"
    names: tuple[str, ...] = Field(min_length=2, description="the classes, in the order of the model's scores")
    text: str = Field("text", description="the column of the text")
    label: str = Field("label", description="the column of the right class: its name, or its number from 0")
    length: int | None = Field(None, ge=2, description="longer texts are cut to so many tokens")

    def metrics(self) -> dict[str, Finish]:
        return dict.fromkeys(("accuracy", *(f"f1 {name}" for name in self.names)), "ratio")

    def run(self, subject: Subject, records: Sequence[Record]) -> list[Sample]:
        right = [class_of(record, self.names, label=self.label) for record in records]
        ids = [document(record, subject.prompt, text=self.text) for record in records]
        if self.length is not None:
            ids = [cut(row, self.length, subject.prompt) for row in ids]
        given = scores(subject.model, ids, classes=len(self.names), tokens=subject.tokens).softmax(1)
        best, picks = given.max(1)
        return [
            Sample(
                key(record),
                tuple(row),
                {"accuracy": Term(float(gold == pick), 1.0), **self.terms(gold, pick)},
                {"label": self.names[gold], "predicted": self.names[pick], "probability": round(probability, 6)},
            )
            for record, row, gold, pick, probability in zip(records, ids, right, picks.tolist(), best.tolist(), strict=True)
        ]

    def terms(self, gold: int, pick: int) -> dict[str, Term]:
        """F1 = 2 hits / (given + there), class by class."""
        return {
            f"f1 {name}": Term(2.0 * (gold == pick == number), float(gold == number) + float(pick == number))
            for number, name in enumerate(self.names)
        }

    def report(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """`confusion`: rows are what is right, columns what was predicted, both in the order of `names`. Intervals are over rows; a
        class that neither occurs nor is predicted counts as 0, as in other libraries."""
        numbers = {name: number for number, name in enumerate(self.names)}
        table = np.zeros((len(self.names), len(self.names)), np.int64)
        for sample in samples:
            table[numbers[sample.shown["label"]], numbers[sample.shown["predicted"]]] += 1
        hits, there, given = table.diagonal(), table.sum(1), table.sum(0)
        by_class = {
            name: {"precision": _share(hit, out), "recall": _share(hit, own), "rows": int(own)}
            for name, hit, own, out in zip(self.names, hits, there, given, strict=True)
        }
        terms = np.array([[tuple(sample.terms[f"f1 {name}"]) for name in self.names] for sample in samples])  # [N, classes, 2]
        if len(samples) > 1:
            macro = asdict(bootstrap.interval(terms.reshape(len(terms), -1), macro_f1))
        else:
            macro = {"value": float(macro_f1(terms.reshape(1, 1, -1))[0]), "low": None, "high": None}
        return {"macro_f1": macro, "names": list(self.names), "confusion": table.tolist(), "by_class": by_class}


def macro_f1(samples: np.ndarray) -> np.ndarray:
    """Terms [R, N, 2 * classes] to [R]: the mean of the classes' F1."""
    sums = samples.sum(1).reshape(len(samples), -1, 2)
    ratios = np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:2]), where=sums[..., 1] != 0)
    return ratios.mean(1)


def scores(model: TransformerModel, documents: Sequence[Sequence[int]], *, classes: int, tokens: int = 2048) -> Tensor:
    """The logits [N, classes] that a classifier gives `documents`, of ids, in fp32 on the CPU, some `tokens` at a time. Raises
    `ConfigError` for a model that is no classifier, or one of another number of classes."""
    if not isinstance(model.head, ClassifierHead):
        message = f"this model has a head of kind {model.spec.head.kind!r}, not one for classes; `trivium classify train` makes it one"
        raise ConfigError(message, field="model")
    if (has := model.head.spec.labels) != classes:
        raise ConfigError(f"names: {classes} classes are named, the model has {has}", field="names", value=classes)
    found = torch.empty(len(documents), classes)
    with evaluating(model):
        for rows in batched([len(ids) for ids in documents], tokens):
            found[rows] = _logits(model, [documents[row] for row in rows]).float().cpu()
    return found


def _logits(model: TransformerModel, documents: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, documents))
    tokens = torch.zeros(len(documents), longest, dtype=torch.int64)
    segments = torch.full_like(tokens, -1)
    for row, ids in enumerate(documents):
        tokens[row, : len(ids)], segments[row, : len(ids)] = torch.as_tensor(ids), 0
    padded = min(map(len, documents)) < longest
    inputs = Inputs(tokens.to(model.device), segments=segments.to(model.device) if padded else None)
    logits = model(inputs).logits
    assert logits is not None
    return logits


def _share(part: np.integer, whole: np.integer) -> float:
    return float(part / whole) if whole else 0.0
