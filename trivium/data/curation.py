"""Curation: steps that look at all rows and say which of them go, each with its reason.

Nothing vanishes: what a step took out is kept beside the rest, with where it stood and why. The same rows and steps give the
same result. All rows are held in memory. What needs a model (token counts, losses, embeddings) arrives as a callable.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializeAsAny, model_validator

from ..core.errors import ConfigError, DataError
from ..core.log import log
from ..core.registry import Registry
from ..core.spec import Part
from .items import Item, Means, Need, read_items
from .likeness import near, normal, word_shingles
from .rows import Record
from .scorers import Features, Scorer

SHOWN = 3  # removed rows that a report shows of each step


class Step(Part, registry=Registry("curation step", "trivium.data")):
    """Root of the steps. `removed` says which rows go, by place, each with the reason."""

    @property
    def needs(self) -> Collection[Need]:
        """Which of `Means` it cannot do without."""
        return ()

    def removed(self, items: Sequence[Item], means: Means) -> dict[int, str]:
        raise NotImplementedError


class Exact(Step):
    """Takes out rows that say the same as an earlier one."""

    kind: Literal["exact"] = "exact"
    over: Literal["row", "question"] = Field("row", description="whether the whole row must be the same, or only what is asked")
    spelling: bool = Field(False, description="whether case, spaces and punctuation make a difference")

    @classmethod
    def tiny(cls) -> Exact:
        return cls()

    def removed(self, items: Sequence[Item], means: Means) -> dict[int, str]:
        first: dict[str, str] = {}
        gone = {}
        for place, item in enumerate(items):
            sides = [item.question] if self.over == "question" else [item.question, item.answer]
            # what is all punctuation has no words, and is told apart by its characters
            key = "\0".join(side if self.spelling else normal(side) or side.strip() for side in sides)
            if key in first:
                gone[place] = f"says the same as {first[key]}"
            else:
                first[key] = item.record.where
        return gone


class Near(Step):
    """Takes out rows whose runs of words are nearly those of an earlier one (MinHash; the likeness itself decides)."""

    kind: Literal["near"] = "near"
    threshold: float = Field(0.8, gt=0, le=1, description="from which share of common runs on (Jaccard)")
    words: int = Field(3, ge=1, description="words in a run")
    seed: int = Field(0, ge=0, description="of the random orders")

    @classmethod
    def tiny(cls) -> Near:
        return cls()

    def removed(self, items: Sequence[Item], means: Means) -> dict[int, str]:
        sets = [word_shingles(item.text, self.words) for item in items]
        found = near(sets, threshold=self.threshold, seed=self.seed)
        return {place: f"{likeness:.0%} like {items[other].record.where}" for place, (other, likeness) in found.items()}


class Length(Step):
    """Takes out rows that have too few or too many tokens, as training would see them."""

    kind: Literal["length"] = "length"
    min: int = Field(1, ge=0, description="fewest tokens of a row that are trained")
    max: int | None = Field(None, ge=2, description="most tokens of a row in all")

    @classmethod
    def tiny(cls) -> Length:
        return cls(max=64)

    @property
    def needs(self) -> Collection[Need]:
        return ("prompt",)

    def removed(self, items: Sequence[Item], means: Means) -> dict[int, str]:
        gone = {}
        for place, item in enumerate(items):
            rows = means.rows(item)
            trained, longest = sum(sum(row.targets) for row in rows), max((len(row.ids) for row in rows), default=0)
            if trained < self.min:
                gone[place] = f"{trained} trained tokens, fewer than {self.min}"
            elif self.max is not None and longest > self.max:
                gone[place] = f"{longest} tokens, more than {self.max}"
        return gone


class Best(Step):
    """Keeps the rows that a scorer likes best: a `share` of them, so many of them (`count`), or all from a score on (`at_least`)."""

    kind: Literal["best"] = "best"
    by: SerializeAsAny[Scorer] = Field(Features(), description="what gives the scores")
    share: float | None = Field(None, gt=0, le=1, description="keep this share of the rows")
    count: int | None = Field(None, ge=1, description="keep so many rows")
    at_least: float | None = Field(None, description="keep rows with at least this score")

    @classmethod
    def tiny(cls) -> Best:
        return cls(share=0.5)

    @model_validator(mode="after")
    def _one_bound(self) -> Best:
        if sum(bound is not None for bound in (self.share, self.count, self.at_least)) != 1:
            raise ValueError("say one of share, count and at_least")
        return self

    @property
    def needs(self) -> Collection[Need]:
        return self.by.needs

    def removed(self, items: Sequence[Item], means: Means) -> dict[int, str]:
        scores = self.by.scores(items, means)
        if self.at_least is not None:
            return {n: f"{self.by.kind}: {score:.3g}, below {self.at_least:g}" for n, score in enumerate(scores) if score < self.at_least}
        order = np.argsort(-scores, kind="stable")  # of equal scores the earlier row stays
        kept = _many(len(items), self.share, self.count)
        return {
            int(n): f"{self.by.kind}: {scores[n]:.3g}, place {place} of {len(items)}"
            for place, n in enumerate(order, start=1)
            if place > kept
        }


class Diverse(Step):
    """Keeps rows that lie far from each other: the one nearest to the middle, then always the one farthest from all that are kept
    (k-center, Gonzalez 1985), by embeddings of the rows."""

    kind: Literal["diverse"] = "diverse"
    share: float | None = Field(None, gt=0, le=1, description="keep this share of the rows")
    count: int | None = Field(None, ge=1, description="keep so many rows")
    over: Literal["row", "question"] = Field("row", description="what is embedded")

    @classmethod
    def tiny(cls) -> Diverse:
        return cls(count=3)

    @model_validator(mode="after")
    def _one_bound(self) -> Diverse:
        if (self.share is None) == (self.count is None):
            raise ValueError("say one of share and count")
        return self

    @property
    def needs(self) -> Collection[Need]:
        return ("embed",)

    def removed(self, items: Sequence[Item], means: Means) -> dict[int, str]:
        assert means.embed is not None
        vectors = means.embed([item.question if self.over == "question" else item.text for item in items])
        chosen, nearest, distance = centers(vectors, _many(len(items), self.share, self.count))
        kept = set(chosen)
        return {
            n: f"close to {items[chosen[nearest[n]]].record.where} (distance {distance[n]:.3f})" for n in range(len(items)) if n not in kept
        }


def centers(vectors: NDArray[Any], count: int) -> tuple[list[int], NDArray[np.int64], NDArray[np.float64]]:
    """`count` rows of `vectors` [N, D] that are far from each other, in the order of choice; of every row, which of them (its place in
    that order) is nearest [N], and how far it is [N]. Twice the smallest possible greatest distance at most."""
    points = np.asarray(vectors, np.float64)
    start = int(np.argmin(np.linalg.norm(points - points.mean(0), axis=1)))
    chosen, nearest = [start], np.zeros(len(points), np.int64)
    distance = np.linalg.norm(points - points[start], axis=1)
    while len(chosen) < count:
        far = int(distance.argmax())
        if far in chosen:  # only copies of what is chosen are left
            far = next(n for n in range(len(points)) if n not in chosen)
        there = np.linalg.norm(points - points[far], axis=1)
        nearest[there < distance] = len(chosen)
        distance = np.minimum(distance, there)
        chosen.append(far)
    return chosen, nearest, distance


def _many(rows: int, share: float | None, count: int | None) -> int:
    return min(rows, count) if count is not None else max(1, round(rows * (share or 0)))


@dataclass(frozen=True)
class Removed:
    """A row that a step took out."""

    record: Record
    step: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "why": self.why, "where": self.record.where, "row": self.record.value}


@dataclass(frozen=True)
class Curated:
    """What is left, in the order of the data, what went, and the numbers of each step."""

    kept: tuple[Record, ...]
    removed: tuple[Removed, ...]
    report: Mapping[str, Any]  # plain JSON

    def table(self) -> list[dict[str, Any]]:
        """A line for each step."""
        return [
            {
                "step": step["step"]["kind"],
                "rows": step["rows"],
                "removed": step["removed"],
                "such as": "; ".join(f"{example['where']}: {example['why']}" for example in step["examples"][:1]),
            }
            for step in self.report["steps"]
        ]


def curate(
    rows: Iterable[Record | Mapping[str, Any]], steps: Sequence[Step], *, means: Means | None = None, format: str | None = None
) -> Curated:
    """Put the rows through the steps, in order; each sees what those before it left.

    `means`: what the steps need (see `Step.needs`). `format`: of the rows, if their columns do not tell. Raises `DataError` for no
    rows, rows of other formats among them, and if nothing would be left; `ConfigError` for a step whose needs are not there.
    """
    means = means or Means()
    for step in steps:
        given: dict[Need, object] = {"prompt": means.prompt, "nats": means.nats, "embed": means.embed}
        if missing := [need for need in step.needs if given[need] is None]:
            raise ConfigError(f"the step {step.kind!r} needs {_NEEDS[missing[0]]}", field="steps", value=step.kind)
    left = read_items(rows, format=format)
    total, removed, report = len(left), [], []
    for step in steps:
        gone = step.removed(left, means)
        for place, why in gone.items():
            removed.append(Removed(left[place].record, step.kind, why))
        examples = [out.to_dict() for out in removed[len(removed) - len(gone) :][:SHOWN]]
        report.append({"step": {"kind": step.kind, **step.to_dict()}, "rows": len(left), "removed": len(gone), "examples": examples})
        left = [item for place, item in enumerate(left) if place not in gone]
        log.say(f"{step.kind}: {len(gone)} of {report[-1]['rows']} rows removed")
        if not left:
            raise DataError(
                f"the step {step.kind!r} would leave none of {total} rows; the first: {examples[0]['where']}: {examples[0]['why']}"
            )
    kept = tuple(item.record for item in left)
    return Curated(kept, tuple(removed), {"rows": total, "kept": len(kept), "steps": report})


_NEEDS: dict[Need, str] = {
    "prompt": "a model's tokenizer and template, to count tokens (model)",
    "nats": "a model whose losses are the measure (model)",
    "embed": "something that embeds texts (encoder)",
}
