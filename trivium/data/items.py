"""Rows as curation sees them: where they stood, the text of what is asked and answered, and the example that they train.

`Means` is what steps and scorers may need beside the rows, given as callables, since models live on a higher floor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError
from .formats import Example, Misfit, convert, formats, show
from .growing import PEEKED, numbered
from .reshape import Meaning, Side, read, told
from .rows import Record

if TYPE_CHECKING:
    from ..text.prompt import Prompt, Row

Need = Literal["prompt", "nats", "embed"]


@dataclass(frozen=True)
class Item:
    """A row, and the text of its two sides; `example` is what it trains, or None if its format trains nothing by itself."""

    record: Record
    question: str
    answer: str
    example: Example | None

    @property
    def text(self) -> str:
        return f"{self.question}\n{self.answer}"


@dataclass(frozen=True)
class Means:
    """What steps may need beside the rows. `nats`: the summed loss of each row's targets; `embed`: texts to unit vectors [N, D]."""

    prompt: Prompt | None = None
    nats: Callable[[Sequence[Row]], Sequence[float]] | None = None
    embed: Callable[[Sequence[str]], NDArray[np.float32]] | None = None

    def rows(self, item: Item) -> list[Row]:
        """The token rows of an item, as training would see them. Raises `DataError`."""
        assert self.prompt is not None
        if item.example is None:
            raise DataError(f"{item.record.where}: tokens are counted of rows that can be trained on; the row: {show(item.record.value)}")
        try:
            return item.example.rows(self.prompt, turns="all", arguments=None)
        except ValueError as error:
            raise DataError(f"{item.record.where}: {error}") from error


def read_items(rows: Iterable[Record | Mapping[str, Any]], *, format: str | None = None) -> list[Item]:
    """The rows with their sides as text. Raises `DataError` for none at all, and for one that is not like the first ones."""
    records = numbered(rows)
    head = list(itertools.islice(records, PEEKED))
    chosen = told(head, format)
    items = []
    for record in itertools.chain(head, records):
        try:
            meaning = read(chosen, record.value)
        except Misfit as error:
            others = ", ".join(name for name, other in formats.items() if other is not chosen and other.used(record.value) is not None)
            hint = f"; it looks like {others}: keep rows of different formats in different files" if others else ""
            raise DataError(f"{record.where}: {error}{hint}; the row: {show(record.value)}") from None
        question, answer = sides_text(meaning)
        items.append(Item(record, question, answer, convert(record, chosen) if chosen.convert else None))
    return items


def sides_text(meaning: Meaning) -> tuple[str, str]:
    """What is asked and what is answered, as text; of a pair, both answers."""
    return _said(meaning.prompt), "\n".join(map(_said, meaning.answers))


def _said(side: Side) -> str:
    if isinstance(side, str):
        return side
    return "\n".join(str(turn.get("content") or "") + "".join(str(call) for call in turn.get("tool_calls") or ()) for turn in side)
