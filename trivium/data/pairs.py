"""Rows of preferences become a token bank in which documents stand in pairs, side by side in one bin.

Chosen and rejected are two whole documents with the same prompt, made by the prompt contract as in any training. Answers that
were liked or not (KTO) stand beside a mismatch: their prompt with the answer to another one. Since a bin is never split, no
micro-batch splits a pair, and batch i stays a function of (fingerprint, seed, i).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import DataError, TriviumError
from .formats import Format, Misfit, Turns, choose, formats, show
from .growing import PEEKED, Bank
from .rows import Record

if TYPE_CHECKING:
    from ..text.prompt import Prompt, Row

Side = Mapping[str, Any]  # {prompt, completion, tools}, both strings or both messages


@dataclass(frozen=True)
class Filled:
    """What rows were put into a bank: their format, how many stand together, and numbers [rows] that came with them."""

    format: Format
    together: int = 1
    values: Mapping[str, np.ndarray] | None = None


def fill_pairs(
    bank: Bank, records: Iterable[Record], prompt: Prompt, *, format: str | None, turns: Turns, arguments: Mapping[str, Any] | None
) -> Filled:
    """Rows (chosen, rejected, chosen, rejected, ...), each no longer than the bank's.

    A pair is left out, and counted, if its sides are the same, if a side says nothing, if one is too long or its prompt leaves no
    room. The value `margin` holds the row's, on the chosen side, if any row has one.
    """
    maker = _Maker(bank, prompt, turns=turns, arguments=arguments)
    records, chosen = _told(records, format, feeds="preference")
    margins: list[float] = []
    for record in records:
        bank.count(record)
        found = maker.pair(record)
        if found is not None:
            margins += [_margin(record), 0.0]
            for row in found:
                bank.append(record, row.ids, row.targets)
    bank.check()
    return Filled(chosen, 2, {"margin": np.asarray(margins, np.float32)} if any(margins) else None)


def fill_judged(
    bank: Bank, records: Iterable[Record], prompt: Prompt, *, format: str | None, turns: Turns, arguments: Mapping[str, Any] | None
) -> Filled:
    """Rows (answer, mismatch, answer, mismatch, ...) of answers that were liked or not: of rows {prompt, completion, label}, or of
    pairs, whose sides then count each by itself.

    The value `label` is 1 for what was liked and -1 for what was not, 0 for mismatches. A mismatch is a prompt with the answer
    to the next other prompt, cut where it is too long.
    """
    maker = _Maker(bank, prompt, turns=turns, arguments=arguments)
    records, chosen = _told(records, format, feeds="labels")
    judged: list[tuple[Record, Side, Row, float]] = []
    for record in records:
        bank.count(record)
        if chosen.name == "preference":
            found = maker.pair(record)
            if found is not None:
                judged += [(record, side, row, label) for side, row, label in zip(maker.sides(record), found, (1.0, -1.0), strict=True)]
            continue
        side, label = _judged(record)
        row = maker.row(record, side)
        if row is not None:
            judged.append((record, side, row, label))
    bank.check(kept=len(judged))
    labels: list[float] = []
    for index, (record, side, row, label) in enumerate(judged):
        following = (judged[(index + ahead) % len(judged)][1] for ahead in range(1, len(judged)))
        other = next((other for other in following if other["prompt"] != side["prompt"]), None)
        if other is None:
            raise DataError(f"all {len(judged)} rows have the same prompt; judged answers need the answer to another prompt beside each")
        mismatch = maker.encoded(record, {**side, "completion": other["completion"]})
        for made in (row, mismatch):
            bank.append(record, made.ids[: bank.length], made.targets[: bank.length])
        labels += [label, 0.0]
    return Filled(chosen, 2, {"label": np.asarray(labels, np.float32)})


def fill_answers(
    bank: Bank, records: Iterable[Record], prompt: Prompt, *, format: str | None, turns: Turns, arguments: Mapping[str, Any] | None
) -> Filled:
    """Whole answers that are to be given a number each, in order and none left out: one row for each record, of any format that
    holds an answer, and two (chosen, rejected) for a pair. One that is too long is a `DataError`."""
    maker = _Maker(bank, prompt, turns=turns, arguments=arguments)
    records = iter(records)
    first = list(itertools.islice(records, 1))
    there = first[0].value.keys() if first else ()
    feeds = "labels" if "label" in there else "tokens"
    records, chosen = _told(itertools.chain(first, records), format, feeds=feeds if format is None else min(formats.get(format).feeds))
    for record in records:
        bank.count(record)
        if chosen.name == "preference":
            made = [maker.encoded(record, side) for side in maker.sides(record)]
        else:
            made = [maker.encoded(record, record.value, chosen.name if chosen.convert else "prompt_completion")]
        for row in made:
            if len(row.ids) > bank.length:
                raise DataError(
                    f"{record.where}: {len(row.ids)} tokens, and there is room for {bank.length}; shorten it, or raise the length"
                )
            bank.append(record, row.ids, row.targets)
    return Filled(chosen)


class _Maker:
    """Sides into rows of ids, and what is wrong with them into tallies."""

    def __init__(self, bank: Bank, prompt: Prompt, *, turns: Turns, arguments: Mapping[str, Any] | None):
        self.bank, self.prompt, self.turns, self.arguments = bank, prompt, turns, arguments

    def sides(self, record: Record) -> tuple[Side, Side]:
        try:
            return sides(record.value)
        except Misfit as error:
            raise DataError(f"{record.where}: {error}; the row: {show(record.value)}") from None

    def pair(self, record: Record) -> tuple[Row, Row] | None:
        """Both rows, or None, with the reason noted."""
        good, bad = self.sides(record)
        if good["completion"] == bad["completion"]:
            return self._out("same", record.where)
        chosen = self.row(record, good)
        rejected = None if chosen is None else self.row(record, bad)
        if chosen is None or rejected is None:
            return None
        if chosen == rejected:  # to the template, or as far as they were kept
            return self._out("same", record.where)
        return chosen, rejected

    def row(self, record: Record, side: Side) -> Row | None:
        """The ids of one side, or None, with the reason noted."""
        row = self.encoded(record, side)
        said = [at for at, (token, on) in enumerate(zip(row.ids, row.targets, strict=True)) if on and at and token not in self.bank.stops]
        if not said:
            return self._out("empty", record.where)
        if said[0] >= self.bank.length:
            return self._out("dropped", f"{record.where} (its prompt alone fills {said[0]} tokens)")
        if len(row.ids) > self.bank.length:
            place = f"{record.where} ({len(row.ids)} tokens)"
            if not self.bank.truncate:
                return self._out("dropped", place)
            self.bank.tallies.note("truncated", place)
            row.ids, row.targets = row.ids[: self.bank.length], row.targets[: self.bank.length]
        return row

    def encoded(self, record: Record, side: Side, format: str = "prompt_completion") -> Row:
        """The ids of one side, of any length."""
        convert = formats.get(format).convert
        assert convert is not None
        try:
            made = convert(side).rows(self.prompt, turns=self.turns, arguments=self.arguments)
        except Misfit as error:
            raise DataError(f"{record.where}: {error}; the row: {show(record.value)}") from None
        except TriviumError as error:
            raise DataError(f"{record.where}: {error}") from error
        if len(made) != 1:
            raise DataError(
                f"{record.where}: the chat template writes this answer as {len(made)} rows, and only one can be compared; "
                "end the prompt before the last answer (turns: last)"
            )
        return made[0]

    def _out(self, kind: str, place: str) -> None:
        self.bank.tallies.note(kind, place)


def sides(row: Mapping[str, Any]) -> tuple[Side, Side]:
    """Chosen and rejected of a preference row. The prompt is the row's, or that of its `instruction` and `input`, or what both
    sides begin with: messages, or characters up to a space. Raises `Misfit`."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Misfit("'chosen' and 'rejected' are not both strings, or both lists of messages")
    if row.get("instruction") is not None:
        if prompt is not None or not isinstance(chosen, str):
            raise Misfit("beside 'instruction', 'chosen' and 'rejected' are strings, and there is no 'prompt'")
        prompt = _asked(row)
        chosen, rejected = ([{"role": "assistant", "content": said}] for said in (chosen, rejected))
    elif isinstance(chosen, str) and prompt is None:
        at = _common(chosen, rejected)
        at -= at > 0 and chosen[at - 1] == " "  # the space belongs to the answers, whose first token it is a part of
        prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
    elif isinstance(chosen, list | tuple) and not isinstance(prompt, list | tuple):
        at = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        if isinstance(prompt, str) and (at < 1 or not isinstance(chosen[at - 1], Mapping) or chosen[at - 1].get("content") != prompt):
            raise Misfit("'prompt' is a string that is not the last message before the answers; leave it out, or give messages")
        if at < 1:
            raise Misfit("there is no 'prompt', and 'chosen' and 'rejected' do not begin with the same messages")
        prompt, chosen, rejected = list(chosen[:at]), list(chosen[at:]), list(rejected[at:])
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"prompt": prompt, "completion": chosen, **tools}, {"prompt": prompt, "completion": rejected, **tools}


def _judged(record: Record) -> tuple[Side, float]:
    """The side of a row {prompt, completion, label}, and 1 or -1."""
    row = record.value
    if missing := [name for name in ("prompt", "completion", "label") if row.get(name) is None]:
        raise DataError(f"{record.where}: it has no {missing[0]!r}; the row: {show(row)}")
    if row["label"] not in (0, 1):
        raise DataError(f"{record.where}: 'label' is {row['label']!r:.40}, not true or false (1 or 0); the row: {show(row)}")
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"prompt": row["prompt"], "completion": row["completion"], **tools}, 1.0 if row["label"] else -1.0


def _told(rows: Iterable[Record], name: str | None, *, feeds: str) -> tuple[Iterable[Record], Format]:
    """The rows, and the format that the first of them agree on; where labels are wanted, pairs will do."""
    records = iter(rows)
    head = list(itertools.islice(records, PEEKED))
    if not head:
        raise DataError("no rows: the data is empty")
    pairs = name == "preference" or (name is None and {"chosen", "rejected"} <= head[0].value.keys())
    lone = next(
        (record for record in head if len({"chosen", "rejected"} & {k for k, v in record.value.items() if v is not None}) == 1), None
    )
    if lone is not None:
        missing = next(side for side in ("rejected", "chosen") if lone.value.get(side) is None)
        raise DataError(f"{lone.where}: it has no {missing!r}; the row: {show(lone.value)}")
    chosen = choose(head, name=name, feeds="preference" if pairs else feeds)
    return itertools.chain(head, _complete(records, chosen)), chosen


def _complete(records: Iterable[Record], format: Format) -> Iterable[Record]:
    for record in records:
        if missing := sorted(name for name in format.needs if record.value.get(name) is None):
            raise DataError(f"{record.where}: it has no {missing[0]!r}; the row: {show(record.value)}")
        yield record


def _asked(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row's `system`, `instruction` and `input`."""
    asked = row["instruction"] if not row.get("input") else f"{row['instruction']}\n{row['input']}"
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": asked}]


def _margin(record: Record) -> float:
    value = record.value.get("margin")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise DataError(f"{record.where}: 'margin' is {value!r:.40}, not a number; the row: {show(record.value)}")
    return float(value or 0.0)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
