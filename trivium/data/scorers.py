"""Scorers: how good a row is, as a number; higher is better.

Without a model: plain signs of text that went wrong. With one: what an answer costs it, alone and after its prompt. The ratio of
the two is the instruction-following difficulty, IFD (arXiv:2308.12032). A blend takes the mean of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializeAsAny

from ..core.errors import ConfigError, DataError
from ..core.registry import Registry
from ..core.spec import Part
from .items import Item, Means, Need
from .likeness import words

Scores = NDArray[np.float64]
ENDS = tuple(".!?:;)]}>\"'`*…。！？」』")  # how a text ends that was not cut off


class Scorer(Part, registry=Registry("scorer", "trivium.data")):
    """Root of the scorers. `scores` gives one number a row [N], which may depend on the other rows."""

    @property
    def needs(self) -> Collection[Need]:
        """Which of `Means` it cannot do without."""
        return ()

    def scores(self, items: Sequence[Item], means: Means) -> Scores:
        raise NotImplementedError


class Features(Scorer):
    """The mean of five signs from 0 to 1, without a model: the share of letters among the answer's characters; of its words that stand in
    other rows too; of runs of three words that come once; whether a longer answer ends as sentences do; whether it says something
    that the question does not. They find broken text, and no wrong answers."""

    kind: Literal["features"] = "features"
    long: int = Field(20, ge=1, description="words from which on an answer should end as a sentence does")

    @classmethod
    def tiny(cls) -> Features:
        return cls()

    def scores(self, items: Sequence[Item], means: Means) -> Scores:
        said = [words(item.answer) for item in items]
        rows = Counter(word for answer in said for word in set(answer))
        return np.array([self._score(item, answer, rows) for item, answer in zip(items, said, strict=True)])

    def _score(self, item: Item, said: list[str], rows: Counter[str]) -> float:
        text = item.answer.strip()
        if not text:
            return 0.0
        letters = sum(char.isalnum() or char.isspace() for char in text) / len(text)
        known = sum(rows[word] > 1 for word in said) / len(said) if said else 0.0
        runs = Counter(zip(said, said[1:], said[2:], strict=False))
        once = sum(count for count in runs.values() if count == 1) / runs.total() if runs else 1.0
        whole = float(len(said) < self.long or text.endswith(ENDS))
        asked = set(words(item.question))
        new = float(not said or not asked or any(word not in asked for word in said) or len(said) < 3)
        return (min(1.0, letters / 0.8) + known + once + whole + new) / 5


class ByLoss(Scorer):
    """What the scorers share that ask a model for its losses."""

    @property
    def needs(self) -> Collection[Need]:
        return ("prompt", "nats")


class IFD(ByLoss):
    """Instruction-following difficulty: the answer's perplexity after its prompt over that without. Up to 1, harder is better; above 1 the
    prompt makes the answer less likely, as where the two do not belong together, and such rows come last, the worst at the end."""

    kind: Literal["ifd"] = "ifd"
    of: Literal["perplexity", "loss"] = Field("perplexity", description="what the ratio is of")

    @classmethod
    def tiny(cls) -> IFD:
        return cls()

    def scores(self, items: Sequence[Item], means: Means) -> Scores:
        given, alone = losses(items, means)
        ratio = np.exp(given - alone) if self.of == "perplexity" else given / np.maximum(alone, 1e-9)
        return np.where(ratio <= 1, ratio, -ratio)


class Gain(ByLoss):
    """How much the prompt tells about the answer: nats a token that it saves, the negative logarithm of IFD. It finds answers to other
    questions, and ranks what is easy first."""

    kind: Literal["gain"] = "gain"

    @classmethod
    def tiny(cls) -> Gain:
        return cls()

    def scores(self, items: Sequence[Item], means: Means) -> Scores:
        given, alone = losses(items, means)
        return alone - given


class Likelihood(ByLoss):
    """How likely the model finds the answer after its prompt: minus its loss in nats a token."""

    kind: Literal["likelihood"] = "likelihood"

    @classmethod
    def tiny(cls) -> Likelihood:
        return cls()

    def scores(self, items: Sequence[Item], means: Means) -> Scores:
        assert means.nats is not None
        rows, owner = _rows(items, means)
        counts = np.bincount(owner, [sum(row.targets) for row in rows], len(items))
        return -np.bincount(owner, means.nats(rows), len(items)) / counts


class Blend(Scorer):
    """The mean of several scorers' ranks, from 0 (worst) to 1."""

    kind: Literal["blend"] = "blend"
    of: tuple[SerializeAsAny[Scorer], ...] = Field((Features(), Gain()), min_length=1, description="the scorers")

    @classmethod
    def tiny(cls) -> Blend:
        return cls()

    @property
    def needs(self) -> Collection[Need]:
        return tuple(dict.fromkeys(need for scorer in self.of for need in scorer.needs))

    def scores(self, items: Sequence[Item], means: Means) -> Scores:
        return np.mean([ranks(scorer.scores(items, means)) for scorer in self.of], axis=0)


def ranks(scores: Scores) -> Scores:
    """Scores as ranks from 0 to 1, equal ones sharing theirs."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return middle[place] / max(1, len(scores) - 1)


def auc(good: Scores, bad: Scores) -> float:
    """The chance that a good row scores above a bad one, a tie counting half: the area under the ROC curve."""
    if not len(good) or not len(bad):
        raise ConfigError("the area under a curve needs rows of both sorts")
    wins = np.searchsorted(np.sort(bad), good, "left") + np.searchsorted(np.sort(bad), good, "right")
    return float(wins.mean() / 2 / len(bad))


def losses(items: Sequence[Item], means: Means) -> tuple[Scores, Scores]:
    """Nats a token of each row's answer [N] after its prompt, and alone [N]: over the same tokens, with what begins a text before them
    (the token before the answer, where the tokenizer has none). Turns of one row are taken together."""
    assert means.prompt is not None and means.nats is not None
    tokenizer = means.prompt.tokenizer
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    rows, owner = _rows(items, means)
    alone, turn_owner = [], []
    for row, place in zip(rows, owner, strict=True):
        for begin, end in _runs(row.targets):
            before = row.ids[begin - 1] if start is None else start
            alone.append(type(row)([before, *row.ids[begin:end]], [False] + [True] * (end - begin)))
            turn_owner.append(place)
    counts = np.bincount(owner, [sum(row.targets) for row in rows], len(items))
    given = np.bincount(owner, means.nats(rows), len(items))
    return given / counts, np.bincount(turn_owner, means.nats(alone), len(items)) / counts


def _rows(items: Sequence[Item], means: Means) -> tuple[list, list[int]]:
    """The token rows of all items, first tokens never a target, and whose they are."""
    rows, owner = [], []
    for place, item in enumerate(items):
        made = means.rows(item)
        for row in made:
            row.targets[0] = False
        if not any(any(row.targets) for row in made):
            raise DataError(f"{item.record.where}: there is no answer to score; take such rows out first (step: length)")
        rows += made
        owner += [place] * len(made)
    return rows, owner


def _runs(targets: Sequence[bool]) -> list[tuple[int, int]]:
    """(begin, end) of each run of targets."""
    edges = np.flatnonzero(np.diff(np.array([False, *targets, False], np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
