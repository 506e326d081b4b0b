"""Rows become a token bank: formats are told apart, the prompt contract makes ids and targets, bins are packed.

Nothing is lost in silence: rows with nothing to learn, rows that do not fit and rows that were cut are counted and
listed, and more of them than was allowed stop here, before the first step. Tokenizing in several processes is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import DataError, TriviumError
from .bank import Prepared
from .formats import Turns, choose, convert
from .growing import PEEKED, Bank, numbered
from .pairs import Filled, fill_answers, fill_judged, fill_pairs
from .rows import Record

if TYPE_CHECKING:
    from ..text.prompt import Prompt

Feeds = Literal["tokens", "preference", "labels", "answers"]


def prepare(
    rows: Iterable[Record | Mapping[str, Any]],
    prompt: Prompt,
    *,
    length: int,
    feeds: Feeds = "tokens",
    format: str | None = None,
    turns: Turns = "all",
    arguments: Mapping[str, Any] | None = None,
    too_long: Literal["drop", "truncate"] = "drop",
    max_dropped: int | None = 0,
    max_empty: int | None = 0,
    max_same: int | None = 0,
    packing: str = "best_fit",
) -> Prepared:
    """A token bank of rows of at most `length` tokens, packed in bins of `length`; of pairs, in bins of two lengths.

    `rows` come from `rows.read`, or are plain mappings. `feeds` says what is done with them: training on tokens, on pairs of
    answers (`preference`, or `labels`: answers that were liked or not), or giving each of them a number (`answers`); see `pairs`.
    `format` overrides what the first rows look like; `arguments` go to the template. Documents longer than `length` are split
    into rows that overlap by one token, so that each token after the first is still predicted exactly once. Other rows that are
    too long are dropped, or cut at the end (`too_long`). Rows that train nothing but stop ids are left out; an example of which
    nothing else is left is empty; a pair whose sides are the same is left out. More than `max_dropped` dropped, `max_empty` empty
    or `max_same` same ones, no rows at all, or a row that does not fit its format raise `DataError`; None means any number.
    """
    limits = {"dropped": max_dropped, "empty": max_empty, "same": max_same}
    bank = Bank(length, truncate=too_long == "truncate", stops=frozenset(prompt.stops), limits=limits)
    fill = {"tokens": fill_rows, "preference": fill_pairs, "labels": fill_judged, "answers": fill_answers}[feeds]
    filled = fill(bank, numbered(rows), prompt, format=format, turns=turns, arguments=arguments)
    return bank.close(filled.format, prompt=prompt.digest(), packing=packing, together=filled.together, values=filled.values)


def fill_rows(
    bank: Bank, records: Iterable[Record], prompt: Prompt, *, format: str | None, turns: Turns, arguments: Mapping[str, Any] | None
) -> Filled:
    """Rows each by itself, for next-token training."""
    records = iter(records)
    head = list(itertools.islice(records, PEEKED))
    if not head:
        raise DataError("no rows: the data is empty")
    chosen = choose(head, name=format)
    for record in itertools.chain(head, records):
        example = convert(record, chosen)
        try:
            made = example.rows(prompt, turns=turns, arguments=arguments)
        except TriviumError as error:
            raise DataError(f"{record.where}: {error}") from error
        bank.add(record, made, splits=example.splits)
    bank.check()
    return Filled(chosen)
