"""Rows of texts with labels, for classifiers: which classes there are, what a model reads of a row, and a token bank with a class
for each document.

A text is a string, encoded as its tokenizer encodes whole texts, or messages, rendered by the prompt contract. Pairs of
sentences and several labels to a text are left out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core.errors import DataError, TriviumError, unknown
from ..text.tokenizer import Tokenizer, content_of
from .bank import Prepared
from .formats import formats, show
from .growing import Bank, numbered
from .rows import Record

if TYPE_CHECKING:
    from ..text.prompt import Prompt

VALUE = "class"  # the name of the classes' numbers among a batch's values
MESSAGES = "messages"  # read where a row has no column of text


def class_names(rows: Iterable[Record], *, label: str = "label") -> tuple[str, ...]:
    """The labels that occur, as text: numbers in their order, words in that of the alphabet. Fewer than two are a `DataError`."""
    seen = Counter(_label(record, label) for record in rows)
    if len(seen) < 2:
        only = f"only {next(iter(seen))!r}" if seen else "no row"
        raise DataError(f"the column {label!r} holds {only}; a classifier needs rows of two classes at least", field=label)
    return tuple(sorted(seen, key=lambda name: (not _whole(name), int(name) if _whole(name) else 0, name)))


def class_of(record: Record, names: Sequence[str], *, label: str = "label") -> int:
    """The number of a row's class: its label is one of `names`, or the number of one. Raises `DataError`."""
    found = _label(record, label)
    if found in names:
        return names.index(found)
    if _whole(found) and 0 <= int(found) < len(names):
        return int(found)
    raise DataError(f"{record.where}: {unknown('label', found, names)}; the row: {show(record.value)}", field=label, value=found)


def given(record: Record, *, text: str = "text") -> str | Sequence[Mapping[str, Any]]:
    """A row's text or messages. Raises `DataError` for a row without either, and for an empty one."""
    found = record.value.get(text, record.value.get(MESSAGES))
    if (isinstance(found, str) and found.strip()) or (isinstance(found, list | tuple) and found):
        return found
    if found is None:
        what = f"it has no {text!r}"
    else:
        what = f"its {text!r} is {'empty' if isinstance(found, str | list | tuple) else 'neither text nor messages'}"
    raise DataError(f"{record.where}: {what}; the row: {show(record.value)}", field=text)


def document(record: Record, prompt: Prompt, *, text: str = "text") -> list[int]:
    """The ids that stand for a row: of its column `text`, or of its messages, as they are served where the last one is not an
    answer. Raises what `given` raises, and for messages that the template does not take."""
    found = given(record, text=text)
    try:
        return encoded(found, prompt)
    except TriviumError as error:
        raise DataError(f"{record.where}: {error}") from error


def encoded(text: str | Sequence[Mapping[str, Any]], prompt: Prompt) -> list[int]:
    """The ids of a text or of messages. A text stands between the tokens that an encoder's tokenizer calls cls and sep; a causal
    model's is not ended, as transformers does not end it: its last token is one that something follows."""
    if not isinstance(text, str):
        answered = text[-1].get("role") == "assistant"
        return prompt.rows(text, turns="last")[-1].ids if answered else prompt.generation(text)
    first, last = _ends(prompt.tokenizer)
    return [*first, *prompt.tokenizer.encode(text, bos=False if first else None), *last]


def cut(ids: list[int], length: int, prompt: Prompt) -> list[int]:
    """The first `length` ids of a document; the token that an encoder's tokenizer ends it with stays the last."""
    end = _ends(prompt.tokenizer)[1]
    return ids if len(ids) <= length else ids[: length - len(end)] + end


def prepare_classes(
    rows: Iterable[Record | Mapping[str, Any]],
    prompt: Prompt,
    *,
    names: Sequence[str],
    length: int,
    text: str = "text",
    label: str = "label",
    too_long: Literal["drop", "truncate"] = "drop",
    max_dropped: int | None = 0,
    packing: str = "none",
) -> Prepared:
    """A token bank of documents of at most `length` tokens; the value `class` is the number of each one's class among `names`.

    A document has one target, its last token, so that targets count documents. Rows that are too long are dropped, or cut before
    the token that ends them (`too_long`); more dropped ones than `max_dropped` raise `DataError`, as do rows without a text or
    with a label that is none of `names`.
    """
    limits = {"dropped": max_dropped, "empty": 0, "same": 0}
    bank = Bank(length, truncate=too_long == "truncate", stops=frozenset(), limits=limits)
    classes: list[int] = []
    for record in numbered(rows):
        bank.count(record)
        ids, number = document(record, prompt, text=text), class_of(record, names, label=label)
        if len(ids) > length:
            bank.tallies.note("truncated" if bank.truncate else "dropped", f"{record.where} ({len(ids)} tokens)")
            if not bank.truncate:
                continue
            ids = cut(ids, length, prompt)
        bank.append(record, ids, [False] * (len(ids) - 1) + [True])
        classes.append(number)
    bank.check()
    values = {VALUE: np.asarray(classes, np.float32)}
    return bank.close(formats.get("classified"), prompt=prompt.digest(), packing=packing, values=values)


def counts(bank: Prepared, names: Sequence[str]) -> dict[str, int]:
    """How many documents of each class there are."""
    found = np.bincount(bank.values[VALUE].astype(np.int64), minlength=len(names))
    return dict(zip(names, found.tolist(), strict=True))


def _label(record: Record, label: str) -> str:
    found = record.value.get(label)
    if isinstance(found, bool):
        return str(found).lower()
    if isinstance(found, int) or (isinstance(found, str) and found.strip()):
        return str(found).strip()
    what = f"it has no {label!r}" if found in (None, "") else f"its {label!r} is {found!r:.40}, neither a word nor a whole number"
    raise DataError(f"{record.where}: {what}; the row: {show(record.value)}", field=label)


def _whole(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that an encoder's tokenizer puts before and after a text; empty for others."""
    named = [content_of(tokenizer.config.get(name)) for name in ("cls_token", "sep_token")]
    found = [None if token is None else tokenizer.id(token) for token in named]
    before, after = ([] if token is None else [token] for token in found)
    return before, after


def first_of(bank: Prepared, names: Sequence[str], *, most: int = 3) -> list[tuple[str, str]]:
    """(where, class) of the first rows."""
    numbers = bank.values[VALUE].astype(int).tolist()
    return [(bank.where(row), names[number]) for row, number in itertools.islice(enumerate(numbers), most)]
