"""What is measured: a task reads rows, asks the model under test, and gives each row terms; metrics are sums of terms.

`Task` is the root of an open union by `kind`: perplexity, choices, generate. A term is (numerator, denominator); a metric is the ratio of
their sums over all rows (perplexity: e to it), so that one bootstrap serves every metric, and a difference of two runs is paired row by row.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..checks.metrics import Term
from ..core.errors import DataError
from ..core.registry import Registry
from ..core.seed import derive
from ..core.spec import Part
from ..data import rows

if TYPE_CHECKING:
    from ..models.transformer import TransformerModel
    from ..text.prompt import Prompt
    from ..text.tokenizer import Tokenizer

Finish = Literal["ratio", "exp_ratio"]
"""How a metric's summed terms become its value: the names of two statistics in `checks.bootstrap`."""


@dataclass(frozen=True)
class Subject:
    """The model under test with its text side, and how much of it runs at once: `tokens` in a scoring forward, `batch` rows generating."""

    model: TransformerModel
    tokenizer: Tokenizer
    prompt: Prompt
    tokens: int = 2048
    batch: int = 16


@dataclass(frozen=True)
class Sample:
    """What came of one row. `key` tells the row by its content; `prompt` is the ids that the model was given; `terms` by metric."""

    key: str
    prompt: tuple[int, ...]
    terms: dict[str, Term]
    shown: dict[str, Any]


class Task(Part, registry=Registry("task", "trivium.evaluate")):
    """The root of tasks."""

    data: tuple[str, ...] = Field(min_length=1, description="data files, folders or globs")
    limit: int | None = Field(None, ge=1, description="only the first rows")

    def metrics(self) -> Mapping[str, Finish]:
        """Every metric's name, the main one first."""
        raise NotImplementedError

    def run(self, subject: Subject, records: Sequence[rows.Record]) -> list[Sample]:
        """A sample for each record, in order. Raises `DataError` for a row that does not fit, naming its file and line."""
        raise NotImplementedError

    def report(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What there is to say beyond metrics, as JSON values."""
        return {}

    def records(self) -> list[rows.Record]:
        """The rows to ask, read from `data`."""
        found = []
        for record in rows.read(self.data):
            if self.limit is not None and len(found) == self.limit:
                break
            found.append(record)
        if not found:
            raise DataError(f"{', '.join(self.data)}: no rows to measure on")
        return found


class Prompted(Task):
    """A task that may show solved examples before what it asks."""

    shots: int = Field(0, ge=0, description="solved examples shown first")
    shots_from: tuple[str, ...] = Field((), description="files to draw them from; by default the other rows that are asked")
    seed: int = Field(0, ge=0, description="decides which examples are drawn")

    def pool(self, records: Sequence[rows.Record]) -> list[rows.Record]:
        """Where solved examples come from; empty if none are shown."""
        if self.shots == 0:
            return []
        return list(rows.read(self.shots_from)) if self.shots_from else list(records)

    def drawn(self, record: rows.Record, pool: Sequence[rows.Record]) -> list[rows.Record]:
        """The examples shown before `record`, drawn by the seed and the row's content; never the row itself."""
        own = key(record)
        others = [other for _, other in sorted(((key(other), other) for other in pool), key=itemgetter(0)) if key(other) != own]
        if len(others) < self.shots:
            raise DataError(f"{record.where}: {self.shots} solved examples were asked for, but there are only {len(others)} other rows")
        return random.Random(derive(self.seed, "shots", own)).sample(others, self.shots)


def key(record: rows.Record) -> str:
    """A row's identity: the hash of its canonical JSON, so that two runs can be compared row by row."""
    text = json.dumps(record.value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def column(record: rows.Record, name: str) -> Any:
    """A column that must be there."""
    value = record.value.get(name)
    if value is None:
        raise DataError(f"{record.where}: it has no {name!r} (columns: {', '.join(record.value)})", field=name)
    return value
