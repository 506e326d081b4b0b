"""Decontamination: training rows that hold what a model is later asked in an evaluation.

A long text of the evaluation is found by any run of 13 words that it shares with a row (as for GPT-3, arXiv:2005.14165, appendix C);
a shorter one only where a whole text of the row says the same. Runs that stand in many rows of the evaluation are its own
boilerplate (an instruction, a system message) and prove nothing. Paraphrases are not found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError, DataError
from .growing import numbered
from .likeness import words
from .rows import Record

WORDS, LEAST, COMMON = 13, 4, 10
SHOWN = 5
SPEAKER = ("role", "from")  # who says it
Run = tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """A training row that holds something of the evaluation: `shared` words of the row of the evaluation that stood at `other`."""

    record: Record
    other: str
    shared: str
    whole: bool  # the whole text, not a run of words in it

    def to_dict(self) -> dict[str, Any]:
        how = "says the same as" if self.whole else "shares words with"
        return {"why": f"{how} {self.other}: {self.shared}", "where": self.record.where, "row": self.record.value}


class Index:
    """What an evaluation asks: runs of `size` words, and whole texts of `least` words or more. `common`: a run in more rows than
    these is boilerplate.

    Raises `DataError` for no rows, and if none of them has enough words to be found.
    """

    def __init__(self, rows: Iterable[Record | Mapping[str, Any]], *, size: int = WORDS, least: int = LEAST, common: int = COMMON):
        if not 1 <= least <= size:
            raise ConfigError(f"least: {least} is not from 1 to the {size} words of a run", field="least", value=least)
        self.size = size
        self.runs: dict[Run, str] = {}
        self.texts: dict[Run, str] = {}
        self.rows = self.short = 0
        counts: Counter[Run] = Counter()
        for record in numbered(rows):
            self.rows += 1
            found = [said for text in texts(record.value) if len(said := words(text)) >= least]
            self.short += not found
            here: set[Run] = set()
            for said in found:
                self.texts.setdefault(tuple(said), record.where)
                here.update(runs(said, size))
            counts.update(here | {tuple(said) for said in found})
            for run in here:
                self.runs.setdefault(run, record.where)
        if not self.rows:
            raise DataError("no rows to compare with: the evaluation is empty")
        self.boilerplate = {run for run, count in counts.items() if count > common}
        for run in self.boilerplate:
            self.runs.pop(run, None)
            self.texts.pop(run, None)
        if not self.runs and not self.texts:
            raise DataError(f"none of {self.rows} rows of the evaluation has a text of {least} words of its own that could be found")

    def hit(self, record: Record) -> Hit | None:
        """What a row holds of the evaluation; the first that is found."""
        for text in texts(record.value):
            said = words(text)
            if (other := self.texts.get(tuple(said))) is not None and said:
                return Hit(record, other, " ".join(said[: self.size]), whole=True)
            for run in runs(said, self.size):
                if (other := self.runs.get(run)) is not None:
                    return Hit(record, other, " ".join(run), whole=False)
        return None


@dataclass(frozen=True)
class Clean:
    """The rows that hold nothing of the evaluation, and those that do."""

    kept: tuple[Record, ...]
    hits: tuple[Hit, ...]
    report: Mapping[str, Any]  # plain JSON


def decontaminate(
    rows: Iterable[Record | Mapping[str, Any]],
    against: Iterable[Record | Mapping[str, Any]],
    *,
    size: int = WORDS,
    least: int = LEAST,
    common: int = COMMON,
) -> Clean:
    """The rows, parted by whether they share a run of `size` words, or a whole text of at least `least`, with a row of `against`.

    Every string in a row is looked at, whatever its column; the rows may be of any format. Raises `DataError` for no rows on either
    side.
    """
    index = Index(against, size=size, least=least, common=common)
    kept: list[Record] = []
    hits: list[Hit] = []
    for record in numbered(rows):
        hit = index.hit(record)
        if hit is None:
            kept.append(record)
        else:
            hits.append(hit)
    if not kept and not hits:
        raise DataError("no rows: the data is empty")
    touched = {hit.other for hit in hits}
    report = {
        "rows": len(kept) + len(hits),
        "kept": len(kept),
        "contaminated": len(hits),
        "of these, whole texts": sum(hit.whole for hit in hits),
        "evaluation rows": index.rows,
        "evaluation rows named in the hits": len(touched),
        "evaluation rows too short to be found": index.short,
        "boilerplate left out": [" ".join(run) for run in sorted(index.boilerplate)[:SHOWN]],
        "boilerplate runs": len(index.boilerplate),
        "words in a run": size,
        "examples": [hit.to_dict() for hit in hits[:SHOWN]],
    }
    return Clean(tuple(kept), tuple(hits), report)


def texts(value: Any) -> Iterator[str]:
    """Every string in a row that someone says."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in SPEAKER:
                yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def runs(said: Sequence[str], size: int) -> Iterator[Run]:
    """Every run of `size` words; none of fewer."""
    return zip(*(said[start:] for start in range(size)), strict=False) if len(said) >= size else iter(())
